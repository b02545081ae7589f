"""Fingerprints of what a run depends on: the base model's files, the benchmark's data files, and the code."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from llava_cl.errors import InputError
from llava_cl.store.files import file_hash

_PACKAGE = Path(__file__).parents[1]
_NO_RESULT = ("cli.py", "report")
"""Parts of the package that read results or print them; what computes them does not import these."""
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


def fingerprint_code() -> dict[str, str]:
    """SHA-256 of each source file of this package that a result may depend on, by its path in the package."""
    files = [file.relative_to(_PACKAGE) for file in _PACKAGE.rglob("*.py") if not file.name.startswith(".")]
    return fingerprint_files((_PACKAGE / file for file in files if file.parts[0] not in _NO_RESULT), _PACKAGE)
