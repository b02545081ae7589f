"""Requests to stop: how the command takes SIGINT, SIGTERM and SIGHUP, and how the ranks of its job learn of them.

The command notes the first signal and leaves a file in the run directory, which also ranks on other nodes see. In
training a rank then goes on to the end of its optimizer step, so that a resume point can be written; in every other
step it ends at once, because what is complete is stored already. Processes that read data for a rank end with it.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import multiprocessing
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOPPED_CODE = 75
"""Exit code of a rank that a request ended at once."""

_POLL_SECONDS = 0.5
_COMMAND_SECONDS = 5.0
"""How often a rank looks whether its command is still there."""
_FILE_SECONDS = 5.0
"""How long after a signal to a rank its command may take to leave the file, where both got it."""


def heeded() -> list[signal.Signals]:
    """The signals that ask this process to stop: those that it was started to ignore, as under nohup, do not."""
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def outlive_signals(_number: int) -> None:
    """Lets a process that reads data for a rank end with the rank, and by no signal that asks for a stop.

    A cluster signals all processes at once, and the rank needs the data of the step that it finishes. The argument is
    the process's number, as a DataLoader gives it.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    watched = (multiprocessing.parent_process(), os.getppid())
    threading.Thread(target=_end_with, args=watched, name="end-with-rank", daemon=True).start()


def _end_with(rank: Any, above: int) -> None:
    # A fork server, which lives as long as its children do, may stand between the two.
    while rank.is_alive() and os.getppid() == above:
        rank.join(_POLL_SECONDS)
    os._exit(0)


@atexit.register
def _end_readers() -> None:
    """Before Python waits for those that are left, having asked them with SIGTERM."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


class Stopped(BaseException):
    """A request has ended the run; no `Exception`, so that nothing takes it for a failure it can handle.

    Args:
        number: the signal.
        place: where the run was and what is kept, for the message.
    """

    def __init__(self, number: int = signal.SIGTERM, place: str = "") -> None:
        self.number = number
        self.place = place
        super().__init__(f"stopped by {signal.Signals(number).name}{place}")

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it."""
        return 128 + self.number


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Inside the block signals raise `Stopped`."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Stopped(number)

    with _handled(stop):
        yield


@contextlib.contextmanager
def noting(tell: Callable[[], None]) -> Iterator[list[int]]:
    """Inside the block the first signal is put into the list, and told of at once; a second one raises `Stopped`."""
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise Stopped(number)
        tell()

    with _handled(note):
        yield received


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handlers inside the block."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number in heeded()}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class StopRequest:
    """Whether the run of this rank has been asked to stop. Of itself it never is; see `listen`."""

    def __init__(self) -> None:
        self.asked = False
        self._deferred = False

    def defer(self) -> None:
        """From now on a request is only noted: what is going on looks at `asked` and ends by itself."""
        self._deferred = True

    def release(self) -> None:
        """From now on a request ends the process at once, and so does one that was noted."""
        self._deferred = False
        if self.asked:
            os._exit(STOPPED_CODE)

    def listen(self, file: Path, before_end: Callable[[], None], command: Callable[[], str | None] | None) -> None:
        """Takes requests: by the file, or by a signal with which the file comes; any other signal ends the process.

        The end of the command does so, too.

        A thread does so, because a rank that waits for others in a collective cannot. Call it in the main thread.

        Args:
            file: see `llava_cl.pipeline.launch.stop_file`.
            before_end: called before a signal without the file ends the process.
            command: tells which command is there, None where that cannot be known; looked at if there is one from the
                start on. None for a rank that ends with its command anyway.
        """
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        # Written to by the C handler of a signal, also while the main thread runs no Python.
        signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        for number in heeded():
            signal.signal(number, lambda *_: None)
        keep = (receiver, sender, file, before_end, command)
        threading.Thread(target=self._wait, args=keep, name="stop-request", daemon=True).start()
        # Processes that read data are born with the signals blocked, and so are those that bring them forth. Python
        # before 3.14 lifts the block where it starts the resource tracker.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        if multiprocessing.get_start_method() != "fork":
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def _wait(
        self,
        receiver: socket.socket,
        _sender: socket.socket,
        file: Path,
        before_end: Callable[[], None],
        command: Callable[[], str | None] | None,
    ) -> None:
        # Where a file system's locks do not reach other nodes, the command seems not to be there from the start.
        own = command() if command is not None else None
        next_look = time.monotonic() + _COMMAND_SECONDS if own else math.inf
        while True:
            if command is not None and time.monotonic() > next_look:
                if command() not in (own, None):
                    logger.error("the command that started this rank has gone")
                    os._exit(STOPPED_CODE)
                next_look = time.monotonic() + _COMMAND_SECONDS
            ready = select.select([receiver], [], [], _POLL_SECONDS)[0]
            numbers = [number for number in receiver.recv(64) if number in SIGNALS] if ready else []
            # A cluster and the launcher may both pass one signal on: once asked, more of them say nothing new.
            if numbers and not self.asked and not _appears(file):
                try:
                    before_end()
                finally:
                    os._exit(128 + numbers[0])
            if not self.asked and file.exists():
                self.asked = True
                if not self._deferred:
                    os._exit(STOPPED_CODE)


def _appears(file: Path) -> bool:
    end = time.monotonic() + _FILE_SECONDS
    while not file.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
