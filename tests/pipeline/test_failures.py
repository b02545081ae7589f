"""Of all that ranks leave behind when a job fails, the message tells the first cause, with rank, step and place."""

from __future__ import annotations

import datetime
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from llava_cl.distributed import World, out_of_memory
from llava_cl.errors import InputError, RunError
from llava_cl.pipeline import failures
from llava_cl.pipeline.failures import failure, failure_file, hang, report_end, report_failure
from llava_cl.store import read_json, write_json
from ranks import run_ranks

SUMMARY = """
Root Cause (first observed failure):
[0]:
  time      : 2026-01-01_00:00:00
  rank      : {rank} (local_rank: {rank})
  exitcode  : {code} (pid: 1)
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path


def _told(run: Path, log: str = "") -> Exception:
    file = run / "logs" / "stage-01.log"
    file.write_text(log)
    return failure(run, "stage 1, train 3/6", 1, file, 0, 2, 0.5)


def _raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as raised:  # noqa: BLE001 - it shall have a traceback
        return raised


def test_a_failure_that_explains_itself_comes_before_an_earlier_one(run: Path) -> None:
    report_failure(run, 0, _raised(ConnectionError("closed by peer")))
    report_failure(run, 1, _raised(InputError("x.png cannot be decoded")))
    told = _told(run)
    assert isinstance(told, InputError)
    assert str(told).startswith("stage 1, train 3/6, rank 1: x.png cannot be decoded\nDetails: ")


@pytest.mark.parametrize(
    ("code", "name"), [(-9, "SIGKILL; the system"), (-7, "SIGBUS; .* /dev/shm"), (-11, "SIGSEGV"), (143, "SIGTERM")]
)
def test_a_rank_that_a_signal_ended_is_named(run: Path, code: int, name: str) -> None:
    report_failure(run, 0, _raised(RuntimeError("Connection closed by peer")))
    told = _told(run, SUMMARY.format(rank=1, code=code))
    assert isinstance(told, RunError)
    assert re.match(f"stage 1, train 3/6, rank 1: was ended by {name}", str(told))


def test_of_several_nodes_the_rank_that_was_killed_is_named(run: Path) -> None:
    """Whichever node's launcher tells first; NCCL aborts the ranks that waited for it."""
    report_failure(run, 0, _raised(RuntimeError("Connection closed by peer")))
    nodes = [SUMMARY.format(rank=0, code=1), SUMMARY.format(rank=2, code=-6), SUMMARY.format(rank=1, code=-9)]
    for log in ("".join(nodes), "".join(reversed(nodes))):
        assert str(_told(run, log)).startswith("stage 1, train 3/6, rank 1: was ended by SIGKILL")


def _timed_out(run: Path, rank: int) -> None:
    """What a rank reports whose collective has failed."""
    content = {
        "rank": rank,
        "explained": False,
        "ended": False,
        "exit_code": 1,
        "message": "Timed out",
        "waiting": True,
    }
    write_json(failure_file(run, rank), {**content, "time": 1.0, "place": "torch/distributed"})


def test_ranks_that_all_waited_for_one_another_point_to_the_network(run: Path) -> None:
    for rank in (0, 1):
        _timed_out(run, rank)
    said = str(_told(run))
    assert said.startswith(
        "stage 1, train 3/6: the ranks waited 0.5 minutes (distributed.timeout_minutes) in vain for one"
    )
    assert "network" in said and "Rank 0 then had: Timed out" in said


def test_ranks_that_nccl_aborted_on_all_nodes_point_to_the_network(run: Path) -> None:
    """They say nothing themselves, so none of them is known to be the one that did not come."""
    said = str(_told(run, "".join(SUMMARY.format(rank=rank, code=-6) for rank in (0, 1))))
    assert "in vain for one another: is the network" in said


def test_a_node_that_was_lost_is_named(run: Path) -> None:
    _timed_out(run, 0)
    (run / "logs" / "stage-01.log").touch()
    told = failure(run, "stage 1, train 3/6", 255, run / "logs" / "stage-01.log", 0, 2, 0.5, ["node2"])
    assert str(told).startswith("stage 1, train 3/6: the connection to node2 was lost")


def test_a_job_that_says_nothing_on_a_full_disk(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no rank said why. Details" in str(_told(run))
    usage = shutil.disk_usage(run)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    assert f"The disk of {run} is full: make room" in str(_told(run))


def _end_after_the_other(run: Path) -> None:
    while not failure_file(run, 0).exists():
        time.sleep(0.01)
    report_end(run, 1)


def _wait_in_vain(world: World, run: Path) -> None:
    """Rank 1 hangs in Python; rank 0 waits for it in a collective until that fails, and rank 1 is then ended."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=2))
    if world.rank == 1:
        threading.Thread(target=_end_after_the_other, args=(run,)).start()
        while not failure_file(run, 1).exists():
            time.sleep(0.01)
        return
    try:
        dist.all_reduce(torch.zeros(1), group=group)
    except RuntimeError as error:
        report_failure(run, 0, error)


@pytest.mark.distributed
def test_the_rank_that_hangs_is_named_and_not_the_one_that_waited(run: Path) -> None:
    run_ranks(_wait_in_vain, 2, run)
    told = str(_told(run, SUMMARY.format(rank=0, code=1)))
    assert "others waited 0.5 minutes (distributed.timeout_minutes) in vain for rank 1, which was at" in told
    assert "test_failures.py" in told and "in _wait_in_vain" in told
    assert "Rank 0 then had: RuntimeError" in told


@pytest.mark.distributed
def test_a_rank_that_does_not_answer_is_named(run: Path) -> None:
    run_ranks(_wait_in_vain, 2, run)
    (run / "logs" / "failure-rank1.json").unlink()
    assert "in vain for rank 1, which did not answer any more" in str(_told(run))


def test_a_job_that_hangs_names_the_ranks_that_wait_for_none(run: Path) -> None:
    log = run / "logs" / "stage-01.log"
    told = str(hang(run, "stage 1, train 3/6", log, 2, 0.5))
    assert told.startswith("stage 1, train 3/6: no progress for 2 minutes (twice distributed.timeout_minutes, and one)")
    assert "because of rank 0, which did not answer any more; rank 1, which did not answer any more. " in told
    report_end(run, 1)
    told = str(hang(run, "stage 1", log, 2, 0.5))
    assert "because of rank 0, which did not answer any more; rank 1, which was at " in told
    write_json(failure_file(run, 0), {"rank": 0, "waiting": True})
    assert "because of rank 1, which was at " in str(hang(run, "stage 1", log, 2, 0.5))
    write_json(failure_file(run, 1), {"rank": 1, "waiting": True})
    assert "because of every rank, as each waits for others" in str(hang(run, "stage 1", log, 2, 0.5))


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    dist.DistBackendError("NCCL error ... ncclUnhandledCudaError ... Last error:\nCuda failure 2 'out of memory'"),
    dist.DistBackendError("Last error:\nFailed to CUDA calloc 6291456 bytes"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    OSError(12, "Cannot allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: str(error)[:60] or type(error).__name__)
def test_a_lack_of_memory_is_told_from_what_waits(run: Path, error: Exception) -> None:
    """Also where it shows in a backward pass or a collective, in which other errors are those of another rank."""
    assert out_of_memory(error)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(failures, "_waits", lambda frames: True)
        report_failure(run, 0, _raised(error))
    assert not read_json(failure_file(run, 0))["waiting"]
    assert "training.micro_batch" in str(_told(run))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."),
        dist.DistBackendError("Connection reset by peer"),
        OSError(28, "No space left on device"),
        InputError("the question is 'out of memory'"),
    ],
    ids=str,
)
def test_other_errors_are_no_lack_of_memory(error: Exception) -> None:
    assert not out_of_memory(error)


def test_a_gpu_without_memory_says_which_batches_to_halve(run: Path) -> None:
    report_failure(run, 0, _raised(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")))
    said = str(_told(run))
    for part in ("2.00 GiB", "training.micro_batch", "measurement.batch_size", "evaluation.batch_size"):
        assert part in said
