"""One stage: its steps in order, each skipped where its record is valid, then the commit."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llava_cl.config import DistributedConfig, RunConfig
from llava_cl.distributed import World, barrier, be_deterministic
from llava_cl.pipeline import steps
from llava_cl.pipeline.job import Job, largest
from llava_cl.pipeline.progress import ProgressWriter
from llava_cl.store import RunDirectory, write_json

logger = logging.getLogger(__name__)

_LEARNING = {
    "initialise": steps.initialise,
    "train": steps.learn,
    "protect": steps.protect,
}
_EVALUATION = {"evaluate": steps.evaluate, "score": steps.score}


def run_stage(job: Job, stage: int) -> None:
    """Runs what is left of a stage on all ranks and commits it.

    Args:
        job: the job of this process.
        stage: 0 = the untouched base (its basis, and zero-shot evaluation where configured), 1..T = a task.
    """
    directory = job.stage(stage)
    todo = _LEARNING if stage else {"protect": steps.protect_base}
    if stage or (job.config.evaluation.zero_shot and job.config.benchmark.evaluated_after(0)):
        todo = {**todo, **_EVALUATION}
    if job.world.is_main:
        directory.clear_leftovers()
    for name, step in todo.items():
        if job.decide(job.world.is_main and directory.step_done(name)):
            continue
        logger.info("stage %d (%s): %s", stage, directory.task, name)
        files = step(job, stage)
        cost = job.take_cost()
        if job.world.is_main:
            directory.record_step(name, files, **cost)
            if name == "train":
                shutil.rmtree(directory.checkpoints, ignore_errors=True)
        barrier(job.world)
        # A request that came after the last step of training.
        job.stop.release()
    if job.world.is_main:
        facts = directory.step_facts()
        seconds: dict[str, float] = {}
        for fact in facts:
            for part, value in fact["seconds"].items():
                seconds[part] = round(seconds.get(part, 0.0) + value, 3)
        memory = max(fact["peak_memory_bytes"] for fact in facts)
        loads = sum(fact["loads"] for fact in facts)
        timings: dict[str, Any] = {"seconds": seconds, "peak_memory_bytes": memory, "loads": loads}
        timings["step_memory_bytes"] = largest(fact["step_memory_bytes"] for fact in facts)
        for fact in facts:
            if "trained" in fact:
                rates = {f"{what}_per_second": n / fact["seconds"]["train"] for what, n in fact["trained"].items()}
                timings["training"] = {name: round(rate, 2) for name, rate in rates.items()}
        write_json(directory.timings, timings)
        directory.commit()
    barrier(job.world)


def answer_questions(job: Job, stage: int, tasks: Sequence[str]) -> None:
    """Answers the questions of some tasks with the model after a trained stage, on all ranks."""
    if job.world.is_main:
        job.stage(stage).clear_leftovers()
    barrier(job.world)
    steps.answer(job, stage, [task for task in job.config.benchmark.evaluated if task.name in tasks])


def stage_runner(config: RunConfig) -> Callable[[RunDirectory, int], None]:
    """A function that runs a stage in this process, alone and without DeepSpeed: for debugging and benchmarks.

    In fp32 its results are those of any other number of ranks.
    """
    alone = config.model_copy(update={"distributed": DistributedConfig()})
    if config.deterministic:
        be_deterministic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def run(directory: RunDirectory, stage: int) -> None:
        run_stage(Job(alone, directory, World(0, 1, device), ProgressWriter(None)), stage)

    return run
