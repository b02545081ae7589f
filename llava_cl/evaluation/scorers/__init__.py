"""Scorers of the benchmarks' tasks, by the name of their rule; they know no task."""

from llava_cl.evaluation.scorers.registry import (
    SCORERS,
    Scorer,
    ScoreResult,
    best_constant,
    reference_problems,
    score,
    unearned,
)

__all__ = ["SCORERS", "ScoreResult", "Scorer", "best_constant", "reference_problems", "score", "unearned"]
