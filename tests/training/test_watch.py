"""What of a training's log stops it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from llava_cl.data import GlobalBatchSampler
from llava_cl.distributed import World
from llava_cl.errors import RunError
from llava_cl.stopping import StopRequest
from llava_cl.training.watch import TrainingWatch


def _log(folder: Path, rows: list[dict[str, float]]) -> None:
    """Tells the watch of the rows, one optimizer step each."""
    sampler = GlobalBatchSampler([1] * 8, 4, 2, 0, 1, 0)
    world = World(0, 1, torch.device("cpu"))
    watch = TrainingWatch(sampler, print, print, world, StopRequest(), lambda step: f"those of {step}", {})
    arguments = TrainingArguments(str(folder), use_cpu=True)
    state = TrainerState()
    for row in rows:
        state.global_step += 1
        state.log_history.append(row)
        watch.on_log(arguments, state, TrainerControl(), row)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"loss": math.nan}, "the training loss is nan at step 3, on the samples those of 3"),
        ({"loss": math.inf}, "the training loss is inf at step 3"),
        ({"loss": 2.0, "grad_norm": math.inf}, "the norm of the gradient is inf at step 3"),
        ({"loss": 4001.0}, "the training loss has grown from 4 to 4001 at step 3"),
    ],
)
def test_a_step_that_went_wrong(tmp_path: Path, row: dict[str, float], said: str) -> None:
    with pytest.raises(RunError, match=said):
        _log(tmp_path, [{"loss": 4.0}, {"loss": 3.0}, row])


def test_a_spike_is_no_explosion(tmp_path: Path) -> None:
    _log(tmp_path, [{"loss": 0.01, "grad_norm": 0.0}, {"loss": 12.0, "grad_norm": 1e6}, {"train_runtime": 3.0}])
