"""What a stage of a long stream costs, part by part: a synthetic stream of 50 stages at small sizes, without a model.

    python scripts/bench/stream_growth.py --output runs/bench_growth
    python scripts/bench/stream_growth.py --sizes

Each stage t stores an adapter and new columns of the basis for each of the layers, as a run does, then times what a
stage does with what lies there: the bases of t stages read, the method's maths over them, the weights put together
from t adapters, a stage's files stored and committed, results and report rewritten, and the check of all stages that a
run started again begins with. Beside them the published code's way from stage to stage, a merged copy written and read.
`--sizes` prints the megabytes on disk for LLaVA-1.5-7B instead.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llava_cl.config import LoraConfig, RunConfig, load_config
from llava_cl.pipeline.bases import load_bases
from llava_cl.pipeline.results import write_results
from llava_cl.report import write_report
from llava_cl.store import RunDirectory, save_tensors, write_json
from llava_cl.subspace import expand_basis, residual_directions
from llava_cl.training.adapters import replay, save_adapter

ROOT = Path(__file__).parents[2]
LAYERS, WIDTH, RANK, REPEATS = 8, 512, 8, 3
FIRST, ADDED = 128, 4
"""Columns of the basis before the first stage, and those that a stage adds."""
QUESTIONS = 200


def seconds(part: Callable[[], Any]) -> float:
    """Median over a few calls."""
    taken = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        part()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


class Stream:
    """The run directory of a synthetic stream, and the model that its adapters fit."""

    def __init__(self, folder: Path, stages: int) -> None:
        self.config = _config(folder, stages)
        self.run = RunDirectory(folder / "run", [task.name for task in self.config.benchmark.tasks])
        self.generator = torch.Generator().manual_seed(0)
        self.model: Any = nn.Module()
        self.model.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        self.names = [f"layers.{number}" for number in range(LAYERS)]
        identity = {"format": 1, "identity": {}, "base": {"path": "", "sha256": ""}, "data": {}}
        named = {"tasks": [task.name for task in self.config.benchmark.tasks], "probes": [], "name": "growth"}
        extra = {"benchmark": "growth", "method": "keeplora", "seed": 0, "ranks": 1, "environment": {}}
        content = {**identity, **named, **extra, "started": "2000-01-01", "config": self.config.model_dump(mode="json")}
        self.run.record(content)
        self.store(0)

    def _drawn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator) / WIDTH**0.5

    def store(self, stage: int) -> None:
        """Writes and commits a stage's files."""
        directory = self.run.stage(stage)
        bases = load_bases(self.run, stage - 1, self.names) if stage else {}
        new, sizes = {}, {}
        for name in self.names:
            columns = self._drawn(WIDTH, ADDED if stage else FIRST)
            if name in bases:
                columns = columns - bases[name] @ (bases[name].T @ columns)
            new[name] = torch.linalg.qr(columns).Q
            before = bases[name].shape[1] if name in bases else 0
            sizes[name] = {"columns": before + new[name].shape[1], "added": new[name].shape[1], "of": WIDTH}
            sizes[name]["energy"] = 0.5
        save_tensors(directory.subspace, new, {"layers": sizes})
        files = [directory.subspace]
        if stage:
            tensors = {}
            for name in self.names:
                tensors[f"base_model.model.{name}.lora_A.weight"] = self._drawn(RANK, WIDTH)
                tensors[f"base_model.model.{name}.lora_B.weight"] = self._drawn(WIDTH, RANK)
            files += save_adapter(directory.adapter, tensors, self.names, LoraConfig(rank=RANK, alpha=16), None)
        credits = {str(question): float(question % 3 > 0) for question in range(QUESTIONS)}
        score = {"scorer": "exact", "majority": 10.0, "score": 66.5, "strict_score": None, "items": QUESTIONS}
        tasks = [task.name for task in self.config.benchmark.tasks]
        content = {task: {**score, "metrics": {}, "credits": credits} for task in tasks}
        write_json(directory.scores, {"scores": content})
        write_json(directory.timings, {"seconds": {"train": 1.0}, "peak_memory_bytes": 1, "loads": 1})
        facts = {"seconds": {}, "step_memory_bytes": {}, "peak_memory_bytes": 1, "loads": 1}
        directory.record_step("train", files, **facts)
        summary = {task: {**score, "metrics": {}} for task in tasks}
        directory.record_step("score", [directory.scores], **facts, scores=summary)
        directory.commit()

    def protect(self, bases: dict[str, torch.Tensor]) -> None:
        """The maths of one stage."""
        for name in self.names:
            gradient = self._drawn(WIDTH, WIDTH)
            residual_directions(gradient, bases[name], RANK)
            expand_basis(bases[name], self._drawn(WIDTH, 2 * ADDED), 0.9)

    def verify(self, last: int) -> None:
        """What a run that is started again begins with."""
        self.run.verified(last)


def _config(folder: Path, stages: int) -> RunConfig:
    task = {"test": "UCIT/Fashion/test.json", "train": "UCIT/Fashion/train.json", "images": "UCIT/datasets"}
    tasks = [{"name": f"T{number:02d}", **task, "scorer": "exact"} for number in range(1, stages + 1)]
    playground = ROOT / "configs" / "runs" / "playground_ucit_keeplora.yaml"
    content = {"extends": str(playground), "name": "growth", "benchmark": {"name": "growth", "tasks": tasks}}
    content["benchmark"]["probes"] = []
    (folder / "run.yaml").write_text(json.dumps(content))
    return load_config(folder / "run.yaml")


def measure(folder: Path, stages: int) -> list[dict[str, Any]]:
    """One row for each stage."""
    stream = Stream(folder, stages)
    merged = folder / "merged.safetensors"
    rows = []
    print(f"{'stage':>5}{'columns':>9}" + "".join(f"{part:>10}" for part in PARTS) + "  (milliseconds)")
    for stage in range(1, stages + 1):
        bases = load_bases(stream.run, stage - 1, stream.names)
        adapters = [stream.run.stage(number).adapter for number in range(1, stage + 1)]
        weights = {name: value.detach() for name, value in stream.model.named_parameters()}
        row: dict[str, Any] = {"stage": stage, "columns": bases[stream.names[0]].shape[1]}
        row["bases"] = seconds(lambda stage=stage: load_bases(stream.run, stage - 1, stream.names))
        row["maths"] = seconds(lambda bases=bases: stream.protect(bases))
        row["store"] = seconds(lambda stage=stage: stream.store(stage)) - row["bases"]
        row["weights"] = seconds(lambda adapters=adapters: replay(stream.model, adapters))
        row["results"] = seconds(lambda: write_results(stream.config, stream.run))
        row["report"] = seconds(lambda: write_report(stream.run.path))
        row["resume"] = seconds(lambda stage=stage: stream.verify(stage))
        row["merged"] = seconds(lambda weights=weights: (save_file(weights, merged), load_file(merged)))
        rows.append(row)
        if stage == 1 or stage % 10 == 0:
            values = "".join(f"{1000 * row[part]:>10.1f}" for part in PARTS)
            print(f"{stage:>5}{row['columns']:>9}{values}", flush=True)
    return rows


PARTS = ("bases", "maths", "store", "weights", "results", "report", "resume", "merged")


def sizes() -> dict[str, float]:
    """Megabytes on disk for LLaVA-1.5-7B: 32 blocks of 4096 and 11008, rank 32, its projector beside."""
    width, hidden, blocks, rank = 4096, 11008, 32, 32
    shapes = [(width, width)] * 4 + [(hidden, width)] * 2 + [(width, hidden)]
    adapter = 4 * blocks * sum(rank * (rows + columns) for rows, columns in shapes)
    projector = 4 * (1024 * width + width + width * width + width)
    column = 4 * blocks * sum(columns for _, columns in shapes)
    tower, embeddings = 303_507_456, 2 * 32_064 * width
    merged = 2 * (blocks * sum(rows * columns for rows, columns in shapes) + tower + embeddings) + projector // 2
    found = {"adapter": adapter, "projector": projector, "basis, a column in each layer": column, "merged copy": merged}
    return {name: value / 1e6 for name, value in found.items()}


def main() -> None:
    """Runs the stream, prints the table and writes the JSON; or prints the sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a folder, emptied first")
    parser.add_argument("--stages", type=int, default=50)
    parser.add_argument("--sizes", action="store_true", help="print megabytes for LLaVA-1.5-7B")
    arguments = parser.parse_args()
    if arguments.sizes:
        for name, megabytes in sizes().items():
            print(f"{name:<32}{megabytes:>10.1f} MB")
        return
    if arguments.output is None:
        parser.error("give --output or --sizes")
    folder = arguments.output.resolve()
    shutil.rmtree(folder / "run", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    rows = measure(folder, arguments.stages)
    setting = {"layers": LAYERS, "width": WIDTH, "rank": RANK, "first": FIRST, "added": ADDED, "questions": QUESTIONS}
    (folder / "stream_growth.json").write_text(json.dumps({**setting, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
