"""Files and folders of a run that this user may not read or write are one message that names them."""

from __future__ import annotations

import contextlib
import ctypes
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava_cl import cli
from llava_cl.errors import InputError, LlavaClError, RunError
from llava_cl.store import RunDirectory, append_jsonl, file_hash, open_tensors, read_json, save_tensors, write_text
from llava_cl.store.fingerprint import fingerprint_model, fingerprint_pictures


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run with one stage."""
    run = RunDirectory(tmp_path / "run", ["Colour"])
    run.record({"identity": {}, "base": {"sha256": "x"}, "data": {}, "config": {}})
    for stage in (run.stage(0), run.stage(1)):
        write_text(stage.train_log, "")
        save_tensors(stage.subspace, {}, {"layers": {}})
        stage.record_step("train", [stage.train_log, stage.subspace])
        stage.commit()
    return run


class _Capabilities(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


@contextlib.contextmanager
def forbidden(*paths: Path) -> Iterator[None]:
    """As a user who may do nothing with some files or folders: root, too, without the rights to pass over modes."""
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in paths}
    for path in paths:
        path.chmod(0)
    libc, header, now = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (_Capabilities * 2)()
    assert libc.capget(header, now) == 0
    before, now[0].effective = now[0].effective, now[0].effective & ~0b110  # DAC_OVERRIDE, DAC_READ_SEARCH
    assert libc.capset(header, now) == 0
    try:
        yield
    finally:
        now[0].effective = before
        assert libc.capset(header, now) == 0
        for path, mode in modes.items():
            path.chmod(mode)


FILES = [
    "run.json",
    "stages/01-Colour/stage.json",
    "stages/01-Colour/subspace.safetensors",
    "stages/00-base/stage.json",
]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_may_not_be_read_is_named(run: RunDirectory, name: str) -> None:
    refused = pytest.raises(InputError, match=rf"{name}: cannot be read \(Permission denied\)")
    with forbidden(run.path / name), refused:
        run.verified()


@pytest.mark.parametrize("name", [".", "stages", "stages/01-Colour", "stages/01-Colour/steps"])
@pytest.mark.parametrize("command", ["report", "export"])
def test_a_folder_that_may_not_be_looked_into_is_one_message(
    run: RunDirectory, name: str, command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--stage", "1", "--to", str(run.path.parent / "out")] if command == "export" else []
    monkeypatch.setattr(sys, "argv", ["llava-cl", command, str(run.path), *arguments])
    monkeypatch.setattr(cli, "prepare_streams", lambda: None)
    with forbidden(run.path / name), pytest.raises(SystemExit) as ended:
        cli.main()
    said = capfd.readouterr().err
    assert ended.value.code in (1, 2)
    assert said.startswith("error: ")
    assert "Traceback" not in said


def test_what_may_not_be_written_is_named(run: RunDirectory, tmp_path: Path) -> None:
    folder = run.path / "stages"
    refused = r"cannot be written \(Permission denied\)"
    with forbidden(folder), pytest.raises(RunError, match=f"stages/file: {refused}"):
        write_text(folder / "file", "")
    with forbidden(folder), pytest.raises(RunError, match=f"stages/log.jsonl: {refused}"):
        append_jsonl(folder / "log.jsonl", {})
    folder.chmod(0o500)
    with forbidden(), pytest.raises(RunError, match=rf"stages/01-Colour/stage\.json: {refused}|discarded/1: {refused}"):
        run.set_aside(1)
    folder.chmod(0o700)
    run.path.chmod(0o500)
    with forbidden(), pytest.raises(InputError, match=rf"run: {refused}; give another --output"), run.locked():
        pytest.fail("the directory is locked")
    run.path.chmod(0o700)


def test_fingerprints_and_tensors_of_others_files(run: RunDirectory) -> None:
    file = run.stage(1).subspace
    with forbidden(file):
        for use in (
            lambda: file_hash(file),
            lambda: fingerprint_model([file.parent]),
            lambda: fingerprint_pictures({"a": file}),
            lambda: read_json(file),
            lambda: open_tensors(file).__enter__(),
        ):
            with pytest.raises(LlavaClError, match=r"subspace\.safetensors.*Permission denied"):
                use()
