"""Curves of a run beside its report, in TensorBoard and Weights & Biases: the training as it goes, and the results."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from llava_cl.config import RunConfig
from llava_cl.errors import InputError
from llava_cl.evaluation.metrics import mean
from llava_cl.pipeline.orchestrator import Watcher
from llava_cl.pipeline.progress import Event
from llava_cl.report.load import RunRecord, StageRecord, load_run
from llava_cl.report.schema import Metrics, first_probed
from llava_cl.report.watchers import Noted
from llava_cl.store import write_json

logger = logging.getLogger(__name__)
_PLACES = TypeAdapter(dict[str, tuple[int, int]])

SECONDS = 10
"""Between two looks at the training under way."""


GROUPS = {
    "step": ("loss", "learning_rate", "grad_norm"),
    "stage": ("accuracy", "probe", "metric", "basis", "seconds", "memory"),
}
"""What the curves' names begin with, by the axis that they are over."""


class TensorBoard:
    """Event files in `tensorboard/` of the run directory, for `tensorboard --logdir`."""

    def __init__(self, record: RunRecord) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(record.directory / "tensorboard"))

    def log(self, values: Mapping[str, float], axis: str, at: int) -> None:
        """Adds one point to each curve, at `at` of the axis ("step" of a training, or "stage")."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, at)

    def flush(self) -> None:
        """Returns when all that was logged is kept."""
        self._writer.flush()

    def close(self) -> None:
        """Nothing follows."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases in the project `llava_cl`, as `TensorBoard`; its own environment variables and log-in
    apply.
    """

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
        self._run.log({**values, axis: at})

    def flush(self) -> None:
        """The library sends by itself."""

    def close(self) -> None:
        self._run.finish()


Sink = TensorBoard | WandB
SINKS: dict[str, type[Sink]] = {"tensorboard": TensorBoard, "wandb": WandB}


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


class Tracking(Watcher):
    """Writes a run's curves while it goes; a watcher of the run, and a context manager.

    How far each sink is, is kept in `logs/tracked.json`, so that a run that is continued goes on from there.

    Args:
        config: the run's configuration.
        run_dir: the run directory.
        note: told what keeps curves from being written.

    Raises:
        InputError: a package that the configuration asks for is not installed.
    """

    def __init__(self, config: RunConfig, run_dir: Path, note: Callable[[str], object] = logger.warning) -> None:
        self._noted = Noted(note)
        self._run_dir = run_dir
        self._sinks: dict[str, Sink | None] = dict.fromkeys(chosen_sinks(config.report_to))
        self._next = 0.0

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, *_: object) -> None:
        for sink in self._sinks.values():
            if sink is not None:
                with self._noted.failing("curves are incomplete"):
                    sink.close()

    def stage_begins(self, stage: int, task: str, total: int) -> None:
        """Opens what curves are written to, so that a setting that is wrong is told before anything is spent."""
        self.update(InputError)

    def event(self, event: Event) -> None:
        if event.step == "train" and time.monotonic() >= self._next:
            self.update()
            self._next = time.monotonic() + SECONDS

    def update(self, *fatal: type[Exception]) -> None:
        """Logs what is new: steps of trainings, and results of stages. Only errors that are `fatal` are raised."""
        for name in self._sinks:
            with self._noted.failing("curves are incomplete", *fatal):
                record = load_run(self._run_dir)
                sink = self._sinks[name] = self._sinks[name] or SINKS[name](record)
                places = self._places()
                place = _log_new(record, sink, *places.get(name, (0, 0)))
                sink.flush()
                if place != places.get(name, (0, 0)):
                    write_json(self._file, {**places, name: place})

    @property
    def _file(self) -> Path:
        return self._run_dir / "logs" / "tracked.json"

    def _places(self) -> dict[str, tuple[int, int]]:
        """How far each sink is: stage and step."""
        try:
            return _PLACES.validate_json(self._file.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValidationError):
            self._noted.tell(f"{self._file}: cannot be read; curves are written again from their beginning")
            return {}


def _log_new(record: RunRecord, sink: Sink, stage: int, step: int) -> tuple[int, int]:
    """Logs what comes after a step of a stage; returns the new place."""
    if stage > record.done + 1:  # stages were set aside, and are done again
        stage, step = record.done + 1, 0
    while stage in record.stages:
        now = record.stages[stage]
        for at, line in now.log.items():
            if at > step:
                step = at
                values = {"loss": line.loss, "learning_rate": line.learning_rate, "grad_norm": line.grad_norm}
                known = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
                sink.log({f"{name}/{now.folder.name}": value for name, value in known.items()}, "step", step)
        # A run that was killed before it wrote a stage's results writes them with those of the next.
        if not now.committed or stage > len(record.metrics.matrix):
            break
        sink.log(_results(record.metrics, now), "stage", stage)
        stage, step = stage + 1, 0
    return stage, step


def _results(metrics: Metrics, stage: StageRecord) -> dict[str, float]:
    """What a stage has led to."""
    number = stage.number
    row = metrics.matrix[number - 1] if number else metrics.base_row or []
    values = {f"accuracy/{task}": value for task, value in zip(metrics.tasks, row, strict=bool(row))}
    if number:
        values["metric/seen so far"] = mean(row[:number])
    first = first_probed(metrics)
    if number >= first and metrics.probes.rows:
        probed = metrics.probes.rows[number - first]
        values |= {f"probe/{name}": value for name, value in zip(metrics.probes.names, probed, strict=True)}
    if number == len(metrics.matrix):
        values |= {f"metric/{name}": value for name, value in (metrics.summary or {}).items()}
    cost = next((cost for cost in metrics.stages if cost.stage == number), None)
    if cost is not None:
        values["basis/rank"] = mean(layer.fill for layer in cost.basis.values())
        values["basis/energy"] = mean(layer.energy for layer in cost.basis.values())
        values |= {f"seconds/{name}": seconds for name, seconds in cost.seconds.items()}
        if cost.peak_memory_bytes is not None:
            values["memory/peak_GiB"] = cost.peak_memory_bytes / 2**30
    return {name: value for name, value in values.items() if value is not None}
