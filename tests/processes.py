"""Helpers for tests that start processes: which there are, and waiting for them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path


def wait_for(condition: Callable[[], object], seconds: float = 300) -> None:
    """Waits until `condition()` holds; the limit is only there so that a failing test ends."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def processes_of(run: Path) -> list[int]:
    """Ids of all processes that have the run directory on their command line."""
    found = []
    for pid in _all():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(run).encode() in command and pid != os.getpid():
            found.append(pid)
    return found


def family_of(pid: int) -> list[int]:
    """A process and all that it started, directly or not."""
    parents = {child: _parent(child) for child in _all()}
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found


def gone(pids: Iterable[int]) -> bool:
    """Whether none of them runs any more; what nobody has asked for its exit code does not run."""
    return all(_state(pid) in ("", "Z") for pid in pids)


def _all() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _fields(pid: int) -> list[str]:
    """State, parent and so on, which follow the name."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _state(pid: int) -> str:
    return (_fields(pid) or [""])[0]


def _parent(pid: int) -> int:
    return int((_fields(pid) or ["", "0"])[1])
