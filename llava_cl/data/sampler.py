"""The order in which samples are seen: batches of like length and modality, the same for any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

from llava_cl.data.records import TrainRecord
from llava_cl.errors import InputError


def modality_lengths(records: Sequence[TrainRecord]) -> list[int]:
    """Words of each conversation, split at white space and summed over its turns; negative for text-only records."""
    words = [sum(len(turn["value"].split()) for turn in record.conversations) for record in records]
    return [count if record.images else -count for count, record in zip(words, records, strict=True)]


def length_grouped_indices(
    lengths: Sequence[int], batch_size: int, world_size: int, generator: torch.Generator | None
) -> list[int]:
    """A random order of all samples in which each batch holds samples of like length and of one modality.

    The order of LLaVA's modality-length grouping: mega-batches of `batch_size * world_size` random samples, each dealt
    out into `world_size` batches of nearly equal total length; with both modalities present each is grouped by itself,
    whole mega-batches are shuffled together, and the last one of either (which may be short) comes at the end.

    Args:
        lengths: as from `modality_lengths`; none may be zero.
        batch_size: samples of one batch.
        world_size: batches of one mega-batch.
        generator: source of the permutations; None is torch's global CPU generator.

    Returns:
        Indices into `lengths`, each once.

    Raises:
        InputError: a length is zero.
    """
    if 0 in lengths:
        raise InputError(
            f"record[{list(lengths).index(0)}] has no words, so that it cannot be grouped by length: remove it"
        )
    images = [index for index, length in enumerate(lengths) if length > 0]
    texts = [index for index, length in enumerate(lengths) if length < 0]
    mega_batch = batch_size * world_size
    if not images or not texts:  # a text-only file keeps its negative lengths: shortest first within a mega-batch
        return _grouped(range(len(lengths)), lengths, mega_batch, world_size, generator)
    magnitudes = [abs(length) for length in lengths]
    image_batches = _chunks(_grouped(images, magnitudes, mega_batch, world_size, generator), mega_batch)
    text_batches = _chunks(_grouped(texts, magnitudes, mega_batch, world_size, generator), mega_batch)
    leftover = sorted(image_batches.pop() + text_batches.pop())
    batches = image_batches + text_batches
    order = torch.randperm(len(batches), generator=generator).tolist()
    return [index for position in order for index in batches[position]] + leftover


def measurement_indices(count: int, ratio: float) -> list[int]:
    """`int(ratio * count)` evenly spaced sample indices from 0 to `count - 1`, the same on every call.

    Raises:
        InputError: `ratio` is not in (0, 1], or selects nothing.
    """
    if not 0 < ratio <= 1:
        raise InputError(f"the data ratio is {ratio}: it must be above 0 and at most 1")
    selected = int(ratio * count)
    if selected == 0:
        raise InputError(f"a data ratio of {ratio} selects none of {count} samples: use at least {1 / max(count, 1):g}")
    return np.floor(np.linspace(0, count - 1, selected)).astype(int).tolist()


class GlobalBatchSampler(Sampler[list[int]]):
    """Micro-batches of one rank, from a list of global batches that does not depend on the number of ranks.

    A global batch consists of `W = global_batch // micro_batch` micro-batches. Rank `i` of `n` runs those numbered
    `i, i + n, ...`, so `W / n` accumulation steps per optimizer step. The last global batch may be short: it keeps its
    samples, and micro-batches without any become `[-1]`, for which the datasets give a sample without labels, so that
    all ranks run equally many.

    Args:
        lengths: as from `modality_lengths`, or any non-zero lengths.
        global_batch: samples of one optimizer step over all ranks.
        micro_batch: most samples of one forward pass on one rank.
        rank, world_size: this process and the number of processes.
        seed: together with the epoch decides the order.

    Raises:
        InputError: `micro_batch` does not divide `global_batch`, or `world_size` does not divide `W`.
    """

    def __init__(
        self, lengths: Sequence[int], global_batch: int, micro_batch: int, rank: int, world_size: int, seed: int
    ) -> None:
        if global_batch % micro_batch:
            raise InputError(
                f"the global batch of {global_batch} is not a multiple of the micro-batch of {micro_batch}: "
                "change one of them"
            )
        self._groups = global_batch // micro_batch
        if self._groups % world_size:
            raise InputError(
                f"{world_size} ranks cannot share the {self._groups} micro-batches of a global batch "
                f"({global_batch} / {micro_batch}) evenly: use a number of ranks that divides {self._groups}, "
                "or change the micro-batch"
            )
        self._lengths = list(lengths)
        self._global_batch = global_batch
        self._micro_batch = micro_batch
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._epoch = 0

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches that each rank runs per optimizer step."""
        return self._groups // self._world_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of epoch `epoch`, counted from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Micro-batches of this rank in one epoch."""
        return math.ceil(len(self._lengths) / self._global_batch) * self.accumulation_steps

    def global_batches(self, epoch: int) -> list[list[int]]:
        """The samples of each optimizer step of an epoch, of all ranks."""
        state = np.random.SeedSequence((self._seed, epoch)).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(state))
        order = length_grouped_indices(self._lengths, self._micro_batch, self._groups, generator)
        return _chunks(order, self._global_batch)

    def global_batch(self, step: int) -> list[int]:
        """The samples of an optimizer step, counted from 1 over all epochs."""
        epoch, number = divmod(step - 1, math.ceil(len(self._lengths) / self._global_batch))
        return self.global_batches(epoch)[number]

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.global_batches(self._epoch):
            micro_batches = _chunks(batch, self._micro_batch)
            micro_batches += [[-1]] * (self._groups - len(micro_batches))
            yield from micro_batches[self._rank :: self._world_size]


def _grouped(
    indices: Sequence[int],
    lengths: Sequence[int],
    mega_batch: int,
    groups: int,
    generator: torch.Generator | None,
) -> list[int]:
    """`indices` in random mega-batches, each sorted by falling length and dealt into `groups` even batches."""
    order = [indices[position] for position in torch.randperm(len(indices), generator=generator).tolist()]
    result: list[int] = []
    for batch in _chunks(order, mega_batch):
        batch.sort(key=lambda index: lengths[index], reverse=True)
        for group in _even_groups(batch, lengths, groups):
            result.extend(group)
    return result


def _even_groups(indices: Sequence[int], lengths: Sequence[int], groups: int) -> list[list[int]]:
    """Each index goes to the open group of least total length; a batch that does not divide is dealt by stride."""
    if len(indices) % groups:
        return [list(indices[start::groups]) for start in range(groups)]
    share = len(indices) // groups
    members: list[list[int]] = [[] for _ in range(groups)]
    totals: list[float] = [0] * groups
    for index in indices:
        smallest = totals.index(min(totals))
        members[smallest].append(index)
        totals[smallest] += lengths[index]
        if len(members[smallest]) == share:
            totals[smallest] = math.inf
    return members


def _chunks(indices: Sequence[int], size: int) -> list[list[int]]:
    return [list(indices[start : start + size]) for start in range(0, len(indices), size)]
