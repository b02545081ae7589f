"""The cached pre-training pictures as tensors: loading, label tables, normalised batches with a small shift."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
KINDS = ("chart", "digit", "flag", "garment", "group", "icon", "map", "molecule", "outline", "scene")


@dataclass
class Pictures:
    """All pictures of one part: ``images`` uint8 ``[n, 72, 72, 3]``, ``facts`` one dictionary per picture."""

    images: np.ndarray
    facts: list[dict[str, str]]


def load(cache: Path, part: str, kinds: tuple[str, ...] = KINDS, side: int = 72) -> Pictures:
    """Read ``kinds`` of ``part`` ("pretrain" or "probe"), resized to ``side`` pixels where they are larger."""
    arrays, facts = [], []
    for kind in kinds:
        images = np.load(cache / f"{part}-{kind}.npy")
        arrays.append(images if side == images.shape[1] else np.stack([resized(image, side) for image in images]))
        facts += json.loads((cache / f"{part}-{kind}.json").read_text())
    return Pictures(np.concatenate(arrays), facts)


def resized(image: np.ndarray, side: int) -> np.ndarray:
    """uint8 ``[side, side, 3]`` of an RGB picture, as the image processors of the vision models resize it."""
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


def label_tables(facts: list[dict[str, str]]) -> tuple[dict[str, list[str]], np.ndarray]:
    """(fact name -> its sorted values, labels ``[n, facts]`` with -1 where a picture has no such fact)."""
    values: dict[str, set[str]] = {}
    for record in facts:
        for key, value in record.items():
            values.setdefault(key, set()).add(value)
    classes = {key: sorted(values[key]) for key in sorted(values)}
    index = {key: {v: k for k, v in enumerate(vs)} for key, vs in classes.items()}
    labels = np.full((len(facts), len(classes)), -1, np.int16)
    for column, key in enumerate(classes):
        for row, record in enumerate(facts):
            if key in record:
                labels[row, column] = index[key][record[key]]
    return classes, labels


def cached_label_tables(cache: Path, facts: list[dict[str, str]]) -> tuple[dict[str, list[str]], np.ndarray]:
    """``label_tables`` of the pre-training facts, kept in ``cache`` for the next start."""
    names, table = cache / "label_names.json", cache / "labels.npy"
    if not table.exists():
        classes, labels = label_tables(facts)
        names.write_text(json.dumps(classes))
        np.save(table, labels)
    return json.loads(names.read_text()), np.load(table)


def pixels(
    images: np.ndarray,
    generator: torch.Generator | None = None,
    shift: int = 2,
    normal: tuple[tuple[float, ...], tuple[float, ...]] = (MEAN, STD),
) -> torch.Tensor:
    """Normalised float32 ``[n, 3, side, side]``; with a generator every picture is moved by up to ``shift`` pixels."""
    batch = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div_(255)
    if generator is not None:
        side = batch.shape[-1]
        padded = torch.nn.functional.pad(batch, (shift,) * 4, mode="replicate")
        moves = torch.randint(0, 2 * shift + 1, (len(batch), 2), generator=generator).tolist()
        batch = torch.stack([p[:, y : y + side, x : x + side] for p, (y, x) in zip(padded, moves, strict=True)])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in normal)
    return (batch - mean) / std
