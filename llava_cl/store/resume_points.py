"""Resume points inside a training: folders of the Trainer's own files, each with a record that is written last."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_cl.errors import InputError
from llava_cl.store.files import file_hash, read_json, verify_files, write_json

logger = logging.getLogger(__name__)

_RECORD = "complete.json"
_FOLDERS = "checkpoint-*"


def record(folder: Path, facts: Mapping[str, Any]) -> None:
    """Declares a resume point complete, with the hashes of its files and what it holds for."""
    files = {str(file.relative_to(folder)): file_hash(file) for file in sorted(folder.rglob("*")) if file.is_file()}
    write_json(folder / _RECORD, {"facts": dict(facts), "files": files})


def resume_steps(folder: Path) -> list[int]:
    """The optimizer steps, in order, after which there is a complete resume point below `folder`."""
    return sorted(_step(mark.parent) for mark in folder.glob(f"{_FOLDERS}/{_RECORD}"))


def newest(folder: Path, facts: Mapping[str, Any]) -> Path | None:
    """The newest complete resume point that holds for `facts`; what is half written or damaged is removed.

    An older one, or none, gives the same result, only later.
    """
    for point in sorted(folder.glob(_FOLDERS), key=_step, reverse=True):
        try:
            content = read_json(point / _RECORD)
            verify_files(point, content["files"])
        except InputError as error:
            logger.warning("%s; this resume point is not used", error)
            shutil.rmtree(point)
            continue
        if content["facts"] == dict(facts):
            return point
    return None


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])
