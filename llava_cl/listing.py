"""What folders of data hold, without what programs and file systems leave there, and what is nearly what is missing."""

from __future__ import annotations

import functools
import os
import unicodedata
from pathlib import Path

from llava_cl.errors import InputError

# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".apng", ".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp",
})
"""Of files in class folders, in small letters."""
_LEFT = frozenset({
    "__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini",
})
# fmt: on


def entries(folder: Path) -> list[Path]:
    """What a folder holds, by name, but for hidden files and folders and those that file systems leave.

    Raises:
        InputError: it cannot be read.
    """
    if not os.access(folder, os.R_OK | os.X_OK):
        raise InputError(f"{folder}: is not there, or may not be read.")
    found = sorted(folder.iterdir(), key=lambda entry: entry.name)
    return [entry for entry in found if not (entry.name.startswith(".") or entry.name.lower() in _LEFT)]


def is_image(name: str) -> bool:
    """Whether a file is taken for an image by its name."""
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def other_spelling(missing: Path) -> str:
    """A sentence, with a space before it, if what is there differs in capitals or in how accents are written alone."""
    while not os.access(missing.parent, os.F_OK):
        missing = missing.parent
    if not os.access(missing.parent, os.R_OK):
        return ""
    there = _spellings(missing.parent, missing.parent.stat().st_mtime_ns).get(_folded(missing.name), missing.name)
    return "" if there == missing.name else f" Did you mean {there!r}?"


@functools.lru_cache(maxsize=8)
def _spellings(folder: Path, changed: int) -> dict[str, str]:
    return {_folded(entry.name): entry.name for entry in folder.iterdir()} if folder.is_dir() else {}


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
