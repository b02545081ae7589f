"""Resume points inside a training: folders of the Trainer's own files, each with a record that is written last."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_cl.errors import InputError
from llava_cl.store.files import file_hash, read_record, verify_files, write_json

logger = logging.getLogger(__name__)

_RECORD = "complete.json"


def record(folder: Path, facts: Mapping[str, Any]) -> None:
    """Declares a resume point complete, with the hashes of its files and what it holds for."""
    files = {str(file.relative_to(folder)): file_hash(file) for file in sorted(folder.rglob("*")) if file.is_file()}
    write_json(folder / _RECORD, {"facts": dict(facts), "files": files})


def resume_steps(folder: Path) -> list[int]:
    """The optimizer steps, in order, after which there is a complete resume point below `folder`."""
    return sorted(step for step, point in _points(folder) if (point / _RECORD).is_file())


def newest(folder: Path, facts: Mapping[str, Any]) -> Path | None:
    """The newest complete resume point that holds for `facts`; what is half written or damaged is removed.

    An older one, or none, gives the same result, only later.
    """
    for _, point in sorted(_points(folder), reverse=True):
        try:
            if point.is_symlink():
                raise InputError(f"{point}: is a link")
            content = read_record(point / _RECORD, "facts")
            verify_files(point, content["files"])
        except InputError as error:
            logger.warning("%s; this resume point is not used", str(error).removesuffix("."))
            discard(point)
            continue
        if content["facts"] == dict(facts):
            return point
    return None


def discard(path: Path) -> None:
    """Removes a folder with all that is in it, or the file or link that is in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _points(folder: Path) -> Iterator[tuple[int, Path]]:
    """Steps and places of what is called as a resume point is; of the rest it is said that it is none."""
    for point in folder.glob("checkpoint-*"):
        step = point.name.removeprefix("checkpoint-")
        if step.isascii() and step.isdecimal():
            yield int(step), point
        else:
            logger.warning("%s: is no resume point and not used", point)
