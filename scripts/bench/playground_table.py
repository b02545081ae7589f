"""The README's table: every method on both playground streams, learning rates chosen on the validation split.

    python scripts/bench/playground_table.py --output runs/table --jobs 2

First each method learns the stream's first three tasks with every learning rate of its grid and is scored on the
validation split; the rate with the best mean final accuracy is kept. Then it runs the whole stream with that rate
and three other seeds, scored on the test split. Runs are ordinary run directories, each in one process with one
thread: what is there already is used again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parents[2]
STREAMS = ("ucit", "dcl")
GRIDS = {
    "sequential": (2e-4, 5e-4, 1e-3, 2e-3),
    "ablation_random_frozen": (1e-3, 2e-3, 5e-3),
    "ablation_unprotected": (2e-4, 5e-4, 1e-3, 2e-3),
    "keeplora": (1e-3, 2e-3, 5e-3),
    "keeplora_feature": (1e-3, 2e-3, 5e-3, 1e-2),
}
METRICS = ("MFT", "MFN", "MAA", "BWT", "Retention")
SELECTION_SEED = 100
SELECTION_TASKS = 3


@dataclass(frozen=True)
class Job:
    """One run."""

    stream: str
    method: str
    learning_rate: float
    seed: int
    split: str

    def folder(self, output: Path) -> Path:
        """Its run directory."""
        return output / self.split / f"{self.stream}-{self.method}-lr{self.learning_rate:g}-seed{self.seed}"


def run(job: Job, output: Path) -> dict[str, float]:
    """Runs one stream and returns its metrics in percent."""
    import torch

    from llava_cl.config import load_config
    from llava_cl.logging import setup_logging
    from llava_cl.pipeline.orchestrator import Launch, execute
    from llava_cl.pipeline.stage import stage_runner

    torch.set_num_threads(1)
    setup_logging(level=30)
    overrides = [
        f"seed={job.seed}",
        f"training.learning_rate={job.learning_rate}",
        "training.micro_batch=16",
        "distributed.ranks=1",
        f"evaluation.split={job.split}",
        "evaluation.zero_shot=false",
    ]
    config = load_config(ROOT / f"configs/runs/playground_{job.stream}_{job.method}.yaml", overrides)
    if job.split == "validation":
        first = {"tasks": config.benchmark.tasks[:SELECTION_TASKS], "probes": ()}
        config = config.model_copy(update={"benchmark": config.benchmark.model_copy(update=first)})
    launch = Launch(job.folder(output))
    metrics = execute(config, launch, _Quiet(), after_stage=lambda run: None, run_stage=stage_runner(config))
    summary = {name: metrics["summary"][name] for name in METRICS if name in metrics["summary"]}
    return summary if not config.benchmark.probes else {**summary, "Retention": metrics["probes"]["rows"][-1][0]}


class _Quiet:
    def checking(self, what: str) -> None: ...
    def stage_begins(self, stage: int, task: str, total: int) -> None: ...
    def event(self, event: object) -> None: ...
    def stage_ends(self, stage: int, metrics: dict[str, object]) -> None: ...


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def main() -> None:
    """Chooses the learning rates, runs the seeds, prints the tables and writes them as JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/table"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument("--streams", nargs="+", default=list(STREAMS), choices=list(STREAMS))
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    pairs = [(stream, method) for stream in arguments.streams for method in arguments.methods]
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:

        def run_all(jobs: list[Job]) -> dict[Job, dict[str, float]]:
            results = pool.map(run, jobs, [arguments.output] * len(jobs))
            done = {}
            for job, result in zip(jobs, results, strict=True):
                print(job, {name: round(value, 1) for name, value in result.items()}, flush=True)
                done[job] = result
            return done

        search = run_all(
            [
                Job(stream, method, rate, SELECTION_SEED, "validation")
                for stream, method in pairs
                for rate in GRIDS[method]
            ]
        )
        chosen = {
            pair: max(
                (job for job in search if (job.stream, job.method) == pair), key=lambda job: search[job]["MFN"]
            ).learning_rate
            for pair in pairs
        }
        final = run_all(
            [
                Job(stream, method, chosen[stream, method], seed, "test")
                for stream, method in pairs
                for seed in arguments.seeds
            ]
        )
    tables = []
    for stream in arguments.streams:
        lines = [f"| {stream} | learning rate | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 2) + "|"]
        for method in arguments.methods:
            results = [result for job, result in final.items() if (job.stream, job.method) == (stream, method)]
            cells = [_spread([result[name] for result in results]) for name in METRICS]
            lines.append(f"| {method} | {chosen[stream, method]:g} | " + " | ".join(cells) + " |")
        tables.append("\n".join(lines))
    text = "\n\n".join(tables) + "\n"
    (arguments.output / "table.md").write_text(text)
    rows = [{**vars(job), **result} for job, result in {**search, **final}.items()]
    (arguments.output / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
