"""What is measured at which point of a stage, and on which samples."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from llava_cl.config import RunConfig
from llava_cl.data import measurement_indices
from llava_cl.distributed import local_share
from llava_cl.methods import Methods
from llava_cl.models import LinearTarget
from llava_cl.pipeline.job import Job
from llava_cl.stopping import outlive_signals
from llava_cl.subspace import Sketch
from llava_cl.training.statistics import Statistics, measure, save_memory
from llava_cl.training.sums import GRADIENT, MEAN_INPUT, SECOND_MOMENT, Sum, planned_sums

logger = logging.getLogger(__name__)

When = Literal["before", "after"]
TIMES: tuple[When, When] = ("before", "after")
PARTS: dict[When, str] = {"before": "measure", "after": "remeasure"}
"""What measuring before and after training is called in progress and timings."""


def sums_to_measure(config: RunConfig, targets: Mapping[str, LinearTarget], when: When) -> list[Sum]:
    """The sums over samples that the method's statistics need before or after a stage's training."""
    return planned_sums(targets, measured_statistics(Methods(config.method), when), _sketch_columns(config, when))


def measure_task(job: Job, model: PreTrainedModel, stage: int, when: When, owners: Mapping[str, int]) -> Statistics:
    """Measures over the evenly spaced share of the task's samples that the configuration states."""
    wanted = measured_statistics(job.methods, when)
    if not wanted:
        return Statistics()
    task, settings = job.config.task(stage), job.config.measurement
    job.samples.choose(model, stage)
    dataset, lengths, ids, _ = job.samples.measured(task)
    indices = measurement_indices(len(lengths), settings.ratio)
    indices = sorted(indices, key=lambda index: (abs(lengths[index]), index))
    batches = [indices[start : start + settings.batch_size] for start in range(0, len(indices), settings.batch_size)]
    # The longest first, so that too little memory shows at once.
    batches = local_share(batches, job.world)[::-1]
    if job.config.training.gradient_checkpointing is True:
        save_memory(model)
    targets = job.targets(model)
    columns, sketch = _sketch_columns(job.config, when), None
    if columns:
        rows, features = (max(sizes) for sizes in zip(*(t.module.weight.shape for t in targets.values()), strict=True))
        sketch = Sketch.draw(columns, rows, features, torch.Generator().manual_seed(job.seed(stage, "sketch")))
    report = job.progress.step(stage, PARTS[when])
    total = sum(len(batch) for batch in batches)
    report(0, total)
    with job.timed(PARTS[when]):
        statistics = measure(
            model,
            DataLoader(
                dataset,
                batch_sampler=batches,
                collate_fn=job.samples.collate,
                num_workers=job.config.training.workers,
                generator=torch.Generator(),  # its own, as it draws a seed at every pass
                worker_init_fn=outlive_signals,
            ),
            targets,
            wanted=wanted,
            owners=owners,
            world=job.world,
            entries=job.family.entries(model),
            token_mask=job.family.token_mask,
            place=settings.sums,
            sketch=sketch,
            progress=lambda done: report(done, total),
            ids=ids,
        )
    if statistics.skipped:
        logger.warning("%s: %d samples without a supervised token were left out", task.name, statistics.skipped)
    return statistics


def measured_statistics(methods: Methods, when: When) -> frozenset[str]:
    """Of what the method wants, that which comes from samples; a running moment needs the task's own at its end."""
    wanted = methods.wanted(when)
    wanted = wanted | ({SECOND_MOMENT} if when == "after" and "past_moment" in wanted else set())
    return wanted & {GRADIENT, SECOND_MOMENT, MEAN_INPUT}


def _sketch_columns(config: RunConfig, when: When) -> int | None:
    """A sketch gives the few directions in which a stage starts, but not the share of all energy that it protects."""
    return config.measurement.sketch if when == "before" else None
