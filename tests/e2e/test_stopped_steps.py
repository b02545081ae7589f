"""All processes of a stage are signalled at once, in every step: it ends, nothing runs on, the bytes stay the same."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from llava_cl.config import RunConfig
from llava_cl.distributed import World
from llava_cl.pipeline.job import Job
from llava_cl.pipeline.launch import stop_file
from llava_cl.pipeline.orchestrator import Launch, execute
from llava_cl.pipeline.progress import ProgressWriter
from llava_cl.pipeline.stage import run_stage
from llava_cl.stopping import STOPPED_CODE, Stopped, StopRequest
from llava_cl.store import RunDirectory
from processes import gone, wait_for
from ranks import RankFailed, run_ranks
from runs import Silent, result_hashes, tiny_config

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]
STEPS = {
    "measure": signal.SIGTERM,
    "initialise": signal.SIGINT,
    "train": signal.SIGHUP,
    "remeasure": signal.SIGINT,
    "protect": signal.SIGTERM,
    "evaluate Tone": signal.SIGHUP,
}
"""Each step of a stage, in order, and the signal that comes in it."""


class _Signalled(ProgressWriter):
    """Signals this rank and the processes that read data for it once a step has got somewhere."""

    def __init__(self, run: Path, held: str, stop: StopRequest) -> None:
        super().__init__(None)
        self._run = run
        self._held = held
        self._stop = stop

    def step(self, stage: int, step: str) -> Callable[[int, int], None]:
        def report(done: int, total: int) -> None:
            if step == self._held and done and not self._stop.asked:
                self._signal(STEPS[step])

        return report

    def _signal(self, number: signal.Signals) -> None:
        readers = [reader.pid for reader in multiprocessing.active_children()]
        assert readers or self._held in ("initialise", "protect")
        (self._run / f"readers-{os.environ['RANK']}.json").write_text(json.dumps(readers))
        # As from a cluster: the command, which gets the signal too, leaves the file.
        subprocess.run(["kill", f"-{number}", str(os.getpid()), *map(str, readers)], check=True)
        stop_file(self._run).touch()
        if self._held != "train":
            threading.Event().wait()
        while not self._stop.asked:
            time.sleep(0.01)


def _stage(world: World, config: RunConfig, run: RunDirectory, stage: int, held: str) -> bool:
    """Whether the stage was stopped in training; ranks that are stopped in other steps say nothing more."""
    stop = StopRequest()
    stop.listen(stop_file(run.path), before_end=lambda: None, command=None)
    try:
        run_stage(Job(config, run, world, _Signalled(run.path, held, stop), stop), stage)
    except Stopped:
        return True
    return False


def test_a_signal_to_every_process_in_every_step(tmp_path: Path) -> None:
    content: dict[str, Any] = tiny.run_content(
        tmp_path, evaluation={"zero_shot": False, "batch_size": 4, "max_new_tokens": 3}
    )
    content["training"]["workers"] = 1
    config = tiny_config(tmp_path, content)

    def run_on_ranks(output: Path, held: str) -> None:
        def stage(run: RunDirectory, number: int) -> None:
            stop_file(run.path).parent.mkdir(exist_ok=True)
            stop_file(run.path).unlink(missing_ok=True)
            if any(run_ranks(_stage, 2, config, run, number, held)):
                raise Stopped

        execute(config, Launch(output, until=1), Silent(), after_stage=lambda run: None, run_stage=stage)

    undisturbed, output = tmp_path / "undisturbed", tmp_path / "run"
    run_on_ranks(undisturbed, "")
    for held in STEPS:
        if held == "train":
            with pytest.raises(Stopped):
                run_on_ranks(output, held)
            assert list((output / "stages/01-Colour/checkpoints").glob("checkpoint-1/complete.json"))
        else:
            # A rank may notice that the other one has gone before it is ended itself.
            with pytest.raises(RankFailed, match=f"died with {STOPPED_CODE}|Connection"):
                run_on_ranks(output, held)
        readers = [json.loads(file.read_text()) for file in output.glob("readers-*.json")]
        wait_for(lambda: gone(pid for each in readers for pid in each))  # noqa: B023 - called in this round only
    run_on_ranks(output, "")
    assert result_hashes(output) == result_hashes(undisturbed)
