"""The README's tables: methods on the playground's streams, learning rates chosen on the validation split.

    python scripts/bench/playground_table.py --output runs/table --jobs 2

First each method learns the stream's first three tasks with every learning rate of its grid and is scored on the
validation split; the rate with the best mean final accuracy is kept. A grid of one rate is not searched: on the vision
streams all methods share the published rate, that of SplitLoRA's experiments and of KeepLoRA's. Then a method runs the
whole stream with its rate and three other seeds, scored on the test split; one of them is the default of a run file, so
that the README's own command gives a run of the table. In a second table of a stream whose rates were searched every
method also runs at the rates chosen for plain LoRA and for KeepLoRA. "zero_shot" is the untouched model, "heads_alone"
trains the heads and leaves the adapters as they start. Runs are ordinary run directories, each in one process with one
thread: what is there already is used again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parents[2]
_INSTRUCTIONS = {
    "sequential": (2e-4, 5e-4, 1e-3, 2e-3),
    "ablation_random_frozen": (1e-3, 2e-3, 5e-3),
    "ablation_unprotected": (2e-4, 5e-4, 1e-3, 2e-3),
    "keeplora": (2e-4, 5e-4, 1e-3, 2e-3, 5e-3),
    "keeplora_paper": (2e-4, 5e-4, 1e-3, 2e-3, 5e-3),
    "keeplora_feature": (1e-3, 2e-3, 5e-3, 1e-2),
}
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "ucit": _INSTRUCTIONS,
    "dcl": _INSTRUCTIONS,
    "cil": {
        "heads_alone": (1e-9,),
        "sequential": (1e-3,),
        "olora": (1e-3,),
        "inflora": (1e-3,),
        "splitlora": (1e-3,),
        "splitlora_gradient": (1e-3,),
        "keeplora": (1e-3,),
    },
    "mtil": {
        "zero_shot": (),
        "sequential": (1e-3,),
        "keeplora": (1e-3,),
        "keeplora_mean_feature": (1e-3,),
        "keeplora_published": (1e-3,),
        "keeplora_plus": (1e-3,),
    },
}
METRICS = {
    "ucit": ("MFT", "MFN", "MAA", "BWT", "Retention"),
    "dcl": ("MFT", "MFN", "MAA", "BWT", "Retention"),
    "cil": ("LastAll", "AAA", "Forgetting"),
    "mtil": ("Transfer", "Average", "Last"),
}
ZERO_SHOT = "zero_shot"
CONFIGS = {ZERO_SHOT: "keeplora", "heads_alone": "sequential"}
"""The run files of rows that are no methods."""
EQUAL = ("sequential", "keeplora")
"""Every method also runs at the rates chosen for these."""
SEEDS = (42, 1, 2)
"""The first is that of a run file that names none."""
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
    from llava_cl.pipeline.orchestrator import Launch, Watcher, execute
    from llava_cl.pipeline.stage import stage_runner

    torch.set_num_threads(1)
    setup_logging(level=30)
    overrides = [
        f"seed={job.seed}",
        f"training.learning_rate={job.learning_rate}",
        "training.micro_batch=16",
        "distributed.ranks=1",
        f"evaluation.split={job.split}",
        f"evaluation.zero_shot={str(job.method == ZERO_SHOT).lower()}",
    ]
    method = CONFIGS.get(job.method, job.method)
    config = load_config(ROOT / f"configs/runs/playground_{job.stream}_{method}.yaml", overrides)
    if job.split == "validation":
        first = {"tasks": config.benchmark.tasks[:SELECTION_TASKS], "probes": ()}
        config = config.model_copy(update={"benchmark": config.benchmark.model_copy(update=first)})
    launch = Launch(job.folder(output), until=0 if job.method == ZERO_SHOT else None)
    metrics = execute(config, launch, Watcher(), after_stage=lambda run: None, run_stage=stage_runner(config))
    if job.method == ZERO_SHOT:
        # Without learning, Transfer is the mean over the tasks that it is taken of: all but the first.
        row = metrics["base_row"]
        return {**dict.fromkeys(METRICS[job.stream], statistics.mean(row)), "Transfer": statistics.mean(row[1:])}
    summary = {name: metrics["summary"][name] for name in ("MFN", *METRICS[job.stream]) if name in metrics["summary"]}
    return summary if not config.benchmark.probes else {**summary, "Retention": metrics["probes"]["rows"][-1][0]}


Pair = tuple[str, str]
"""Stream and method."""


def searched(pair: Pair) -> bool:
    """Whether a method's rate on a stream is chosen among several."""
    return len(GRIDS[pair[0]][pair[1]]) > 1


def equal_rates(stream: str, chosen: dict[Pair, float]) -> list[float]:
    """The rates of a stream at which all its methods are compared."""
    return sorted(
        {chosen[stream, method] for method in EQUAL if (stream, method) in chosen if searched((stream, method))}
    )


def final_jobs(chosen: dict[Pair, float], seeds: Sequence[int]) -> list[Job]:
    """The runs of the tables, each once: every method at its own rate, and at those of `equal_rates`."""
    jobs = [
        Job(*pair, rate, seed, "test")
        for pair, own in chosen.items()
        for rate in (own, *(equal_rates(pair[0], chosen) if searched(pair) else ()))
        for seed in (seeds if pair[1] != ZERO_SHOT else seeds[:1])
    ]
    return list(dict.fromkeys(jobs))


def tables(chosen: dict[Pair, float], results: dict[Job, dict[str, float]]) -> str:
    """Markdown: of each stream the methods at their own rates, then at equal ones."""
    parts = []
    for stream in dict.fromkeys(stream for stream, _ in chosen):
        own = [(method, rate) for (of, method), rate in chosen.items() if of == stream]
        parts.append(_table(stream, stream, own, results))
        rates = equal_rates(stream, chosen)
        equal = [(method, rate) for rate in rates for method, _ in own if searched((stream, method))]
        if equal:
            parts.append(_table(stream, f"{stream}, equal rates", equal, results))
    return "\n\n".join(parts) + "\n"


def _table(stream: str, title: str, rows: list[tuple[str, float]], results: dict[Job, dict[str, float]]) -> str:
    names = METRICS[stream]
    lines = [f"| {title} | learning rate | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for method, rate in rows:
        wanted = (stream, method, rate, "test")
        found = [r for job, r in results.items() if (job.stream, job.method, job.learning_rate, job.split) == wanted]
        cells = [_spread([result[name] for result in found]) for name in names]
        lines.append(f"| {method} | {f'{rate:g}' if method not in CONFIGS else ''} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def main() -> None:
    """Chooses the learning rates, runs the seeds, prints the tables and writes them as JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/table"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--methods", nargs="+", help="default: all of a stream's")
    parser.add_argument("--streams", nargs="+", default=list(GRIDS), choices=list(GRIDS))
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    pairs = [
        (stream, method)
        for stream in arguments.streams
        for method in GRIDS[stream]
        if arguments.methods is None or method in arguments.methods
    ]
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
                if searched((stream, method))
                for rate in GRIDS[stream][method]
            ]
        )
        chosen = {
            pair: max(
                (job for job in search if (job.stream, job.method) == pair),
                key=lambda job: search[job]["MFN"],
                default=Job(*pair, learning_rate=(*GRIDS[pair[0]][pair[1]], 1e-3)[0], seed=0, split="test"),
            ).learning_rate
            for pair in pairs
        }
        final = run_all(final_jobs(chosen, arguments.seeds))
    text = tables(chosen, final)
    (arguments.output / "table.md").write_text(text)
    rows = [{**vars(job), **result} for job, result in {**search, **final}.items()]
    (arguments.output / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
