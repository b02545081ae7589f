"""Run directories whose questions, pictures, answers and scores are all there, written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from report_runs import commit, write_json

from llava_cl.pipeline.results import collect_results
from llava_cl.report.histories import choose, fate
from llava_cl.store import RunDirectory

Answer = Callable[[int, int, int], str]
"""What the model says after a stage to a question of a task (from 0): (stage, task, question) -> text."""


def reference(task: int, question: int) -> str:
    """The right answer."""
    return f"answer {task}.{question}"


def write_answered_run(
    root: Path,
    tasks: Sequence[str],
    questions: int,
    answer: Answer,
    *,
    stages: int | None = None,
    scorer: str = "exact",
    credit: Callable[[str, str], float] = lambda said, right: float(said == right),
    prompt: str = "Which one is it?",
    pictures: int = 8,
    told: int | None = None,
) -> Path:
    """A run of instruction tasks with its data beside it; stages 0..`stages` are committed.

    With `told`, predictions hold the answers alone that a report shows where it shows that many of a task.
    """
    data, run = root / "data", root / "run"
    _write_pictures(data / "images", pictures)
    for number in range(len(tasks)):
        records = [
            {"question_id": f"q{i}", "image": f"{i % pictures}.png", "text": prompt, "answer": reference(number, i)}
            for i in range(questions)
        ]
        write_json(data / f"{number}.json", records)
    done = len(tasks) if stages is None else stages
    entries = [
        {"name": task, "train": "0.json", "test": f"{number}.json", "images": "images", "scorer": scorer}
        for number, task in enumerate(tasks)
    ]
    directory = RunDirectory(run, tasks)
    directory.record(manifest(data, entries))
    every = range(done + 1)
    texts = [[[answer(stage, t, i) for i in range(questions)] for t in range(len(tasks))] for stage in every]
    points = [
        [[credit(text, reference(t, i)) for i, text in enumerate(said)] for t, said in enumerate(by_task)]
        for by_task in texts
    ]
    for number, task in enumerate(tasks):
        shown = (
            range(questions) if told is None else _shown(task, [points[s][number] for s in every[number + 1 :]], told)
        )
        for stage in every:
            rows = [{"question_id": f"q{i}", "prompt": prompt, "text": texts[stage][number][i]} for i in shown]
            write_predictions(_folder(run, stage, tasks) / "predictions" / f"{task}.jsonl", rows)
    matrix = [[100 * sum(credits) / questions for credits in by_task] for by_task in points]
    for stage in every:
        scores = {
            task: {
                "scorer": scorer,
                "score": matrix[stage][number],
                "strict_score": None,
                "majority": None,
                "items": questions,
                "credits": {f"q{i}": value for i, value in enumerate(points[stage][number])},
            }
            for number, task in enumerate(tasks)
        }
        write_json(_folder(run, stage, tasks) / "scores.json", {"scores": scores})
        commit(directory.stage(stage), scores)
    done_stages = [directory.stage(stage) for stage in every]
    write_json(run / "metrics.json", collect_results(done_stages, list(tasks), [], seen=False))
    return run


def manifest(data: Path, tasks: Sequence[dict[str, Any]], **benchmark: Any) -> dict[str, Any]:
    """The content of run.json, its configuration one that can be read again."""
    return {
        "format": 1,
        "name": "answered",
        "started": "2026-03-02T08:15:00+00:00",
        "config": {
            "name": "answered",
            "benchmark": {"name": "made", "tasks": list(tasks), **benchmark},
            "model": {"path": "/nowhere"},
            "method": {"name": "keeplora"},
            "data_root": str(data),
            "lora": {"rank": 8, "alpha": 16},
            "training": {"learning_rate": 1e-3, "global_batch": 8, "micro_batch": 8},
        },
        "environment": {},
        "base": {"path": "/nowhere", "sha256": "00" * 32},
        "identity": {},
        "data": {},
        "benchmark": "made",
        "method": "keeplora",
        "tasks": [task["name"] for task in tasks],
        "probes": [],
        "seed": 1,
        "ranks": 1,
    }


def write_predictions(file: Path, rows: Sequence[dict[str, str]]) -> None:
    """A file of predictions."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _folder(run: Path, stage: int, tasks: Sequence[str]) -> Path:
    return run / "stages" / (f"{stage:02d}-" + (tasks[stage - 1] if stage else "base"))


def _shown(task: str, since: list[list[float]], share: int) -> list[int]:
    fates = {f"q{i}": fate([value >= 0.5 for value in row]) for i, row in enumerate(zip(*since, strict=True))}
    return [int(id_[1:]) for id_ in choose(task, fates, share)]


def _write_pictures(folder: Path, count: int) -> None:
    """Noise, which no encoder makes small."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = np.random.default_rng(0)
    for number in range(count):
        pixels = drawn.integers(0, 256, (300, 400, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
