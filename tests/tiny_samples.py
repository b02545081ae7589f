"""Encoded samples for the tiny LLaVA: images, text alone, no label, of differing lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

IMAGE_TOKENS = 4
IMAGE_TOKEN_ID = 3
PAD_ID = 0


def build_samples(kinds: str, *, seed: int = 0) -> list[dict[str, Any]]:
    """One sample for each letter: `i` with an image, `t` text alone, `n` with an image but no label."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index, kind in enumerate(kinds):
        question, answer = torch.randint(3, 9, (2,), generator=generator).tolist()
        ids = [1, *([IMAGE_TOKEN_ID] * IMAGE_TOKENS if kind != "t" else [])]
        start = len(ids) + question
        ids += torch.randint(4, 64, (question + answer,), generator=generator).tolist()
        labels = [-100] * len(ids) if kind == "n" else [-100] * start + ids[start:]
        sample: dict[str, Any] = {"input_ids": ids, "labels": labels, "index": index}
        if kind != "t":
            sample["pixel_values"] = torch.randn(1, 3, 16, 16, generator=generator)
        samples.append(sample)
    return samples


class SampleDataset(Dataset[dict[str, Any]]):
    """Samples by index; -1 is the first one with every label ignored, as in `llava_cl.data`."""

    def __init__(self, samples: list[dict[str, Any]]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == -1:
            first = self._samples[0]
            return {**first, "labels": [-100] * len(first["labels"]), "index": -1}
        return self._samples[index]
