"""`llava-cl doctor` says what an environment has, and starts ranks."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys

import pytest
import torch
from typer.testing import CliRunner

from llava_cl.cli import app
from llava_cl.pipeline import doctor


@pytest.mark.distributed
def test_a_working_environment_passes() -> None:
    result = CliRunner().invoke(app, ["doctor", "--nproc", "2"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert f"ok      torch: {importlib.metadata.version('torch')}" in lines
    assert [line for line in lines if line.startswith("ok      DeepSpeed operators: ")]
    assert "ok      backend: gloo" in lines or torch.cuda.is_available()
    assert lines[-1] == "ok      2 ranks: summed a number over gloo"
    assert not [line for line in lines if line.startswith("problem")]


def test_a_missing_package_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("no-such-package",))
    monkeypatch.setattr(doctor, "torchrun", lambda ranks: [sys.executable, "-c", "print('started')"])
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "problem no-such-package: not installed" in result.output


@pytest.mark.parametrize(
    ("program", "said"),
    [("import sys; sys.exit('no route to host')", "no route to host"), ("import time; time.sleep(60)", "had not")],
)
def test_ranks_that_fail_or_hang_are_a_problem(program: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TRIAL_SECONDS", 2)
    monkeypatch.setattr(doctor, "torchrun", lambda ranks: [sys.executable, "-c", program])
    result = CliRunner().invoke(app, ["doctor", "--nproc", "2"])
    assert result.exit_code == 1
    last = [line for line in result.output.splitlines() if line.startswith("problem")][-1]
    assert "2 ranks" in last and "NCCL_SOCKET_IFNAME" in last
    assert said in result.output


def test_little_disk_and_a_torch_without_nccl_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10**9))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: False)
    found = {finding.subject: finding for finding in doctor._hardware()}
    assert found["disk"].state == "note" and "llava-cl check" in found["disk"].detail
    assert found["backend"].state == "problem" and "install the build of torch" in found["backend"].detail


def test_sums_that_are_wrong_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "all_reduce_sum", lambda value, world: value + 1)
    with pytest.raises(RuntimeError, match=r"the sum over 1 ranks is 2\.0, not 1\.0"):
        doctor._rank()


@pytest.mark.parametrize(("size", "state"), [(64 << 20, "note"), (16 << 30, "ok")])
def test_the_shared_memory_of_a_container_is_told(size: int, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MB is what docker gives without being asked."""
    statvfs = os.statvfs

    def small(path: object) -> os.statvfs_result:
        if str(path) != "/dev/shm":
            return statvfs(str(path))
        return os.statvfs_result((4096, 4096, size // 4096, size // 4096, size // 4096, 0, 0, 0, 0, 255))

    monkeypatch.setattr(os, "statvfs", small)
    found = {finding.subject: finding for finding in doctor._hardware()}["shared memory"]
    assert found.state == state
    assert ("--shm-size" in found.detail) == (state == "note")
