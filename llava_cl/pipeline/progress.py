"""Progress events that rank 0 of a job writes and the orchestrator shows."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from llava_cl.store import append_jsonl

_SECONDS_BETWEEN_EVENTS = 0.3


@dataclass(frozen=True)
class Event:
    """One line of the progress file."""

    stage: int
    step: str
    done: int
    total: int


class ProgressWriter:
    """Appends events to a file, a few a second at the most; does nothing without a file."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._last = 0.0

    def step(self, stage: int, step: str) -> Callable[[int, int], None]:
        """Announces a step and returns the function that reports how far it is; its first report is where it begins."""
        self._write(Event(stage, step, 0, 0))
        begun = False

        def report(done: int, total: int) -> None:
            nonlocal begun
            if not begun or done >= total or time.monotonic() - self._last > _SECONDS_BETWEEN_EVENTS:
                self._write(Event(stage, step, done, total))
            begun = True

        return report

    def _write(self, event: Event) -> None:
        self._last = time.monotonic()
        if self._file is not None:
            append_jsonl(self._file, asdict(event))


class ProgressReader:
    """Reads the events that were added since the last call."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._offset = 0

    def new_events(self) -> list[Event]:
        """The complete new lines, as events."""
        if not self._file.is_file():
            return []
        with self._file.open("rb") as stream:
            stream.seek(self._offset)
            block = stream.read()
        complete = block[: block.rfind(b"\n") + 1]
        self._offset += len(complete)
        events = []
        for line in complete.splitlines():
            with contextlib.suppress(ValueError, TypeError):  # it only shows, and the next one tells as much
                events.append(Event(**json.loads(line)))
        return events
