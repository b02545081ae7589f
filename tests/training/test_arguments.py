"""The Trainer's arguments for a stage: rounded steps of the warm-up, the stage's seed, and when autocast is on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from llava_cl.config import TrainingConfig
from llava_cl.training.trainer import TrainingPlan, training_arguments


def _arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {"warmup_ratio": 0.0, "steps": 10, "bf16": True, **changes}
    training = TrainingConfig(
        learning_rate=1e-3, global_batch=8, micro_batch=4, warmup_ratio=settings.pop("warmup_ratio")
    )
    plan = TrainingPlan(epochs=2, learning_rate=3e-4, seed=2**31 - 7)
    return training_arguments(
        training,
        plan,
        folder=folder,
        micro_batch=2,
        accumulation=4,
        device=torch.device("cpu"),
        deepspeed=None,
        **settings,
    )


@pytest.mark.parametrize(("ratio", "steps", "warmup"), [(0.03, 101, 4), (0.03, 100, 3), (0.03, 1, 1), (0.0, 50, 0)])
def test_a_warm_up_takes_a_whole_step_for_each_part_of_one(
    tmp_path: Path, ratio: float, steps: int, warmup: int
) -> None:
    assert _arguments(tmp_path, warmup_ratio=ratio, steps=steps).warmup_steps == warmup


def test_what_is_drawn_in_training_is_drawn_from_the_stages_seed(tmp_path: Path) -> None:
    """Of dropout, in whose way no other seed may come."""
    arguments = _arguments(tmp_path)
    assert arguments.seed == 2**31 - 7
    assert arguments.data_seed is None


def test_without_deepspeed_nothing_is_cast(tmp_path: Path) -> None:
    """The model is bfloat16 itself, and its adapters are fp32 on purpose."""
    arguments = _arguments(tmp_path, bf16=True)
    assert not arguments.bf16 and not arguments.fp16
