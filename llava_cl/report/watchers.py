"""Several watchers of one run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llava_cl.pipeline.orchestrator import Watcher
from llava_cl.pipeline.progress import Event


class Noted:
    """Tells, once for each text, what could not be shown of a run: pages and curves only show, and must not end it.

    Args:
        note: told.
    """

    def __init__(self, note: Callable[[str], object]) -> None:
        self._note = note
        self._told: set[str] = set()

    def tell(self, text: str) -> None:
        """Tells a text for the first time."""
        if text not in self._told:
            self._told.add(text)
            self._note(text)

    @contextlib.contextmanager
    def failing(self, what: str, *fatal: type[Exception]) -> Iterator[None]:
        """A block whose failure is told and stops nothing, but for errors that are `fatal`."""
        try:
            yield
        except fatal:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a full disk or another library makes of it
            self.tell(f"{what}: {error}")


class Watchers(Watcher):
    """Tells several watchers what it is told, in their order."""

    def __init__(self, *watchers: Watcher) -> None:
        self._watchers = watchers

    def checking(self, what: str) -> None:
        """Something is being checked before the run."""
        for watcher in self._watchers:
            watcher.checking(what)

    def note(self, text: str) -> None:
        """Something that stops nothing."""
        for watcher in self._watchers:
            watcher.note(text)

    def plans(self, passes: Mapping[int, Mapping[str, float]]) -> None:
        """What the stages up to the last one will do."""
        for watcher in self._watchers:
            watcher.plans(passes)

    def stage_begins(self, stage: int, task: str, total: int) -> None:
        """A stage's job is about to start."""
        for watcher in self._watchers:
            watcher.stage_begins(stage, task, total)

    def event(self, event: Event) -> None:
        """A step of the stage got further."""
        for watcher in self._watchers:
            watcher.event(event)

    def stage_ends(self, stage: int, metrics: dict[str, Any]) -> None:
        """A stage has been committed and the results rewritten."""
        for watcher in self._watchers:
            watcher.stage_ends(stage, metrics)
