"""How long a run's passes will take, from their operations and the rate of this machine's matrix products."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from llava_cl.config import AnyTask, RunConfig, TaskConfig
from llava_cl.methods import Methods
from llava_cl.pipeline.activations import Step, TaskSize, batch_size, try_batch
from llava_cl.pipeline.measuring import TIMES, measured_statistics
from llava_cl.pipeline.samples import Samples
from llava_cl.pipeline.task_data import evaluation_files, read_questions

_RATE_SECONDS = 0.5


def predict_seconds(
    config: RunConfig, samples: Samples, sizes: Sequence[TaskSize], *, ranks: int, device: torch.device
) -> dict[Step, float] | None:
    """Seconds of the forward and backward passes of all stages, at the rate of this machine's matrix products.

    Without reading data, loading models, decompositions and generated tokens beyond the first. None if the number of a
    task's samples is not known.
    """
    counts = [size.samples for size in sizes]
    if None in counts:
        return None
    stages, seconds = config.benchmark.tasks, dict[Step, float]()
    middle = sorted(size.middle for size in sizes)[len(sizes) // 2]
    methods = Methods(config.method)
    passes = sum(bool(measured_statistics(methods, when)) for when in TIMES)
    questions = sum(_questions(config, task) for task in config.benchmark.evaluated)
    work: dict[Step, float] = {
        "measure": passes * config.measurement.ratio * sum(count or 0 for count in counts),
        "train": sum(config.epochs(task.name) * (count or 0) for task, count in zip(stages, counts, strict=True)),
        "evaluate": (len(stages) + config.evaluation.zero_shot) * questions,
    }
    for step, done in work.items():
        if done:
            batch = batch_size(config, step, ranks)
            flops = try_batch(config, samples, step, middle, ranks=ranks, device=device).flops
            seconds[step] = flops / batch * done / matmul_rate(device, config.model.dtype_in(step)) / ranks
    return seconds


def _questions(config: RunConfig, task: AnyTask) -> int:
    """Of a task, 0 if that is not known."""
    if isinstance(task, TaskConfig) and (config.data_root / evaluation_files(task, config.evaluation)[0]).is_file():
        return len(read_questions(config, task))
    return task.records.get(config.evaluation.split, 0)


def matmul_rate(device: torch.device, dtype: str, size: int | None = None) -> float:
    """Operations per second of a square matrix product, the best of half a second of them."""
    size = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < _RATE_SECONDS:
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
