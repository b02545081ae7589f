"""Answers to a task's questions: batches of like length, shared out over the ranks by their cost."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from llava_cl.distributed import World, gather_objects, share_out
from llava_cl.stopping import outlive_signals

Batch = dict[str, torch.Tensor]


def question_batches(
    lengths: Sequence[int], batch_size: int, groups: Sequence[Hashable] | None = None
) -> list[list[int]]:
    """Positions of questions, batch by batch, the longest first.

    They depend on nothing else, such as the number of ranks: what shares a batch shows in the last bits of a result.

    Args:
        lengths: a length of each question; questions of like length share a batch.
        batch_size: questions in one batch.
        groups: what each question is about; questions about the same stand together, by the longest of them.
    """
    groups = range(len(lengths)) if groups is None else groups
    first: dict[Hashable, int] = {}
    longest: dict[Hashable, int] = {}
    for index, group in enumerate(groups):
        first.setdefault(group, index)
        longest[group] = max(longest.get(group, 0), lengths[index])
    order = sorted(
        range(len(lengths)), key=lambda index: (-longest[groups[index]], first[groups[index]], -lengths[index], index)
    )
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def predict(
    answer: Callable[[Batch], list[str]],
    questions: Dataset[dict[str, Any]],
    lengths: Sequence[int],
    *,
    batch_size: int,
    collate: Callable[[list[dict[str, Any]]], Batch],
    workers: int,
    world: World,
    groups: Sequence[Hashable] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """The answer to every question, in the questions' order, on every rank.

    Args:
        answer: the answers to a batch of questions; called without gradients.
        questions: question samples by index.
        lengths, batch_size, groups: see `question_batches`.
        collate: samples of questions -> batch.
        workers: processes that read the next batches meanwhile, 0 = none.
        world: the process group.
        progress: called on every rank with its questions done and in all.
    """
    batches = question_batches(lengths, batch_size, groups)
    costs = {number: float(sum(lengths[index] for index in batch)) for number, batch in enumerate(batches)}
    owners = share_out(costs, world.size)
    mine = [batch for number, batch in enumerate(batches) if owners[number] == world.rank]
    total = sum(len(batch) for batch in mine)
    loader = DataLoader(
        questions,
        batch_sampler=mine,
        collate_fn=collate,
        num_workers=min(workers, len(mine)),
        pin_memory=world.device.type == "cuda",
        worker_init_fn=outlive_signals,
    )
    answers: dict[int, str] = {}
    progress(0, total)
    for positions, batch in zip(mine, loader, strict=True):
        with torch.inference_mode():
            answers.update(zip(positions, answer(batch), strict=True))
        progress(len(answers), total)
    merged = {index: text for part in gather_objects(answers, world) for index, text in part.items()}
    return [merged[index] for index in range(len(lengths))]
