"""The command line, over ranks that wait in a step of training until they are asked to stop.

`HELD` is the step, `START_METHOD` how ranks start the processes that read data. Run as a rank, this file is one.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from llava_cl import cli
from llava_cl.pipeline import launch, progress, worker
from llava_cl.stopping import StopRequest

_requests: list[StopRequest] = []


def held_file(run: Path, step: int, rank: int) -> Path:
    """Is there once a rank waits."""
    return run / "logs" / f"held-{step}-{rank}"


class _Kept(StopRequest):
    def __init__(self) -> None:
        super().__init__()
        _requests.append(self)


class _Held(progress.ProgressWriter):
    def step(self, stage: int, step: str) -> Callable[[int, int], None]:
        report = super().step(stage, step)

        def hold(done: int, total: int) -> None:
            report(done, total)
            if step == "train" and done == int(os.environ["HELD"]):
                held_file(Path(sys.argv[1]), done, int(os.environ["RANK"])).touch()
                while not _requests[0].asked:
                    time.sleep(0.01)

        return hold


if __name__ == "__main__":
    if "RANK" in os.environ:
        multiprocessing.set_start_method(os.environ["START_METHOD"])
        worker.StopRequest, worker.ProgressWriter = _Kept, _Held  # type: ignore[misc]
        worker.main(sys.argv[1:])
    else:
        launch._WORKER = "held_command"
        cli.main()
