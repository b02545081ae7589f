"""Learning rates of torch's schedulers, for the groups of adapters and of what is trained beside them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava_cl.config import TrainingConfig
from llava_cl.training.trainer import StageTrainer

STEPS = 20
RATES = (1e-3, 1e-2)


def _course(
    optimizer: Any, inner: torch.optim.Optimizer, steps: int = STEPS, **training: Any
) -> list[list[tuple[float, float]]]:
    """Learning rate and first beta of both groups in each step."""
    settings = TrainingConfig(learning_rate=RATES[0], global_batch=4, micro_batch=4, **training)
    trainer: Any = SimpleNamespace(_training=settings, optimizer=optimizer, lr_scheduler=None)
    scheduler = StageTrainer.create_scheduler(trainer, steps)
    assert trainer.lr_scheduler is scheduler
    course = []
    for _ in range(steps):
        course.append([(group["lr"], group["betas"][0]) for group in inner.param_groups])
        inner.step()
        scheduler.step()
    return course


def _optimizer() -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": rate} for rate in RATES]
    return torch.optim.AdamW(groups, lr=RATES[0])


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
def test_steps_divide_by_ten_after_each_share_of_the_training(wrapped: bool) -> None:
    inner = _optimizer()
    optimizer = SimpleNamespace(optimizer=inner) if wrapped else inner
    course = _course(optimizer, inner, scheduler="steps", milestones=(0.4, 0.7))
    for group, rate in enumerate(RATES):
        expected = [rate] * 8 + [rate / 10] * 6 + [rate / 100] * 6
        assert [step[group][0] for step in course] == pytest.approx(expected)
        assert {step[group][1] for step in course} == {0.9}


def test_a_milestone_is_the_nearest_step() -> None:
    """0.4 and 0.7 of nine steps are 3.6 and 6.3."""
    inner = _optimizer()
    course = _course(inner, inner, steps=9, scheduler="steps", milestones=(0.4, 0.7))
    assert [step[0][0] / RATES[0] for step in course] == pytest.approx([1] * 4 + [0.1] * 2 + [0.01] * 3)


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
def test_one_cycle_rises_for_three_tenths_and_falls_to_nothing(wrapped: bool) -> None:
    """Cosines from a 25th up to the rate and down to a 10,000th of the start, and beta against it."""
    inner = _optimizer()
    course = _course(SimpleNamespace(optimizer=inner) if wrapped else inner, inner, scheduler="one_cycle")
    top, last = 0.3 * STEPS - 1, STEPS - 1

    def between(start: float, end: float, share: float) -> float:
        return end + (start - end) / 2 * (1 + math.cos(math.pi * share))

    for group, rate in enumerate(RATES):
        for step, values in enumerate(course):
            if step <= top:
                expected = between(rate / 25, rate, step / top), between(0.95, 0.85, step / top)
            else:
                share = (step - top) / (last - top)
                expected = between(rate, rate / 25e4, share), between(0.85, 0.95, share)
            assert values[group] == pytest.approx(expected, rel=1e-9), step
