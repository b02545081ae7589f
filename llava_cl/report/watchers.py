"""Several watchers of one run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from llava_cl.pipeline.orchestrator import Watcher


class Noted:
    """Tells, once for each text, what could not be shown of a run: pages and curves only show, and must not end it."""

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
        def all_told(name: str) -> Callable[..., None]:
            def tell(*what: object) -> None:
                for watcher in watchers:
                    getattr(watcher, name)(*what)

            return tell

        for name in vars(Watcher):
            if not name.startswith("_"):
                setattr(self, name, all_told(name))
