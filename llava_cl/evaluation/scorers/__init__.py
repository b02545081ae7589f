"""Scorers of the benchmarks' tasks, by the name of their rule; they know no task."""

from llava_cl.evaluation.scorers.registry import SCORERS, Scorer, ScoreResult, reference_problems, score

__all__ = ["SCORERS", "ScoreResult", "Scorer", "reference_problems", "score"]
