"""Fingerprints of what a run depends on: the base model's files and the benchmark's data files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from llava_cl.errors import InputError
from llava_cl.store.files import file_hash

_MODEL_SUFFIXES = {".json", ".safetensors", ".model", ".bin"}


def fingerprint_files(files: Iterable[Path], root: Path) -> dict[str, str]:
    """SHA-256 of each file, keyed by its path relative to `root`.

    Raises:
        InputError: files that do not exist, all named.
    """
    files = sorted(files)
    missing = [f"{file}: does not exist." for file in files if not file.is_file()]
    if missing:
        raise InputError(*missing)
    return {str(file.relative_to(root)): file_hash(file) for file in files}


def fingerprint_model(folders: Sequence[Path]) -> str:
    """One SHA-256 over the names and hashes of the files in a checkpoint's folders."""
    hashes = [
        sorted(fingerprint_files((f for f in folder.iterdir() if f.suffix in _MODEL_SUFFIXES), folder).items())
        for folder in folders
    ]
    return hashlib.sha256(repr(hashes).encode()).hexdigest()
