"""Files are complete or absent, and what cannot be read is said with its place."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_cl.errors import InputError, RunError
from llava_cl.store import (
    append_jsonl,
    file_hash,
    read_json,
    read_jsonl,
    save_tensors,
    write_json,
    write_jsonl,
    write_text,
)
from llava_cl.store.files import atomic_path


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    write_text(file, "old")
    with pytest.raises(RuntimeError), atomic_path(file) as temporary:
        temporary.write_text("half of the ne")
        assert file.read_text() == "old"
        raise RuntimeError
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_the_new_file_appears_only_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "new" / "file.txt"
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(file.exists()))
    with atomic_path(file) as temporary:
        temporary.write_text("text")
        assert temporary.parent == file.parent  # a rename is atomic within one file system only
        assert not file.exists()
    assert file.read_text() == "text"
    assert synced == [False], "flushed to the disk before the rename"
    assert list(file.parent.iterdir()) == [file]


def _no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_named_and_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file.txt"
    write_text(file, "old")
    monkeypatch.setattr(os, "fsync", _no_room)
    with pytest.raises(RunError, match=r"file\.txt: cannot be written \(No space left on device\); [\d.]+ MB are free"):
        write_text(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_small_file_system_that_runs_full(small_file_system: Path) -> None:
    save_tensors(small_file_system / "fits.safetensors", {"a": torch.zeros(1000)}, {})
    for write in (
        lambda file: save_tensors(file, {"a": torch.zeros(1_000_000)}, {}),
        lambda file: write_text(file, "x" * 4_000_000),
    ):
        with pytest.raises(RunError, match=r"big: cannot be written .*MB are free"):
            write(small_file_system / "big")
    assert [file.name for file in small_file_system.iterdir()] == ["fits.safetensors"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/new\.json: cannot be written"):
        write_json(tmp_path / "file" / "new.json", {})


def test_nothing_is_written_where_a_value_cannot_be_stored(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": math.nan})
    assert not list(tmp_path.iterdir())


def test_json_is_the_same_bytes_in_any_order_of_keys(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1, "ä": [1, 2]})
    write_json(tmp_path / "b.json", {"ä": [1, 2], "x": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert read_json(tmp_path / "a.json") == {"x": 1, "ä": [1, 2]}


def test_jsonl_holds_one_object_a_line(tmp_path: Path) -> None:
    rows = [{"text": "two\nlines", "n": 1}, {"text": "Zürich\u2028", "n": 2}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert (tmp_path / "rows.jsonl").read_bytes().count(b"\n") == 2
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
    write_jsonl(tmp_path / "none.jsonl", [])
    assert read_jsonl(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\r\n\r\n", "\n \t\n", " "])
def test_blank_lines_at_the_end_of_jsonl_are_allowed(end: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"a": 1}\n{"a": 2}' + end.encode())
    assert read_jsonl(file) == [{"a": 1}, {"a": 2}]
    file.write_bytes(b'{"a": 1}\n\n{"a": 2}' + end.encode())
    with pytest.raises(InputError, match="line 2"):
        read_jsonl(file)
    file.write_bytes(end.encode())
    assert read_jsonl(file) == []


@pytest.mark.parametrize("read", [read_json, read_jsonl])
@pytest.mark.parametrize(
    ("content", "named"),
    [(None, "cannot be read"), (b'{"a": 1}\n{"a"', "not valid JSON|line 2"), (b"\xff{", r"is not UTF-8 \(byte 0\)")],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, read: Callable[[Path], Any], content: bytes | None, named: str
) -> None:
    file = tmp_path / "file"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=named) as error:
        read(file)
    assert str(error.value).startswith(f"{file}: ")


def test_a_line_that_is_no_object_is_numbered(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n[2]\n')
    with pytest.raises(InputError, match="line 2 is not a JSON object"):
        read_jsonl(file)


def test_file_hash_is_sha256_of_the_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000  # more than one block
    (tmp_path / "file").write_bytes(content)
    assert file_hash(tmp_path / "file") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("half", [b"", b'{"step": 2, "lo', b'{"step": 2}', b"\xff\x00"])
@pytest.mark.parametrize("lines", [b"", b'{"step": 1}\n'])
def test_a_half_line_is_cut_off_before_the_next_is_added(tmp_path: Path, lines: bytes, half: bytes) -> None:
    file = tmp_path / "logs" / "log.jsonl"
    file.parent.mkdir()
    file.write_bytes(lines + half)
    append_jsonl(file, {"step": 2, "what": "é"})
    append_jsonl(file, {"step": 3})
    assert file.read_bytes() == lines + '{"step": 2, "what": "é"}\n{"step": 3}\n'.encode()


def test_a_full_disk_while_a_line_is_added_is_told_and_mended(small_file_system: Path) -> None:
    file, filler = small_file_system / "log.jsonl", small_file_system / "filler"
    append_jsonl(file, {"step": 1})
    with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(4096))
    with pytest.raises(RunError, match=r"log\.jsonl: cannot be written \(No space left on device\)"):
        for step in range(2, 4000):
            append_jsonl(file, {"step": step, "loss": 1.5})
    filler.unlink()
    complete = file.read_bytes().count(b"\n")
    assert complete > 1
    append_jsonl(file, {"step": "next"})
    rows = read_jsonl(file)
    assert len(rows) == complete + 1
    assert rows[-1] == {"step": "next"}
