"""The peak of one part of a stage is not that of the part before it."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from llava_cl.distributed import World
from llava_cl.pipeline import memory
from llava_cl.pipeline.job import Job, largest
from llava_cl.pipeline.progress import ProgressWriter
from llava_cl.store import RunDirectory
from runs import tiny_config
from tiny import run_content

LARGE, SMALL = 300 << 20, 50 << 20


@pytest.fixture
def job(tiny_run: Path, tmp_path: Path) -> Job:
    config = tiny_config(tmp_path, run_content(tiny_run))
    return Job(config, RunDirectory(tmp_path / "run", ()), World(0, 1, torch.device("cpu")), ProgressWriter(None))


def _take(job: Job, part: str, size: int) -> None:
    # Not from what the process has freed and still holds.
    with job.timed(part), mmap.mmap(-1, size) as fresh:
        for page in range(0, size, mmap.PAGESIZE):
            fresh[page] = 1


def test_parts_have_peaks_of_their_own(job: Job) -> None:
    if not memory.reset_peak(torch.device("cpu")):
        pytest.skip("this system cannot reset the peak")
    _take(job, "measure", SMALL)
    _take(job, "train", LARGE)
    _take(job, "measure", 1)
    cost = job.take_cost()
    peaks = cost["step_memory_bytes"]
    # What else the process holds may shrink meanwhile.
    assert peaks["measure"] > SMALL
    assert peaks["train"] - peaks["measure"] > 0.5 * LARGE
    assert cost["peak_memory_bytes"] >= peaks["train"]
    _take(job, "score", 1)
    cost = job.take_cost()
    assert cost["step_memory_bytes"].keys() == {"score"}
    assert cost["peak_memory_bytes"] >= peaks["train"], "the peak so far"
    assert peaks["train"] - cost["step_memory_bytes"]["score"] > 0.5 * LARGE


def test_where_the_peak_cannot_be_reset_parts_have_none(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CLEAR_REFS", Path("/proc/none/clear_refs"))
    _take(job, "train", 1)
    cost = job.take_cost()
    assert cost["step_memory_bytes"] == {}
    assert cost["peak_memory_bytes"] > 0


def test_the_largest_of_all_ranks() -> None:
    assert largest([{"load": 1, "train": 5}, {"train": 3, "score": 2}]) == {"load": 1, "train": 5, "score": 2}
