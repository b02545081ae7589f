"""Continual-learning metrics from an accuracy matrix: how well a stream was learned, kept and transferred.

A[t][i] is the score on task i after stage t, both counted from 1 here, and T the number of tasks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real

from llava_cl.errors import InputError

Matrix = Sequence[Sequence[float | None]]


def summarize(matrix: Matrix) -> dict[str, float | None]:
    """The usual summary numbers of an accuracy matrix.

    - `Last`, `MFN`: mean over i of A[T][i] (MFN: mean final accuracy).
    - `Average`: mean of the whole matrix, so of tasks not learned yet too.
    - `Transfer`: mean over i >= 2 of the mean over t < i of A[t][i]: tasks before they are learned.
      With `Last` and `Average`, as in the MTIL benchmark (ZSCL, ICCV 2023).
    - `MFT`: mean over i of A[i][i]: each task right after it was learned.
    - `MAA`: mean over t of the mean over i <= t of A[t][i].
    - `BWT`: sum over i < T of A[T][i] - A[i][i], divided by T - 1; `BWT_T`: the same divided by T, which is
      MFN - MFT. Papers use either.
    - `Forgetting`: mean over i < T of (max over i <= t <= T of A[t][i]) - A[T][i], never negative.

    Args:
        matrix: T rows (stages) of T columns (tasks), in percent; `None` where not evaluated. A run under way
            is summarised by the square of its finished stages.

    Returns:
        The keys above, in percent. `None` where an entry that the number needs is `None`. For T = 1 `BWT` and
        `Transfer` are means over nothing, hence `None`; `BWT_T` and `Forgetting` are 0 if the task was
        evaluated.

    Raises:
        InputError: the matrix is empty or not square, or an entry is neither `None` nor a finite number.
    """
    scores = _checked(matrix)
    size = len(scores)
    stages = range(size)
    final = scores[-1]
    learned = [scores[i][i] for i in stages]
    changes = [_difference(final[i], learned[i]) for i in stages]
    best = [max(_all_known(scores[t][i] for t in range(i, size)), default=None) for i in stages]
    drops = [_difference(best[i], final[i]) for i in stages]
    return {
        "Last": mean(final),
        "Average": mean(mean(row) for row in scores),
        "Transfer": mean(mean(scores[t][i] for t in range(i)) for i in stages[1:]),
        "MFT": mean(learned),
        "MFN": mean(final),
        "MAA": mean(mean(scores[t][: t + 1]) for t in stages),
        "BWT": mean(changes[:-1]),
        "BWT_T": mean(changes),
        "Forgetting": mean(drops[:-1] or drops),
    }


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values, None where one of them is not known or there is none."""
    known = _all_known(values)
    return sum(known) / len(known) if known else None


@dataclass(frozen=True)
class ClassIncremental:
    """Class-incremental metrics, percent.

    Attributes:
        accuracies: after each stage, over the test images of all tasks so far.
        last: that of the last stage.
        average: mean over the stages (AAA, average anytime accuracy).
        forgetting: after each stage, the mean over earlier tasks of the best accuracy so far minus the
            current one; 0 after the first.
    """

    accuracies: list[float]
    last: float
    average: float
    forgetting: list[float]


def class_incremental(matrix: Matrix, test_counts: Sequence[int]) -> ClassIncremental:
    """Metrics of a class-incremental stream, in which all classes seen so far compete.

    Args:
        matrix: T rows (stages) of T columns (tasks), percent; only the lower triangle is read.
        test_counts: number of test images of each task.

    Raises:
        InputError: a bad matrix as for `summarize`, an entry of the lower triangle that is `None`, or
            `test_counts` that are not T positive integers.
    """
    scores = _checked(matrix)
    size = len(scores)
    if len(test_counts) != size or any(count < 1 for count in test_counts):
        raise InputError(f"test_counts must be {size} positive numbers of images, but is {list(test_counts)}.")
    lower = [[score for score in row[: t + 1] if score is not None] for t, row in enumerate(scores)]
    missing = [t + 1 for t, row in enumerate(lower) if len(row) < t + 1]
    if missing:
        raise InputError(f"accuracy matrix: stages {missing} lack the score of a task learned so far; evaluate it.")
    accuracies = [
        sum(count * score for count, score in zip(test_counts, row, strict=False)) / sum(test_counts[: t + 1])
        for t, row in enumerate(lower)
    ]
    drops = [[max(lower[s][i] for s in range(i, t + 1)) - lower[t][i] for i in range(t)] for t in range(1, size)]
    forgetting = [0.0, *(sum(row) / len(row) for row in drops)]
    return ClassIncremental(accuracies, accuracies[-1], sum(accuracies) / size, forgetting)


def _checked(matrix: Matrix) -> list[list[float | None]]:
    size = len(matrix)
    if size == 0:
        raise InputError("accuracy matrix: it is empty; give a row for every stage.")
    problems = []
    for stage, row in enumerate(matrix, start=1):
        if len(row) != size:
            problems.append(
                f"accuracy matrix: row {stage} has {len(row)} entries, but there are {size} stages; "
                "give a square matrix, with null where a task was not evaluated."
            )
        for task, score in enumerate(row, start=1):
            number = isinstance(score, Real) and not isinstance(score, bool)
            if score is not None and not (number and math.isfinite(score)):
                problems.append(
                    f"accuracy matrix: row {stage}, column {task} is {score!r}, "
                    "but must be a finite number of percent, or null."
                )
    if problems:
        raise InputError(*problems)
    return [[None if score is None else float(score) for score in row] for row in matrix]


def _all_known(values: Iterable[float | None]) -> list[float]:
    """The values, or none of them if one is missing."""
    listed = list(values)
    known = [value for value in listed if value is not None]
    return known if len(known) == len(listed) else []


def _difference(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right
