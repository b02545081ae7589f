"""Answers to a task's questions: batched by length, shared out over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from llava_cl.distributed import World, gather_objects, local_share


def predict(
    answer: Callable[[list[dict[str, Any]]], list[str]],
    questions: Dataset[dict[str, Any]],
    lengths: Sequence[int],
    *,
    batch_size: int,
    world: World,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """The answer to every question, in the questions' order, on every rank.

    Args:
        answer: the answers to a batch of question samples; called without gradients.
        questions: question samples by index.
        lengths: a length of each question; questions of like length share a batch.
        batch_size: questions in one batch.
        world: the process group.
        progress: called on every rank with its questions done and in all.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    mine = local_share(batches, world)
    total = sum(len(batch) for batch in mine)
    answers: dict[int, str] = {}
    for batch in mine:
        with torch.inference_mode():
            answers.update(zip(batch, answer([questions[index] for index in batch]), strict=True))
        progress(len(answers), total)
    merged: dict[int, str] = {}
    for part in gather_objects(answers, world):
        merged.update(part)
    return [merged[index] for index in range(len(lengths))]
