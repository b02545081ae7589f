"""The page of a run under way: rewritten while a stage goes on, and it reads itself again in the browser."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from llava_cl.pipeline.orchestrator import Watcher
from llava_cl.pipeline.progress import Event
from llava_cl.report.load import load_run
from llava_cl.report.page import render_page
from llava_cl.report.timeline import timeline
from llava_cl.report.watchers import Noted
from llava_cl.stopping import Stopped
from llava_cl.store import write_text

logger = logging.getLogger(__name__)

SECONDS = 20
"""Between two versions of the page; more where it takes long to write."""
MOST_OF_THE_TIME = 0.02
"""That writing the page may take."""


class LivePage(Watcher):
    """Writes `report/index.html` of a run while it goes; a watcher of the run, and a context manager.

    When the block ends, the page is written for the last time, without the request to be read again, and says whether
    the run was stopped or failed.

    Args:
        run_dir: the run directory.
        seconds: between two versions of the page while a stage goes on.
        note: told what keeps a page from being written, and what is wrong with the run's files.
    """

    def __init__(self, run_dir: Path, seconds: float = SECONDS, note: Callable[[str], object] = logger.warning) -> None:
        self._noted = Noted(note)
        self._run_dir = run_dir
        self._seconds = seconds
        self._status = ""
        self._answers: str | None = None
        self._next = 0.0

    def __enter__(self) -> LivePage:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        # What fails before a stage may not be this run's.
        if (failure is None or self._next) and (self._run_dir / "run.json").is_file():
            ended = "" if failure is None else "stopped" if issubclass(failure, Stopped) else "failed"
            self._write(None, ended)

    def stage_begins(self, stage: int, task: str, total: int) -> None:
        self._status = f"stage {stage} starts"
        self._write(SECONDS)

    def event(self, event: Event) -> None:
        self._status = f"{event.step} {event.done} of {event.total}" if event.total else event.step
        if time.monotonic() >= self._next:
            self._write(SECONDS)

    def committed(self) -> None:
        """The results of a stage have been written."""
        self._answers, self._status = None, ""
        self._write(SECONDS)

    def _write(self, refresh: int | None, ended: str = "") -> None:
        begin = time.monotonic()
        with self._noted.failing("the report is not up to date"):
            record = load_run(self._run_dir)
            for problem in record.problems:
                self._noted.tell(problem)
            if self._answers is None:
                self._answers = timeline(record)  # they change with the stages alone, and take the most time
                begin = time.monotonic()
            status = self._status if refresh else ""
            page = render_page(record, answers=self._answers, status=status, ended=ended, refresh=refresh)
            write_text(self._run_dir / "report" / "index.html", page)
        now = time.monotonic()
        self._next = now + max(self._seconds, (now - begin) / MOST_OF_THE_TIME)
