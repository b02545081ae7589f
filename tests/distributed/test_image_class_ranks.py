"""Stages of a class-incremental run on two ranks end as in one process, for the methods that keep most."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llava_cl.config import RunConfig
from llava_cl.distributed import World
from llava_cl.pipeline.job import Job
from llava_cl.pipeline.progress import ProgressWriter
from llava_cl.pipeline.stage import run_stage
from llava_cl.store import RunDirectory
from ranks import run_ranks
from runs import run_here, tiny_config
from tiny_vit import run_content

pytestmark = pytest.mark.distributed

METHODS: dict[str, dict[str, Any]] = {
    "inflora": {"name": "inflora"},
    "olora": {"name": "olora"},
    "sequential, carry": {"name": "sequential", "options": {"carry": True}},
    "splitlora, gradient": {"name": "splitlora", "options": {"initialise": "gradient"}},
}


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> Iterator[None]:
    """A run collects garbage at every step; it need not walk over all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


def _stages(world: World, config: RunConfig, output: Path) -> None:
    """Runs the first two stages as a job does."""
    run = RunDirectory(output, [task.name for task in config.benchmark.tasks])
    for stage in (1, 2):
        run_stage(Job(config, run, world, ProgressWriter(None)), stage)


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_equal_one_process(tmp_path: Path, method: str) -> None:
    content = {**run_content(tmp_path), "method": METHODS[method]}
    config = tiny_config(tmp_path, content, "training.epochs=2", "measurement.batch_size=5")
    one, two = tmp_path / "one", tmp_path / "two"
    run_here(config, one, until=2)
    (two / "stages").mkdir(parents=True)
    shutil.copy(one / "run.json", two)
    shutil.copytree(one / "stages" / "00-base", two / "stages" / "00-base")
    run_ranks(_stages, 2, config, two)
    compared = 0
    for file in sorted(one.glob("stages/0[12]-*/**/*.safetensors")):
        ours = load_file(two / file.relative_to(one))
        theirs = load_file(file)
        assert ours.keys() == theirs.keys(), file
        for key, value in theirs.items():
            torch.testing.assert_close(
                ours[key], value, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
            )
            compared += 1
    assert compared >= 40
    for file in sorted(one.glob("stages/0[12]-*/predictions/*.jsonl")):
        assert (two / file.relative_to(one)).read_text() == file.read_text()
