"""Samples to padded batches: on the right for training, on the left for generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llava_cl.data.conversation import IGNORE_INDEX

Sample = dict[str, Any]


def collate_train(samples: Sequence[Sample], pad_id: int) -> dict[str, Tensor]:
    """Pad to the longest sample, on the right.

    Args:
        samples: of `ConversationDataset`.
        pad_id: id to pad `input_ids` with; labels are padded with -100.

    Returns:
        int64 `input_ids`, `labels` and `attention_mask`, all `[batch, length]`, `index` `[batch]`, and, unless no
        sample has an image, float32 `pixel_values` `[images of all samples, 3, size, size]` in the samples' order.
        The mask follows the lengths and not the ids: LLaVA pads with unk, which may also stand in a text.
    """
    batch = _pad(samples, pad_id, on_the_left=False)
    longest = batch["input_ids"].shape[1]
    labels = torch.full((len(samples), longest), IGNORE_INDEX)
    for row, sample in zip(labels, samples, strict=True):
        row[: len(sample["labels"])] = torch.as_tensor(sample["labels"])
    return {**batch, "labels": labels}


def collate_prompts(samples: Sequence[Sample], pad_id: int) -> dict[str, Tensor]:
    """Pad to the longest prompt, on the left, so that every prompt ends where generation begins.

    Prompts about the same images begin alike, up to the end of the images. Where a batch holds such, what they begin
    with is a batch of its own, so that a model reads it once.

    Args:
        samples: of `QuestionDataset`.
        pad_id: id to pad with.

    Returns:
        As `collate_train`, without labels. Where prompts share their start also `start_ids` and `start_mask`
        `[starts, length]`, each start once, and `start_of` `[batch]`, which of them is each prompt's; `input_ids` and
        `attention_mask` are then of what follows it, and `pixel_values` are the images of the starts.
    """
    starts: dict[tuple[Any, ...], int] = {}
    start_of = [
        starts.setdefault((sample.get("images"), *sample["input_ids"][: sample.get("start", 0)]), len(starts))
        for sample in samples
    ]
    if len(starts) == len(samples) or not all(sample.get("start") for sample in samples):
        return _pad(samples, pad_id, on_the_left=True)
    first = [samples[start_of.index(number)] for number in range(len(starts))]
    shared = _pad(
        [{**sample, "input_ids": sample["input_ids"][: sample["start"]]} for sample in first], pad_id, on_the_left=True
    )
    rest = [{"input_ids": sample["input_ids"][sample["start"] :], "index": sample["index"]} for sample in samples]
    return {
        **_pad(rest, pad_id, on_the_left=True),
        "start_ids": shared["input_ids"],
        "start_mask": shared["attention_mask"],
        "start_of": torch.tensor(start_of),
        "pixel_values": shared["pixel_values"],
    }


def _pad(samples: Sequence[Sample], pad_id: int, *, on_the_left: bool) -> dict[str, Tensor]:
    longest = max(len(sample["input_ids"]) for sample in samples)
    input_ids = torch.full((len(samples), longest), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        place = slice(longest - length, longest) if on_the_left else slice(0, length)
        input_ids[row, place] = torch.as_tensor(sample["input_ids"])
        attention_mask[row, place] = 1
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "index": torch.tensor([sample["index"] for sample in samples]),
    }
    pixel_values = [sample["pixel_values"] for sample in samples if "pixel_values" in sample]
    if pixel_values:
        batch["pixel_values"] = torch.cat(pixel_values)
    return batch
