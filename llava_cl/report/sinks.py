"""Where curves can be written beside the report: TensorBoard and Weights & Biases."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

from llava_cl.errors import InputError
from llava_cl.report.load import RunRecord

logger = logging.getLogger(__name__)

GROUPS = {
    "step": ("loss", "learning_rate", "grad_norm"),
    "stage": ("accuracy", "probe", "metric", "basis", "seconds", "memory"),
}
"""What the curves' names begin with, by the axis that they are over."""


class Sink(Protocol):
    """A place for curves."""

    name: str

    def log(self, values: Mapping[str, float], axis: str, at: int) -> None:
        """Adds one point to each curve, at `at` of the axis ("step" of a training, or "stage")."""

    def flush(self) -> None:
        """Returns when all that was logged is kept."""

    def close(self) -> None:
        """Nothing follows."""


class TensorBoard:
    """Event files in `tensorboard/` of the run directory, for `tensorboard --logdir`."""

    name = "tensorboard"

    def __init__(self, record: RunRecord) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(record.directory / "tensorboard"))

    def log(self, values: Mapping[str, float], axis: str, at: int) -> None:
        """Adds a scalar for each value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, at)

    def flush(self) -> None:
        """Writes to the event file."""
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases in the project `llava_cl`; its own environment variables and log-in apply."""

    name = "wandb"

    def __init__(self, record: RunRecord) -> None:
        import wandb

        identifier = f"{record.directory}/{record.run.started.isoformat()}"
        try:
            self._run = wandb.init(
                project="llava_cl",
                name=record.run.name,
                id=hashlib.sha256(identifier.encode()).hexdigest()[:16],
                resume="allow",
                dir=str(record.directory),
                config=record.run.config,
            )
        except wandb.Error as error:
            advice = "log in with `wandb login`, set WANDB_MODE=offline, or leave it out of report_to"
            raise InputError(f"report_to: wandb does not start ({error}); {advice}.") from error
        for axis, groups in GROUPS.items():
            for group in groups:
                self._run.define_metric(f"{group}/*", step_metric=axis)

    def log(self, values: Mapping[str, float], axis: str, at: int) -> None:
        """Logs the values with their place on the axis."""
        self._run.log({**values, axis: at})

    def flush(self) -> None:
        """The library sends by itself."""

    def close(self) -> None:
        """Waits until all is sent."""
        self._run.finish()


SINKS: dict[str, type[TensorBoard] | type[WandB]] = {"tensorboard": TensorBoard, "wandb": WandB}


def chosen_sinks(report_to: Sequence[str] | None) -> list[str]:
    """The sinks that a configuration asks for; TensorBoard, where its package is there, if it says nothing.

    Raises:
        InputError: a package is not installed.
    """
    missing = [name for name in (report_to or ()) if importlib.util.find_spec(name) is None]
    if missing:
        advice = "install it with pip, or leave it out"
        raise InputError(*(f"report_to: the package {name} is not installed; {advice}." for name in missing))
    if report_to is not None:
        return list(dict.fromkeys(report_to))
    if importlib.util.find_spec("tensorboard") is None:
        logger.info("tensorboard is not installed, so no event files are written; report_to: [] says that it is meant")
        return []
    return ["tensorboard"]
