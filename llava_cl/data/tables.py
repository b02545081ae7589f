"""Records in Parquet and Arrow files."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

from llava_cl.errors import InputError

SUFFIXES = frozenset({".parquet", ".arrow"})


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, read by the library `datasets` as a JSON array would give them; nothing is cached or fetched.

    Raises:
        InputError: missing, or no such table.
    """
    from datasets import DownloadConfig, load_dataset
    from datasets.utils import logging

    logging.set_verbosity(logging.CRITICAL)  # what is wrong is told below
    files = {"train": glob.escape(str(path))}
    local = DownloadConfig(local_files_only=True)
    try:
        with path.open("rb"):
            kind = path.suffix[1:].lower()
            return list(load_dataset(kind, data_files=files, split="train", streaming=True, download_config=local))
    except Exception as error:  # those of pyarrow and of the system have no base in common
        raise InputError(f"{path}: cannot be read as a table ({error}): check the path, and save it again.") from error
