"""The progress of a run: a live bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from llava_cl.pipeline.orchestrator import Watcher
from llava_cl.pipeline.progress import Event
from llava_cl.report.console import console_table, summary_table
from llava_cl.report.time_left import TimeLeft
from llava_cl.terminal import say

_SECONDS_BETWEEN_LINES = 60


class LiveDisplay(Watcher):
    """Shows stage, step, how far it is and the time that is left; use it as a context manager.

    Args:
        console: where to print; a live bar if it is a terminal, else a line for each step and every minute.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._total = 0
        self._task = self._step = ""
        self._begin = self._stage_begin = self._line = time.monotonic()
        self._time_left = TimeLeft({})
        self._progress = Progress(
            SpinnerColumn("line"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._bar = self._progress.add_task("starting", total=None, amount="", left="")

    def __enter__(self) -> LiveDisplay:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def checking(self, what: str) -> None:
        self._show(f"checking {what}")

    def note(self, text: str) -> None:
        say(self._console, f"note: {text}", "yellow")

    def plans(self, passes: Mapping[int, Mapping[str, float]]) -> None:
        self._time_left = TimeLeft(passes)

    def stage_begins(self, stage: int, task: str, total: int) -> None:
        self._time_left.stage_begins(stage)
        self._task, self._total, self._step = task, total, ""
        self._stage_begin = time.monotonic()
        self._show(f"stage {stage}/{total} {task}: starting ranks")

    def event(self, event: Event) -> None:
        self._time_left.event(event)
        label = f"stage {event.stage}/{self._total} {self._task}: {event.step}"
        if event.step != self._step:
            self._step = event.step
            self._show(label)
        amount = f"{event.done}/{event.total}" if event.total else ""
        left = self._left()
        if not self._console.is_terminal and time.monotonic() - self._line > _SECONDS_BETWEEN_LINES:
            self._show(f"{label} " + ", ".join(filter(None, (amount, left))))
        self._progress.update(
            self._bar, description=label, total=event.total or None, completed=event.done, amount=amount, left=left
        )

    def stage_ends(self, stage: int, metrics: dict[str, Any]) -> None:
        seconds = time.monotonic() - self._stage_begin
        self._time_left.stage_ends()
        run = self._time_left.left().get("run")
        left = f", about {_clock(run)} left" if run else ""
        row = (metrics["matrix"][stage - 1] if stage else metrics["base_row"]) or []
        scores = ", ".join(
            f"{name} {value:.1f}" for name, value in zip(metrics["tasks"], row, strict=False) if value is not None
        )
        say(self._console, f"stage {stage}/{self._total} {self._task} done in {_clock(seconds)}{left}. {scores}")

    def finished(self, metrics: dict[str, Any]) -> None:
        """The run is over: prints the accuracy matrix and the metrics."""
        self._progress.stop()
        self._console.print(console_table(metrics))
        self._console.print(summary_table(metrics))

    def _left(self) -> str:
        known = self._time_left.left()
        return ", ".join(f"{name} {_clock(seconds)}" for name, seconds in known.items()) + (" left" if known else "")

    def _show(self, label: str) -> None:
        if self._console.is_terminal:
            self._progress.update(self._bar, description=label, total=None, completed=0, amount="", left=self._left())
        else:
            self._line = time.monotonic()
            say(self._console, f"[{_clock(self._line - self._begin)}] {label}")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
