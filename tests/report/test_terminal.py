"""What is printed is shown as it is: no text steers the terminal, and no console is too poor or too closed for it."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from report_runs import write_run
from rich.progress import Progress, TextColumn
from rich.table import Table

from llava_cl import cli
from llava_cl.logging import setup_logging
from llava_cl.terminal import Terminal, printable, say

HOSTILE = "a[/red]:cat:\x1b[31m\x1b]0;title\x07\r\x9b\u202e\u2066\u200f\ufeff\u2028\udcff"
SHOWN = r"a[/red]:cat:\x1b[31m\x1b]0;title\x07\r\x9b\u202e\u2066\u200f\ufeff\u2028\udcff"
FINE = "Grün, 日本\u3000語, نام\u200cها, 👩\u200d🔬, 1\u00a0%\n\tend"


@pytest.mark.parametrize(("text", "shown"), [(HOSTILE, SHOWN), (FINE, FINE), ("", "")])
def test_what_has_no_shape_is_shown_as_an_escape(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize("terminal", [False, True])
def test_texts_of_every_kind_pass_a_terminal_as_they_are(terminal: bool) -> None:
    stream = io.StringIO()
    console = Terminal(file=stream, force_terminal=terminal, color_system=None, width=400)
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    console.print(table)
    say(console, HOSTILE)
    with Progress(TextColumn("{task.description}", markup=False), console=console) as progress:
        progress.add_task(HOSTILE)
    shown = stream.getvalue()
    assert shown.count(SHOWN) == 4
    assert shown.count(r"a[/red]:cat:\x1b[31m") > 4  # a bar is cut to the width that it counted
    assert not set(shown) & set("\x07\x9b\u202e\u2066\u200f\ufeff\u2028\udcff")
    assert "\x1b]" not in shown and "\x1b[31m" not in shown


def test_a_log_line_is_plain(capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogger().handlers[:], logging.getLogger().level
    try:
        setup_logging()
        logging.getLogger("x").warning("id %s", HOSTILE)
    finally:
        logging.getLogger().handlers[:], level = before
        logging.getLogger().setLevel(level)
    assert capsys.readouterr().err.endswith(f"id {SHOWN}\n")


def _main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, bytes, bytes]:
    """Exit code, standard output and standard error of the command line, whose console knows ASCII alone."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="ascii") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr(sys, "argv", ["llava-cl", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    told = []
    for stream in streams.values():
        stream.flush()
        told.append(stream.buffer.getvalue())  # type: ignore[attr-defined]
    return int(end.value.code or 0), told[0], told[1]


def _named(folder: Path, name: str) -> Path:
    """The run of a folder under a name that no configuration may have."""
    manifest = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**manifest, "name": name}))
    return folder


def test_a_hostile_folder_and_name_pass_an_ascii_console(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_cl.report.page.verified", lambda record: record)
    run = _named(write_run(tmp_path / ("日本" + HOSTILE.replace("/", "|")), 2), HOSTILE[:-1])
    code, out, err = _main(monkeypatch, "report", str(run))
    assert (code, err) == (0, b"")
    assert (r"\u65e5\u672c" + SHOWN.replace("/", "|")).encode() in out
    page = (run / "report" / "index.html").read_text()
    assert SHOWN[: SHOWN.index(r"\udcff")] in page
    assert not {letter for letter in page if not letter.isprintable()} - {"\n"}


def test_an_error_names_a_hostile_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = _main(monkeypatch, "report", str(tmp_path / HOSTILE.replace("/", "|")))
    assert code == 2
    assert SHOWN.replace("/", "|").encode() in err


def test_a_link_to_itself_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    code, _, err = _main(monkeypatch, "check", str(loop))
    assert code == 2 and err.startswith(b"error: ") and b"loop" in err


@pytest.mark.parametrize("redirect", ["| exec true", ">&- 2>&- <&-"])
def test_nobody_reads(redirect: str) -> None:
    """The pipe is closed before the command writes: its first import takes longer than `true` does."""
    line = f'set -o pipefail; "$0" -m llava_cl.cli benchmarks {redirect}'
    done = subprocess.run(["bash", "-c", line, sys.executable], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_without_docstrings_the_command_says_why_it_cannot_work() -> None:
    """Without asserts alone it works; transformers cannot be imported without docstrings."""
    codes = {}
    for flag in ("-O", "-OO"):
        done = subprocess.run([sys.executable, flag, "-m", "llava_cl.cli", "methods"], capture_output=True, text=True)
        codes[flag] = done.returncode
        assert ("keeplora: " if flag == "-O" else "transformers reads: use -O") in done.stdout + done.stderr
    assert codes == {"-O": 0, "-OO": 2}
