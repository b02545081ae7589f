"""Several watchers of one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_cl.pipeline.orchestrator import Watcher
from llava_cl.pipeline.progress import Event


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
