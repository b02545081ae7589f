"""A rank ends with its command, wherever that was, as long as the file system's locks tell of it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava_cl.errors import InputError
from llava_cl.stopping import STOPPED_CODE
from llava_cl.store import RunDirectory

RANK = """
import sys, time
from pathlib import Path
from llava_cl.stopping import StopRequest
from llava_cl.store import RunDirectory
run = Path(sys.argv[1])
stop = StopRequest()
stop.defer()
stop.listen(run / "stop", before_end=print, command=RunDirectory(run, ()).holder)
print("listening", flush=True)
time.sleep(60)
"""


@contextlib.contextmanager
def _rank(run: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", RANK, str(run)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "listening\n"
        time.sleep(0.5)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_rank_whose_command_has_gone_ends(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", ())
    with contextlib.ExitStack() as command:
        command.enter_context(run.locked())
        assert run.holder()
        with _rank(run.path) as rank:
            with pytest.raises(subprocess.TimeoutExpired):
                rank.wait(7)
            command.close()
            assert run.holder() == ""
            assert rank.wait(10) == STOPPED_CODE


def test_a_rank_does_not_go_on_under_the_next_command(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", ())
    with contextlib.ExitStack() as first:
        first.enter_context(run.locked())
        with _rank(run.path) as rank:
            with pytest.raises(InputError), run.locked():
                pass  # a second command, which is refused, changes nothing
            with pytest.raises(subprocess.TimeoutExpired):
                rank.wait(7)
            first.close()
            with run.locked():
                assert rank.wait(10) == STOPPED_CODE


def test_a_rank_whose_command_it_could_never_see_goes_on(tmp_path: Path) -> None:
    """As on a file system whose locks do not reach other nodes."""
    run = RunDirectory(tmp_path / "run", ())
    with run.locked():
        pass
    assert run.holder() == ""
    with _rank(run.path) as rank, pytest.raises(subprocess.TimeoutExpired):
        rank.wait(8)
