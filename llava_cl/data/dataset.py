"""Records to samples: token ids and pixels for training and for questions, and an audit of what can be learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from llava_cl.data.chat import ChatFormat
from llava_cl.data.conversation import IGNORE_INDEX, image_markers
from llava_cl.data.images import CLIP_MEAN, CLIP_STD, load_image, preprocess_image
from llava_cl.data.records import QuestionRecord, RecordId, TrainRecord

PADDING_INDEX = -1
"""Index of the sample that only keeps a rank busy."""


@dataclass(frozen=True)
class UnusableSample:
    """A sample from which nothing is learnt, and why."""

    index: int
    id: RecordId
    reason: str


class _ImageSource:
    """Loads and normalises the images of a record."""

    def __init__(self, root: Path, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self._root = root
        self._size = size
        self._mean = tuple(mean)
        self._std = tuple(std)

    def __call__(self, paths: Sequence[str]) -> Tensor:
        """float32 `[len(paths), 3, size, size]`."""
        arrays = [
            preprocess_image(load_image(path, self._root), size=self._size, mean=self._mean, std=self._std)
            for path in paths
        ]
        return torch.stack([torch.from_numpy(array) for array in arrays])


class ConversationDataset(Dataset[dict[str, Any]]):
    """Training samples.

    A sample has `input_ids` and `labels` (lists of int, -100 = ignored), `index`, and `pixel_values` float32
    `[images, 3, size, size]` unless it shows no image. A turn shows all images of the record if it is the only one
    with `<image>`, else one each. `PADDING_INDEX` gives the first sample with every label ignored.

    Args:
        records: the task's training records.
        image_root: folder that the records' paths are relative to.
        chat: encodes the turns.
        image_size, image_mean, image_std: as the vision tower expects them.
        max_length: most ids of a sample, before and again after images take their full length.
    """

    def __init__(
        self,
        records: Sequence[TrainRecord],
        image_root: Path,
        chat: ChatFormat,
        *,
        image_size: int = 336,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        max_length: int = 2048,
    ) -> None:
        self.records = records
        self._pixels = _ImageSource(image_root, image_size, image_mean, image_std)
        self._chat = chat
        self._max_length = max_length

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[0 if index == PADDING_INDEX else index]
        ids, labels, _ = self._encode(record)
        if index == PADDING_INDEX:
            labels = [IGNORE_INDEX] * len(labels)
        sample: dict[str, Any] = {"input_ids": ids, "labels": labels, "index": index}
        shown = ids.count(self._chat.image_token_id) // self._chat.num_image_tokens if record.images else 0
        if shown:
            sample["pixel_values"] = self._pixels(record.images[:shown])
        return sample

    def audit(self) -> list[UnusableSample]:
        """All samples without a supervised token, found without opening an image; the caller decides how many pass."""
        unusable = []
        for index, record in enumerate(self.records):
            _, labels, unmatched = self._encode(record)
            if unmatched:
                reason = "answers cannot be told from questions: an empty last answer, or template text in a turn"
            elif all(label == IGNORE_INDEX for label in labels):
                reason = f"no answer token within the first {self._max_length} tokens"
            else:
                continue
            unusable.append(UnusableSample(index, record.id, reason))
        return unusable

    def _encode(self, record: TrainRecord) -> tuple[list[int], list[int], bool]:
        in_one_turn = sum(map(bool, image_markers(record.conversations))) == 1
        encoded = self._chat.conversation(
            record.conversations,
            max_length=self._max_length,
            images_per_turn=len(record.images) if in_one_turn else min(len(record.images), 1),
        )
        end = self._end(encoded["input_ids"]) if record.images else self._max_length
        return encoded["input_ids"][:end], encoded["labels"][:end], encoded["unmatched"]

    def _end(self, ids: Sequence[int]) -> int:
        """Where the second cut falls: at `max_length`, or before an image that would not fit in whole."""
        end = min(self._max_length, len(ids))
        cut_off = ids[:end].count(self._chat.image_token_id) % self._chat.num_image_tokens
        return end - cut_off


class QuestionDataset(Dataset[dict[str, Any]]):
    """Prompts for generation: `input_ids`, `index`, and unless the question has no image `pixel_values`.

    With those come the paths, `images`, and `start`, how many ids there are up to the end of the images. All images of
    a question stand in front of its text. `PADDING_INDEX` gives the first prompt once more. Arguments as for
    `ConversationDataset`.
    """

    def __init__(
        self,
        records: Sequence[QuestionRecord],
        image_root: Path,
        chat: ChatFormat,
        *,
        image_size: int = 336,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
    ) -> None:
        self.records = records
        self._pixels = _ImageSource(image_root, image_size, image_mean, image_std)
        self._chat = chat

    def __len__(self) -> int:
        return len(self.records)

    def lengths(self) -> list[int]:
        """The number of ids of every prompt."""
        return [len(self._ids(record)) for record in self.records]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The samples of a batch; images that several of them show are read once."""
        pixels: dict[tuple[str, ...], Tensor] = {}
        samples = []
        for index in indices:
            record = self.records[0 if index == PADDING_INDEX else index]
            ids = self._ids(record)
            sample: dict[str, Any] = {"input_ids": ids, "index": index}
            if record.images:
                if record.images not in pixels:
                    pixels[record.images] = self._pixels(record.images)
                end = len(ids) - ids[::-1].index(self._chat.image_token_id)
                sample.update(pixel_values=pixels[record.images], images=record.images, start=end)
            samples.append(sample)
        return samples

    def _ids(self, record: QuestionRecord) -> list[int]:
        return self._chat.prompt(record.text, images=len(record.images))
