"""Differences between two runs on the same test questions, with bootstrap confidence intervals."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
_AT_ONCE = 500


class Difference(NamedTuple):
    """A mean difference and the ends of its confidence interval, in points."""

    mean: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def paired_difference(ours: Mapping[str, float], theirs: Mapping[str, float]) -> Difference | None:
    """Mean of (ours - theirs) over the questions of one task, times 100, with a percentile bootstrap interval.

    Questions are drawn with replacement, both runs' answers to a question together (Efron and Tibshirani, An
    Introduction to the Bootstrap, 1993, chapter 13).

    Args:
        ours: question id -> points, 0 to 1.
        theirs: the same of the run that is compared with.

    Returns:
        None where the questions are not the same.
    """
    return mean_difference({"": (ours, theirs)})


def mean_difference(tasks: Mapping[str, tuple[Mapping[str, float], Mapping[str, float]]]) -> Difference | None:
    """The mean over tasks of what `paired_difference` measures, each task's questions drawn by themselves.

    Args:
        tasks: task -> (ours, theirs).

    Returns:
        None where there is no task, or the questions of one are not the same.
    """
    if not tasks or any(not ours or ours.keys() != theirs.keys() for ours, theirs in tasks.values()):
        return None
    means = np.zeros(len(tasks))
    drawn = np.zeros(RESAMPLES)
    for number, (task, (ours, theirs)) in enumerate(tasks.items()):
        differences = 100 * np.array([ours[id_] - theirs[id_] for id_ in ours])
        means[number] = differences.mean()
        drawn += _resampled_means(differences, task) / len(tasks)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Difference(float(means.mean()), float(low), float(high))


def _resampled_means(values: np.ndarray, name: str) -> np.ndarray:
    """`RESAMPLES` means of resamples of the values; how often each distinct value is drawn is multinomial."""
    distinct, counts = np.unique(values, return_counts=True)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    generator = np.random.default_rng(seed)
    shares = counts / len(values)
    parts = [generator.multinomial(len(values), shares, size=_AT_ONCE) @ distinct for _ in range(RESAMPLES // _AT_ONCE)]
    return np.concatenate(parts) / len(values)
