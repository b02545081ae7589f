"""Predicted and measured memory of the steps of a stage, on the playground's model and a CPU.

    python scripts/bench/planning.py --output runs/planning

For each batch size every step of a stage runs in a process of its own: once with two samples at a time, so that all
libraries are loaded and used, then with the batch size. Measured is the largest resident memory of the second time less
what the process held before it. The allocator is told to give back what is freed, as otherwise resident memory tells
what was needed by all that went before.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from llava_cl.config import DistributedConfig, RunConfig, load_config
from llava_cl.distributed import World
from llava_cl.pipeline import steps
from llava_cl.pipeline.activations import task_size
from llava_cl.pipeline.job import Job
from llava_cl.pipeline.planning import predict_memory
from llava_cl.pipeline.progress import ProgressWriter
from llava_cl.store import RunDirectory

ROOT = Path(__file__).parents[2]
RUN = ROOT / "configs" / "runs" / "playground_ucit_keeplora.yaml"
STEPS = {"measure": steps.initialise, "train": steps.learn, "evaluate": steps.evaluate}
NAMES = {"measure": "initialise"}
CPU = torch.device("cpu")
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}


def configured(folder: Path, batch: int) -> RunConfig:
    """The playground's run of one task of 128 samples and questions, with `batch` at a time, without DeepSpeed."""
    sizes = [f"training.{key}={batch}" for key in ("global_batch", "micro_batch")]
    sizes += [f"{key}.batch_size={batch}" for key in ("measurement", "evaluation")]
    config = load_config(RUN, [*sizes, "training.epochs=1", "measurement.ratio=1", f"data_root={folder}"])
    task = config.benchmark.tasks[0].model_copy(update={"train": "train.json", "test": "test.json", "images": "images"})
    benchmark = config.benchmark.model_copy(update={"tasks": (task,), "probes": ()})
    return config.model_copy(update={"benchmark": benchmark, "distributed": DistributedConfig()})


def write_data(folder: Path, count: int) -> None:
    """The first training samples and questions of the playground's first task."""
    source = load_config(RUN)
    task = source.benchmark.tasks[0]
    folder.mkdir(parents=True)
    for name, path in (("train", task.train), ("test", task.test)):
        records = json.loads((source.data_root / str(path)).read_text())[:count]
        (folder / f"{name}.json").write_text(json.dumps(records))
    (folder / "images").symlink_to(source.data_root / task.images)


def resident(key: str) -> int:
    """A line of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def run_step(folder: Path, batch: int, step: str) -> int:
    """Runs one step of the run below `folder`, after those before it have been run; the peak memory in bytes."""
    config = configured(folder, batch)
    run = RunDirectory(folder / f"run-{batch}", [task.name for task in config.benchmark.tasks])
    job = Job(config, run, World(0, 1, CPU), ProgressWriter(None))
    if not run.stage(0).step_done("protect"):
        run.record({"identity": {}, "base": {"sha256": ""}, "data": {}})
        run.stage(0).record_step("protect", steps.protect_base(job, 0))
        run.stage(0).commit()
    run.stage(1).record_step(NAMES.get(step, step), STEPS[step](job, 1))
    return int(job.take_cost()["peak_memory_bytes"])


def measure_step(folder: Path, batch: int, step: str) -> int:
    """Bytes that a step takes at its largest in this process."""
    run_step(folder / "few", 2, step)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    return run_step(folder / "many", batch, step) - before


def main() -> None:
    """Runs every step for every batch size and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="new folder for the runs and the result")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.output.resolve()
    if arguments.step:
        print(measure_step(folder, arguments.batches[0], arguments.step))
        return
    rows = []
    write_data(folder / "few", 4)
    write_data(folder / "many", max(arguments.batches))
    for batch in arguments.batches:
        config = configured(folder / "many", batch)
        job = Job(config, RunDirectory(folder / "none", ["none"]), World(0, 1, CPU), ProgressWriter(None))
        size = task_size(config, job.samples, config.task(1)).longest
        for step, parts in predict_memory(config, job.samples, size, ranks=1, device=CPU).items():
            command = [sys.executable, "-W", "ignore", __file__, "--output", str(folder), "--batches", str(batch)]
            environment = {**os.environ, **ALLOCATOR}
            done = subprocess.run([*command, "--step", step], stdout=-1, check=True, text=True, env=environment)
            measured, predicted = int(done.stdout.split()[-1]), sum(parts.values())
            rows.append({"batch": batch, "step": step, "predicted": predicted, "measured": measured, "parts": parts})
            print(
                f"batch {batch:>4}, {step:<8}: predicted {predicted / 1e6:7.1f} MB, measured {measured / 1e6:7.1f} MB, "
                f"{100 * (predicted / measured - 1):+.0f} %",
                flush=True,
            )
    (folder / "planning.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
