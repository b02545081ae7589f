"""Curves of a run outside its report: the training as it goes, and the results of every stage."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from llava_cl.config import RunConfig
from llava_cl.errors import InputError
from llava_cl.pipeline.orchestrator import Watcher
from llava_cl.pipeline.progress import Event
from llava_cl.report.load import RunRecord, StageRecord, load_run
from llava_cl.report.schema import Metrics, first_probed
from llava_cl.report.sinks import SINKS, Sink, chosen_sinks
from llava_cl.report.text import mean
from llava_cl.report.watchers import Noted
from llava_cl.store import write_json

logger = logging.getLogger(__name__)
_PLACES = TypeAdapter(dict[str, tuple[int, int]])

SECONDS = 10
"""Between two looks at the training under way."""


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
        self._update(InputError)

    def event(self, event: Event) -> None:
        """Logs the training under way, now and then."""
        if event.step == "train" and time.monotonic() >= self._next:
            self.update()
            self._next = time.monotonic() + SECONDS

    def update(self) -> None:
        """Logs what is new: steps of trainings, and results of stages."""
        self._update()

    def _update(self, *fatal: type[Exception]) -> None:
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
    values: dict[str, float | None] = {}
    row = metrics.matrix[number - 1] if number else metrics.base_row or []
    values |= {f"accuracy/{task}": value for task, value in zip(metrics.tasks, row, strict=bool(row))}
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
        layers = list(cost.basis.values())
        values["basis/rank"] = mean([layer.fill for layer in layers])
        values["basis/energy"] = mean([layer.energy for layer in layers])
        values |= {f"seconds/{name}": seconds for name, seconds in cost.seconds.items()}
        if cost.peak_memory_bytes is not None:
            values["memory/peak_GiB"] = cost.peak_memory_bytes / 2**30
    return {name: value for name, value in values.items() if value is not None}
