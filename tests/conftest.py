"""What all tests share: a quiet, single-threaded, offline process, and one tiny run for the session."""

import os

os.environ.update(
    OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", DS_ACCELERATOR="cpu", DS_BUILD_OPS="0"
)

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

from tiny import run_content

torch.set_num_threads(1)
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    """A folder that holds 2 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model` and `data` of `tiny.run_content`; read it, never write to it."""
    folder = tmp_path_factory.mktemp("tiny_run")
    run_content(folder)
    return folder
