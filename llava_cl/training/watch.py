"""What is watched while a stage trains: losses and gradients, requests to stop, the live log, resume points."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_cl.data import GlobalBatchSampler
from llava_cl.distributed import World, any_rank, barrier
from llava_cl.errors import RunError
from llava_cl.stopping import StopRequest
from llava_cl.store import append_jsonl, resume_points
from llava_cl.store.stage_directory import LIVE_LOG

_EXPLODED = 1000
"""A loss this many times the first one, or this large, has exploded: a token costs 10 where all are equally likely."""


class TrainingWatch(TrainerCallback):
    """Tells the sampler the epoch, reports progress, stops on a bad loss, logs steps, marks resume points.

    Args:
        sampler: told the epoch.
        set_epoch: called with each epoch before its samples are asked for.
        progress: called with steps done and steps in all.
        world: the process group.
        stop: asked after every optimizer step; from the first step on requests are deferred.
        named: step -> the samples that it learns.
        facts: what resume points hold for.
    """

    def __init__(
        self,
        sampler: GlobalBatchSampler,
        set_epoch: Callable[[int], None],
        progress: Callable[[int, int], None],
        world: World,
        stop: StopRequest,
        named: Callable[[int], str],
        facts: Mapping[str, Any],
    ) -> None:
        self._sampler = sampler
        self._set_epoch = set_epoch
        self._progress = progress
        self._world = world
        self._stop = stop
        self._named = named
        self._facts = facts

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._stop.defer()
        self._progress(state.global_step, state.max_steps)

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # Not every transformers 5 does so itself in the epoch in which training is resumed.
        self._sampler.set_epoch(int(state.epoch or 0))
        self._set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._progress(state.global_step, state.max_steps)
        # All ranks stop after the same step; after the last one there is nothing left to stop.
        if state.global_step < state.max_steps and any_rank(self._stop.asked, self._world):
            control.should_save = control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        if "loss" not in logs:
            return
        loss, norm, step = logs["loss"], logs.get("grad_norm", 0.0), state.global_step
        first = next(row["loss"] for row in state.log_history if "loss" in row)
        wrong = ""
        if not math.isfinite(loss):
            wrong = f"the training loss is {loss} at step {step}"
        elif not math.isfinite(norm):
            wrong = f"the norm of the gradient is {norm} at step {step}"
        elif loss > _EXPLODED * max(first, 1.0):
            wrong = f"the training loss has grown from {first:.4g} to {loss:.4g} at step {step}"
        if wrong:
            # Raised before the step's resume point is written.
            raise RunError(f"{wrong}, on the samples {self._named(step)}; look at them, or lower the learning rate.")
        if self._world.is_main:
            assert args.output_dir is not None
            append_jsonl(Path(args.output_dir) / LIVE_LOG, log_row({**logs, "step": state.global_step}))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        barrier(self._world)
        if self._world.is_main:
            assert args.output_dir is not None
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            resume_points.record(folder, self._facts)


def log_row(logs: Mapping[str, float]) -> dict[str, float]:
    """What is kept of the Trainer's log of one optimizer step."""
    keys = ("step", "epoch", "loss", "learning_rate", "grad_norm")
    return {key: logs[key] for key in keys if key in logs}
