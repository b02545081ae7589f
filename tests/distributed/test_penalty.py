"""A penalty on the trained A: the same for every number of ranks and of accumulated micro-batches, and it works."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from training_job import DEEPSPEED, Trained, TrainingJob, run_training

from llava_cl.config import validate_config
from llava_cl.errors import InputError
from llava_cl.pipeline.preflight import check_plan
from ranks import run_ranks
from tiny import run_content

pytestmark = pytest.mark.distributed

WEIGHT = 0.02
LAYOUTS = {
    "alone, one micro-batch": (1, None, 8),
    "ddp-2, one micro-batch": (2, None, 4),
    "ddp-2": (2, None, 2),
    "zero1-2": (2, 1, 2),
    "zero2-2": (2, 2, 2),
}


@pytest.fixture(scope="module")
def job(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    """Three steps of 8 samples, the third with 5; alone, four micro-batches of 2 to a step."""
    scratch = tmp_path_factory.mktemp("scratch")
    return TrainingJob(tiny_run, scratch, train_a=True, penalty=WEIGHT, training={"scheduler": "constant"})


def _run(job: TrainingJob, size: int = 1) -> Trained:
    return run_ranks(run_training, size, job, use_deepspeed=job.zero is not None)[0]


@pytest.fixture(scope="module")
def alone(job: TrainingJob) -> Trained:
    return _run(job)


def _trained_a(trained: Trained, layer: str) -> torch.Tensor:
    return trained.tensors[f"base_model.model.{layer}.lora_A.weight"]


def _overlap(job: TrainingJob, trained: Trained, *, start: bool = False) -> float:
    """Sum over the layers of the sizes of all inner products of A's rows with earlier ones, in float64."""
    return sum(
        float(
            (earlier.double().T @ (trained.factors[layer].a if start else _trained_a(trained, layer)).double().T)
            .abs()
            .sum()
        )
        for layer, earlier in job.earlier_rows(trained.factors).items()
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_and_accumulation_change_nothing(job: TrainingJob, alone: Trained, layout: str) -> None:
    size, zero, micro_batch = LAYOUTS[layout]
    training = {**job.training, "micro_batch": micro_batch}
    result = _run(dataclasses.replace(job, zero=zero, training=training), size)
    assert [row["loss"] for row in result.rows] == pytest.approx([row["loss"] for row in alone.rows], rel=1e-5)
    assert result.tensors.keys() == alone.tensors.keys()
    for name, tensor in result.tensors.items():
        assert (tensor - alone.tensors[name]).norm() < 1e-4 * alone.tensors[name].norm(), name


def test_the_loss_of_a_step_is_that_of_the_tokens_and_the_whole_penalty(job: TrainingJob, alone: Trained) -> None:
    """At the first step, before anything has moved."""
    free = _run(dataclasses.replace(job, penalty=None))
    penalty = WEIGHT * _overlap(job, alone, start=True)
    assert penalty > 0.1
    assert alone.rows[0]["loss"] == pytest.approx(free.rows[0]["loss"] + penalty, rel=1e-5)


def test_a_large_penalty_drives_a_from_the_earlier_rows(job: TrainingJob) -> None:
    longer = {**job.training, "epochs": 8, "learning_rate": 1e-2}
    free = _run(dataclasses.replace(job, penalty=None, training=longer))
    held = _run(dataclasses.replace(job, penalty=10.0, training=longer))
    before = _overlap(job, free, start=True)
    assert _overlap(job, held) < 0.3 * before
    assert _overlap(job, free) > 0.7 * before
    unpenalised = next(iter(held.factors))
    assert (_trained_a(held, unpenalised) - held.factors[unpenalised].a).abs().max() > 1e-2


def test_zero3_is_refused_before_anything_is_spent(tiny_run: Path) -> None:
    """It takes A apart, and the penalty needs it whole outside the model."""
    content = {**run_content(tiny_run), "method": {"name": "olora"}}
    for zero in (None, 1, 2, 3):
        content["distributed"] = {"deepspeed": str(DEEPSPEED / f"zero{zero}.json") if zero else None}
        config = validate_config(content, "test")
        if zero != 3:
            check_plan(config, 1)
            continue
        with pytest.raises(InputError, match="ZeRO-3"):
            check_plan(config, 1)
