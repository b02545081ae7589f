"""What all committed stages say together: the accuracy matrix, the metrics, seconds, memory and basis sizes."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llava_cl.config import RunConfig
from llava_cl.evaluation.metrics import class_incremental, summarize
from llava_cl.store import RunDirectory, StageDirectory, load_tensors_metadata, read_json, write_json, write_text

Scores = dict[str, dict[str, Any]]
"""Of a stage, by task; without the credits of every question, which would be read again at every stage."""


def write_results(config: RunConfig, run: RunDirectory) -> dict[str, Any]:
    """Rewrites `metrics.json` and `accuracy_matrix.csv` from the stages committed so far; returns the metrics."""
    metrics = config_results(config, [stage for stage in (run.stage(0), *run.stages()) if stage.committed])
    write_json(run.metrics, metrics)
    write_text(run.matrix, matrix_csv(metrics))
    return metrics


def config_results(config: RunConfig, committed: Sequence[StageDirectory]) -> dict[str, Any]:
    """The metrics of some committed stages of a configuration's stream."""
    tasks, probes = ([task.name for task in part] for part in (config.benchmark.tasks, config.benchmark.probes))
    return collect_results(committed, tasks, probes, seen=config.benchmark.evaluate == "seen")


def collect_results(
    committed: Sequence[StageDirectory], tasks: list[str], probes: list[str], *, seen: bool
) -> dict[str, Any]:
    """The metrics of some committed stages, from their records and files.

    Args:
        committed: the stages.
        tasks, probes: names of the stream's tasks and probes.
        seen: whether classes of all tasks seen so far compete.
    """
    done = [stage for stage in committed if stage.stage]
    scored = {stage.stage: stage.facts("score") for stage in committed}
    scores: dict[int, Scores] = {stage: facts["scores"] for stage, facts in scored.items() if facts is not None}
    matrix = [_row(scores[stage.stage], tasks, "score") for stage in done]
    strict = [_row(scores[stage.stage], tasks, "strict_score") for stage in done]
    return {
        "format": 1,
        "tasks": tasks,
        "matrix": matrix,
        "strict_matrix": strict if any(value is not None for row in strict for value in row) else None,
        "base_row": _row(scores[0], tasks, "score") if 0 in scores else None,
        "probes": {
            "names": probes,
            "rows": [_row(scores.get(stage.stage, {}), probes, "score") for stage in committed],
        },
        "majority": _majority(scores.values()),
        "summary": _summary(scores[done[-1].stage], done, matrix, seen=seen) if done else None,
        "stages": [_stage_facts(stage) for stage in committed],
    }


def _summary(
    scores: Scores, done: list[StageDirectory], matrix: list[list[float | None]], *, seen: bool
) -> dict[str, float | None]:
    square = [row[: len(done)] for row in matrix]
    summary = summarize(square)
    if seen:
        classes = class_incremental(square, [scores[stage.task]["items"] for stage in done])
        summary |= {"LastAll": classes.last, "AAA": classes.average}
    return summary


def _row(scores: Scores, tasks: list[str], key: str) -> list[float | None]:
    return [scores[task][key] if task in scores else None for task in tasks]


def _majority(stages: Iterable[Scores]) -> dict[str, float | None]:
    return {task: score["majority"] for scores in stages for task, score in scores.items()}


def _stage_facts(stage: StageDirectory) -> dict[str, Any]:
    return {
        "stage": stage.stage,
        "task": stage.task,
        "basis": load_tensors_metadata(stage.subspace)["layers"],
        **read_json(stage.timings),
    }


def matrix_csv(metrics: Mapping[str, Any]) -> str:
    """The accuracy matrix of some metrics as `accuracy_matrix.csv` has it."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["after stage", *metrics["tasks"]])
    for name, row in zip(metrics["tasks"], metrics["matrix"], strict=False):
        writer.writerow([name, *("" if value is None else f"{value:.2f}" for value in row)])
    return stream.getvalue()
