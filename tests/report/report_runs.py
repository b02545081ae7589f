"""Run directories written by hand, for the tests of the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from llava_cl.evaluation.metrics import summarize
from llava_cl.store import RunDirectory, StageDirectory, save_tensors

TASKS = ["ImageNet-R", "ArxivQA", "VizWiz", "IconQA", "CLEVR-Math", "Flickr30k"]
BASE = [16.27, 53.73, 38.39, 19.2, 20.63, 41.88]
MATRIX = [
    [91.07, 52.43, 38.21, 25.4, 21.9, 42.6],
    [90.53, 93.8, 40.35, 30.77, 22.37, 44.19],
    [90.33, 93.57, 60.31, 31.2, 21.13, 54.02],
    [89.7, 92.93, 57.4, 82.57, 31.67, 53.1],
    [89.47, 92.87, 57.22, 81.03, 69.43, 52.8],
    [89.13, 92.6, 57.5, 80.17, 67.87, 57.7],
]
PROBES = ["captions", "yes or no", "counting", "colours"]
SUMMARY = {
    "Last": 74.16,
    "Average": 62.2,
    "Transfer": 38.89,
    "MFT": 75.81,
    "MFN": 74.16,
    "MAA": 82.91,
    "BWT": -1.98,
    "BWT_T": -1.65,
    "Forgetting": 1.98,
}
KINDS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"]


def write_run(root: Path, done: int, *, name: str = "ucit_keeplora", tasks: list[str] | None = None) -> Path:
    """A run directory with `done` committed stages and, before the last, one more under way."""
    tasks = tasks or TASKS
    run = {
        "format": 1,
        "name": name,
        "started": "2026-03-02T08:15:00+00:00",
        "config": {
            "method": {"name": "keeplora", "rank": 128, "energy": 0.99},
            "data": {"root": "https://example.org/<data>"},
            "layers": ["q", "v"],
        },
        "environment": {"python": "3.11.9", "torch": "2.13.0", "deepspeed": None},
        "base": {"path": "/models/llava-1.5-7b", "sha256": "5f2c" * 16},
        "identity": {},
        "data": {},
        "benchmark": "UCIT",
        "method": "keeplora",
        "tasks": tasks,
        "probes": PROBES,
        "seed": 42,
        "ranks": 8,
    }
    directory = RunDirectory(root, tasks)
    directory.record(run)
    write_json(root / "metrics.json", metrics(done, tasks))
    for stage in (directory.stage(0), *directory.stages()[:done]):
        probed = zip(PROBES, metrics(done)["probes"]["rows"][stage.stage], strict=True)
        found = {name: score(value) for name, value in probed} | scores(stage.stage, tasks)
        if stage.stage:
            write_log(stage.path, 200 * stage.stage)
        write_json(stage.scores, {"scores": scores(stage.stage, tasks)} if stage.stage else {"scores": {}})
        commit(stage, found)
    if 0 < done < len(tasks):
        write_log(directory.stage(done + 1).path, 90)
    return root


def scores(stage: int, tasks: list[str]) -> dict[str, Any]:
    """The scores of a stage, of one question a task."""
    row = MATRIX[stage - 1] if stage else BASE
    return {task: score(row[index], {"CIDEr": 51.2} if index == 2 else {}) for index, task in enumerate(tasks)}


def score(value: float, parts: dict[str, float] | None = None) -> dict[str, Any]:
    """The score of one task."""
    known = {"scorer": "exact", "score": value, "strict_score": None, "items": 3000, "majority": None}
    return {**known, "metrics": parts or {}, "credits": {"q1": 1.0}}


def metrics(done: int, tasks: list[str] | None = None) -> dict[str, Any]:
    """The content of metrics.json after `done` stages."""
    tasks = tasks or TASKS
    return {
        "format": 1,
        "tasks": tasks,
        "matrix": [list(row) for row in MATRIX[:done]],
        "base_row": BASE,
        "strict_matrix": None,
        "probes": {
            "names": PROBES,
            "rows": [[71 - 1.3 * stage, 83 - 0.4 * stage, 48.5 - 2.6 * stage, 66.0] for stage in range(done + 1)],
        },
        "summary": summarize([row[:done] for row in MATRIX[:done]]) if done else None,
        "majority": {task: 12.5 + index for index, task in enumerate(tasks)},
        "stages": [stage_cost(number, tasks[number - 1]) for number in range(1, done + 1)],
    }


def stage_cost(number: int, task: str) -> dict[str, Any]:
    """One entry of `stages` in metrics.json: 32 blocks of four kinds of layer."""
    return {
        "stage": number,
        "task": task,
        "seconds": {"measure": 96.0, "initialise": 41.5, "train": 1840.0 * number, "evaluate": 700.0},
        "peak_memory_bytes": 61 * 2**30 + number * 2**29,
        "basis": {
            f"model.language_model.layers.{block}.{kind}": {
                "columns": min(4096, round((60 + 9 * block + 55 * index) * number**0.8)),
                "added": 20,
                "of": 4096,
                "energy": 0.99,
            }
            for block in range(32)
            for index, kind in enumerate(KINDS)
        },
    }


def write_log(folder: Path, steps: int) -> None:
    """A training log that falls and wobbles."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(
            {
                "step": step,
                "epoch": step / steps,
                "loss": 0.25 + 1.6 * math.exp(-5 * step / steps) + 0.1 * math.sin(step * 1.7) ** 2,
                "learning_rate": 2e-5,
                "grad_norm": 1.0,
            }
        )
        for step in range(1, steps + 1)
    ]
    (folder / "train_log.jsonl").write_text("\n".join(lines) + "\n")


def commit(stage: StageDirectory, scores: dict[str, Any]) -> None:
    """Mark a stage as done, with what its record says of its scores."""
    save_tensors(stage.subspace, {}, {"layers": {}})
    write_json(stage.timings, {"seconds": {}, "peak_memory_bytes": 1})
    stage.record_step("train", [file for file in (stage.train_log, stage.subspace) if file.exists()])
    facts = {task: {name: own for name, own in score.items() if name != "credits"} for task, score in scores.items()}
    stage.record_step("score", [stage.scores], scores=facts)
    stage.commit()


def write_json(path: Path, content: object) -> None:
    """Write JSON, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
