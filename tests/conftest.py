"""What all tests share: a quiet, single-threaded, offline process that sees no GPU, and one tiny run for the session.

Tests compare bytes, which are those of the CPU. A test marked `gpu` runs in a process of its own that sees the GPUs.
"""

import os

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", DS_BUILD_OPS="0")
# What CUDA_VISIBLE_DEVICES was, for all that the tests start; then it is hidden, before torch is imported.
os.environ.setdefault("LLAVA_CL_TESTS_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
os.environ.update(
    {} if "LLAVA_CL_TESTS_ON_GPUS" in os.environ else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
)

import functools
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

from tiny import run_content

torch.set_num_threads(1)
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
# Commands under test heed signals also where the tests themselves were started in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


_ON_GPUS = "LLAVA_CL_TESTS_ON_GPUS" in os.environ
"""Whether this is the process of a test marked `gpu`."""


def _outside() -> dict[str, str]:
    """The environment in which the GPUs are seen."""
    hidden = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")
    values = {name: value for name, value in os.environ.items() if name not in hidden}
    chosen = os.environ["LLAVA_CL_TESTS_GPUS"]
    return {**values, **({"CUDA_VISIBLE_DEVICES": chosen} if chosen else {}), "LLAVA_CL_TESTS_ON_GPUS": "1"}


@functools.cache
def _gpus() -> int:
    """GPUs that torch can use."""
    if torch.version.cuda is None and torch.version.hip is None:
        return 0
    program = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    found = subprocess.run([sys.executable, "-c", program], env=_outside(), capture_output=True, text=True, check=True)
    return int(found.stdout.split()[-1])


def _gpus_needed(item: pytest.Item) -> int:
    marker = None if _ON_GPUS else item.get_closest_marker("gpu")
    return 0 if marker is None else int(marker.kwargs.get("count", 1))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test for want of GPUs."""
    needed = _gpus_needed(item)
    if needed and _gpus() < needed:
        pytest.skip(f"needs {needed} GPU{'s' * (needed > 1)} that torch can use; there are {_gpus()}")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs a test marked `gpu` in a process of its own."""
    if not _gpus_needed(pyfuncitem):
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", pyfuncitem.nodeid]
    done = subprocess.run(command, cwd=pyfuncitem.config.rootpath, env=_outside(), capture_output=True, text=True)
    if done.returncode or "1 passed" not in done.stdout:
        pytest.fail(f"{done.stdout}\n{done.stderr}", pytrace=False)
    return True


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
