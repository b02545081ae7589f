"""Signals: who ends by them and who does not; a rank ends with its command, as long as locks tell of it."""

from __future__ import annotations

import ast
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava_cl import stopping
from llava_cl.errors import InputError
from llava_cl.stopping import SIGNALS, STOPPED_CODE
from llava_cl.store import RunDirectory
from processes import gone, wait_for

ENOUGH = 60
"""Seconds after which a test fails that waits for something."""
RANK = """
import os, sys
from pathlib import Path
from llava_cl import stopping
from llava_cl.store import RunDirectory
stopping._POLL_SECONDS = stopping._COMMAND_SECONDS = 0.01
stopping._FILE_SECONDS = float(sys.argv[2])
stop = stopping.StopRequest()
stop.defer()
look = stopping.select.select
def say(word):
    os.write(1, f"{word}\\n".encode())  # in one piece, whoever speaks
def select(*args):
    say("asked" if stop.asked else "looks")
    return look(*args)
stopping.select.select = select
run = Path(sys.argv[1])
stop.listen(run / "stop", lambda: say("is ended"), RunDirectory(run, ()).holder)
say("listens")
sys.stdin.read()
"""
COMMAND = """
import contextlib, sys
from llava_cl import stopping
told = lambda: print("told", flush=True)
with contextlib.ExitStack() as stack:
    noted = stack.enter_context(getattr(stopping, sys.argv[1])(*([told] if sys.argv[1] == "noting" else [])))
    print("listens", flush=True)
    while True:
        sys.stdin.readline()
        print(*noted or [], flush=True)
"""


def ignore_hangups() -> None:
    """As nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@contextlib.contextmanager
def started(*arguments: str, nohup: bool = False) -> Iterator[subprocess.Popen[str]]:
    """A Python process whose input and output are at hand."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(
        [sys.executable, *arguments],
        **pipes,  # type: ignore[call-overload]
        text=True,
        preexec_fn=ignore_hangups if nohup else None,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def says(process: subprocess.Popen[str], word: str) -> None:
    """Reads until the process has said it."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == word:
            return
    raise AssertionError(f"it ended without saying {word!r}")


@contextlib.contextmanager
def rank(run: Path, *, file_seconds: float = ENOUGH, nohup: bool = False) -> Iterator[subprocess.Popen[str]]:
    """A rank that listens."""
    with started("-c", RANK, str(run), str(file_seconds), nohup=nohup) as process:
        says(process, "listens")
        yield process


def goes_on(process: subprocess.Popen[str]) -> None:
    """It looks round again and again."""
    for _ in range(20):
        says(process, "looks")


def test_a_rank_whose_command_has_gone_ends(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", ())
    with contextlib.ExitStack() as command:
        command.enter_context(run.locked())
        assert run.holder()
        with rank(run.path) as process:
            goes_on(process)
            command.close()
            assert run.holder() == ""
            assert process.wait(ENOUGH) == STOPPED_CODE


def test_a_rank_does_not_go_on_under_the_next_command(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", ())
    with contextlib.ExitStack() as first:
        first.enter_context(run.locked())
        with rank(run.path) as process:
            with pytest.raises(InputError), run.locked():
                pass  # a second command, which is refused, changes nothing
            goes_on(process)
            first.close()
            with run.locked():
                assert process.wait(ENOUGH) == STOPPED_CODE


def test_a_rank_whose_command_it_could_never_see_goes_on(tmp_path: Path) -> None:
    """As on a file system whose locks do not reach other nodes."""
    run = RunDirectory(tmp_path / "run", ())
    with run.locked():
        pass
    assert run.holder() == ""
    with rank(run.path) as process:
        goes_on(process)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_rank_unless_its_command_asks_for_the_same(number: signal.Signals, tmp_path: Path) -> None:
    with rank(tmp_path, file_seconds=0) as process:
        process.send_signal(number)
        says(process, "is ended")
        assert process.wait(ENOUGH) == 128 + number
    with rank(tmp_path) as process:
        process.send_signal(number)
        (tmp_path / "stop").touch()
        says(process, "asked")
        process.send_signal(number)  # torchrun passes it on
        for _ in range(5):
            says(process, "asked")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_told_of_at_once_and_a_second_one_ends_the_command(number: signal.Signals) -> None:
    with started("-c", COMMAND, "noting") as process:
        says(process, "listens")
        process.send_signal(number)
        says(process, "told")
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        says(process, str(number.value))
        process.send_signal(number)
        assert process.wait(ENOUGH) == 1  # the traceback of Stopped, which the command line catches
    with started("-c", COMMAND, "raising") as process:
        says(process, "listens")
        process.send_signal(number)
        assert process.wait(ENOUGH) == 1


def test_hangups_that_were_ignored_at_the_start_stay_ignored(tmp_path: Path) -> None:
    with rank(tmp_path, file_seconds=0, nohup=True) as process:
        process.send_signal(signal.SIGHUP)
        goes_on(process)
    with started("-c", COMMAND, "raising", nohup=True) as process:
        says(process, "listens")
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        assert process.wait(ENOUGH) == 1


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_processes_that_read_data_end_with_their_rank_and_by_no_signal(method: str) -> None:
    """`forkserver` is how Python 3.14 starts them."""
    reading = str(Path(__file__).with_name("reading_rank.py"))
    with started(reading, method) as process:
        assert process.stdout is not None and process.stdin is not None
        readers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(readers) == 2
        for pid in readers:
            for number in SIGNALS:
                os.kill(pid, number)
        process.stdin.write("\n")
        process.stdin.flush()
        says(process, "True")
        process.kill()
        wait_for(lambda: gone(readers))


def test_all_data_are_read_by_such_processes() -> None:
    calls = [
        (file.name, {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords})
        for file in Path(stopping.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("DataLoader")
    ]
    assert {name for name, _ in calls} == {"measuring.py", "predict.py", "trainer.py"}
    assert all(options.get("worker_init_fn") == "outlive_signals" for _, options in calls)


def test_a_rank_that_ends_does_not_wait_for_processes_that_still_read() -> None:
    reading = str(Path(__file__).with_name("reading_rank.py"))
    with started(reading, "fork") as process:
        assert process.stdin is not None
        process.stdin.write("\n\n")
        process.stdin.flush()
        assert process.wait(ENOUGH) == 0
