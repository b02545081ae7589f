"""Files that are either complete or absent: written under a temporary name, flushed, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from llava_cl.errors import InputError, RunError
from llava_cl.parsing import parse_json, read_text


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; renamed to it when the block ends well, removed when it does not.

    Raises:
        RunError: it cannot be written, for example because the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def remove() -> None:
        with contextlib.suppress(OSError):
            temporary.unlink()

    with writing(path, remove):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)


@contextlib.contextmanager
def writing(path: Path, clean_up: Callable[[], None]) -> Iterator[None]:
    """A block that writes `path`, a file or a folder, and what is to be removed after it, whether it ends well or not.

    Raises:
        RunError: it cannot be written, for example because the disk is full.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        clean_up()  # before the room that is left is told
        reason = getattr(error, "strerror", None) or error
        raise RunError(
            f"{path}: cannot be written ({reason}); {_free(path)}. What is complete is kept: put that right, then run "
            "the same command again."
        ) from error
    finally:
        clean_up()


def _free(path: Path) -> str:
    """How much room there is where `path` is."""
    there = next(folder for folder in path.parents if os.path.isdir(folder))  # noqa: PTH112 - as in `verify_files`
    return f"{shutil.disk_usage(there).free / 1e6:.1f} MB are free there"


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON atomically, with sorted keys, so that equal content gives equal bytes."""
    write_text(path, json_text(content))


def json_text(content: Any) -> str:
    """The text that `write_json` writes."""
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """Adds one JSON object to a file that is still being written.

    Its last line can be incomplete, after a kill or on a full disk; such a half line is cut off first.

    Raises:
        RunError: it cannot be written, for example because the disk is full.
    """
    with writing(path, clean_up=lambda: None):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as stream:
            size = end = stream.tell()
            while end and _byte(stream, end - 1) != b"\n":
                end -= 1
            if end < size:
                stream.truncate(end)
            stream.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def _byte(stream: BinaryIO, place: int) -> bytes:
    stream.seek(place)
    return stream.read(1)


def read_json(path: Path, *required: str) -> dict[str, Any]:
    """Reads a JSON file that holds one object.

    Args:
        path: the file.
        required: keys that the object must have.

    Raises:
        InputError: missing, unreadable, not JSON, with the place of the fault; no object, or without a required key.
    """
    return json_object(read_text(path), path, *required)


def json_object(text: str, path: Path, *required: str) -> dict[str, Any]:
    """The object that a file's text holds; arguments and errors as for `read_json`."""
    content = parse_json(text, str(path))
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a JSON {type(content).__name__}, but must be an object.")
    missing = [f"{path}: field {key!r} is missing." for key in required if key not in content]
    if missing:
        raise InputError(*missing)
    return content


def read_record(path: Path, *required: str) -> dict[str, Any]:
    """Reads a JSON object whose field `files` has the SHA-256 of files by their names; as `read_json` else.

    Raises:
        InputError: as `read_json`, or `files` is something else.
    """
    content = read_json(path, "files", *required)
    if not isinstance(content["files"], dict) or not all(isinstance(each, str) for each in content["files"].values()):
        raise InputError(f"{path}: field 'files' must be an object of names and hashes.")
    return content


def read_jsonl(path: Path, keep: Callable[[str], bool] = lambda line: True) -> list[dict[str, Any]]:
    """Reads a JSON Lines file; blank lines are allowed at its end alone.

    Args:
        path: the file.
        keep: whether a line is to be read; others are passed over as they are.

    Raises:
        InputError: missing, unreadable, or a line that is no JSON object, with its number.
    """
    rows = []
    for number, line in enumerate(io.StringIO(read_text(path).rstrip(" \t\r\n")), start=1):
        if not keep(line):
            continue
        row = parse_json(line, str(path), line=number)
        if not isinstance(row, dict):
            raise InputError(f"{path}: line {number} is not a JSON object.")
        rows.append(row)
    return rows


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        InputError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    return digest.hexdigest()


def verify_files(folder: Path, hashes: Mapping[str, str], advice: str = "") -> None:
    """Checks that the files below a folder are as recorded.

    Args:
        folder: where they are.
        hashes: path relative to the folder -> SHA-256.
        advice: follows what is said of a file that is not.

    Raises:
        InputError: the first file that is missing or has changed.
    """
    for name, digest in hashes.items():
        file = folder / name
        there = os.path.isfile(file)  # noqa: PTH113 - Path.is_file raises where a folder may not be looked into
        if not there or file_hash(file) != digest:
            raise InputError(f"{file}: {'has changed since it was recorded' if there else 'is missing'}{advice}")
