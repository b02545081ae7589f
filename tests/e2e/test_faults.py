"""Runs that are really killed, at every file that they write and at random moments, end with the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest

import tiny
from llava_cl.config import RunConfig
from llava_cl.distributed import World
from llava_cl.pipeline.job import Job
from llava_cl.pipeline.orchestrator import Launch, execute
from llava_cl.pipeline.progress import ProgressWriter
from llava_cl.pipeline.stage import run_stage
from llava_cl.store import RunDirectory
from ranks import RankFailed, forkserver, run_ranks
from runs import Silent, result_hashes, run_here, tiny_config

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]
KILLS = 44
"""Up to the second task's training; every kind of file is among them."""
ZERO_2 = Path(__file__).parents[2] / "configs/deepspeed/zero2.json"


def _content(folder: Path, **distributed: Any) -> dict[str, Any]:
    content = tiny.run_content(folder, distributed=distributed)
    content["training"]["checkpoint_every"] = 1
    return content


def _records(run: Path) -> dict[str, int]:
    """When each complete step was recorded."""
    return {str(file): file.stat().st_mtime_ns for file in run.glob("stages/*/steps/*.json")}


def _kill_at_the_next_file(config: RunConfig, output: Path, log: Path) -> None:
    """Runs the stream, and kills this process at the first file that no process has been killed at before.

    Half of the files lose the process before they are renamed to their name, half after it.
    """
    killed_at = set(log.read_text().splitlines()) if log.exists() else set()
    original = Path.replace

    def replace(self: Path, target: Path) -> Path:
        name = str(target.relative_to(output)) if target.is_relative_to(output) else ""
        chosen = name and name not in killed_at and len(killed_at) < KILLS
        if chosen:
            with log.open("a") as stream:
                stream.write(f"{name}\n")
            if zlib.crc32(name.encode()) % 2:
                os.kill(os.getpid(), signal.SIGKILL)
        result = original(self, target)
        if chosen:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    Path.replace = replace  # type: ignore[method-assign, assignment]
    run_here(config, output)


def test_a_run_killed_at_every_file_it_writes(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, _content(tmp_path))
    undisturbed, output, log = tmp_path / "undisturbed", tmp_path / "run", tmp_path / "killed_at"
    run_here(config, undisturbed)
    kills = 0
    while True:
        recorded = _records(output)
        process = forkserver().Process(target=_kill_at_the_next_file, args=(config, output, log))
        process.start()
        process.join()
        now = _records(output)
        assert {name: now.get(name) for name in recorded} == recorded, "a recorded step was done again"
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert kills == len(log.read_text().splitlines()) == KILLS
    assert result_hashes(output) == result_hashes(undisturbed)
    assert not list(output.rglob(".*.tmp"))
    assert not list(output.glob("stages/*/checkpoints"))


def _stage_on_a_rank(
    world: World, config: RunConfig, run: RunDirectory, stage: int, victims: frozenset[int], seconds: float
) -> None:
    if world.rank in victims:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    run_stage(Job(config, run, world, ProgressWriter(None)), stage)


def test_ranks_killed_at_random_moments(tmp_path: Path) -> None:
    """One rank or both, over ZeRO-2; killed before its end a stage is started again."""
    config = tiny_config(tmp_path, _content(tmp_path, deepspeed=str(ZERO_2)))
    moments = random.Random(7)
    plan = [(victims, moments.uniform(0.2, 6.0)) for victims in ({0}, {1}, {0, 1}) * 3]

    def run_on_ranks(output: Path, victims: set[int], seconds: float) -> None:
        def stage(run: RunDirectory, number: int) -> None:
            facts = (config, run, number, frozenset(victims), seconds)
            run_ranks(_stage_on_a_rank, 2, *facts, use_deepspeed=True)

        execute(config, Launch(output), Silent(), after_stage=lambda run: None, run_stage=stage)

    undisturbed, output = tmp_path / "undisturbed", tmp_path / "run"
    run_on_ranks(undisturbed, set(), 0)
    for victims, seconds in plan:
        recorded = _records(output)
        try:
            run_on_ranks(output, victims, seconds)
        except RankFailed as error:
            assert "died" in str(error) or "Connection" in str(error)
        now = _records(output)
        assert {name: now.get(name) for name in recorded} == recorded, "a recorded step was done again"
    run_on_ranks(output, set(), 0)
    assert result_hashes(output) == result_hashes(undisturbed)
    assert json.loads((output / "metrics.json").read_text())["summary"]
