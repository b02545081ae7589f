"""Images in a folder for each class."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from llava_cl.data.conversation import IGNORE_INDEX
from llava_cl.data.dataset import PADDING_INDEX
from llava_cl.data.images import load_image
from llava_cl.errors import InputError
from llava_cl.listing import entries, is_image, other_spelling
from llava_cl.parsing import SURROGATE
from llava_cl.terminal import printable

_LISTED = 10


@dataclass(frozen=True)
class ClassRecord:
    """One image and its class.

    Attributes:
        id: the image's path below the split's folder, with "/".
        label: the class's position in the task's list.
    """

    id: str
    label: int


def load_class_records(folder: Path, classes: Sequence[str]) -> list[ClassRecord]:
    """The images of some classes: classes in the order given, images by name.

    Args:
        folder: holds a folder for each class.
        classes: names of class folders.

    Raises:
        InputError: class folders that are missing, empty or cannot be read, or entries that are no image, all named.
    """
    problems: list[str] = []
    records: list[ClassRecord] = []
    for label, name in enumerate(classes):
        place = folder / name
        if not place.is_dir():
            near = other_spelling(place)
            problems.append(f"{place}: is no folder, but should hold the images of a class.{near}")
            continue
        try:
            found = entries(place)
        except InputError as error:
            problems += error.problems
            continue
        strange: dict[str, list[str]] = {}
        for entry in found:
            if fault := _fault(entry):
                strange.setdefault(fault, []).append(printable(entry.name))
        problems += [f"{place}: {', '.join(names[:_LISTED])} {fault}" for fault, names in strange.items()]
        if not found:
            problems.append(f"{place}: holds no images.")
        records += (ClassRecord(f"{name}/{entry.name}", label) for entry in found)
    if problems:
        hidden = len(problems) - _LISTED
        raise InputError(*problems[:_LISTED], *([f"{folder}: and {hidden} more problems"] if hidden > 0 else []))
    return records


def _fault(entry: Path) -> str | None:
    """Why what a class folder holds cannot be an image of the class."""
    if SURROGATE.search(entry.name):
        return "has a name that is not UTF-8; rename it."
    if not is_image(entry.name):
        return "is no image; take it out of the class's folder."
    if not os.access(entry, os.R_OK) or not entry.is_file():
        return "is no file that can be read, or a link that leads to none; take it out of the class's folder."
    return None


class ClassDataset(Dataset[dict[str, Any]]):
    """Images of classes: `pixel_values` float32 `[3, size, size]`, `labels` and `index`.

    `PADDING_INDEX` gives the first image without a label.

    Args:
        records: the images.
        root: the data root; links to pictures may not leave it.
        folder: what the records' paths are relative to, below the root.
        transform: image and index -> pixels; the same for the same arguments and epoch.
    """

    def __init__(
        self,
        records: Sequence[ClassRecord],
        root: Path,
        folder: str,
        transform: Callable[[Image.Image, int], Tensor],
    ) -> None:
        self._records = records
        self._root = root
        self._folder = folder
        self._transform = transform

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        filler = index == PADDING_INDEX
        record = self._records[0 if filler else index]
        image = load_image(f"{self._folder}/{record.id}", self._root)
        return {
            "pixel_values": self._transform(image, max(index, 0)),
            "labels": IGNORE_INDEX if filler else record.label,
            "index": index,
        }


def collate_images(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """`pixel_values` `[batch, 3, size, size]`, `labels` and `index` `[batch]`."""
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": torch.tensor([sample["labels"] for sample in samples]),
        "index": torch.tensor([sample["index"] for sample in samples]),
    }
