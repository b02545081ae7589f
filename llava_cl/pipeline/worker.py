"""One rank of a stage job; started by the launcher as `python -m llava_cl.pipeline.worker RUN_DIR STAGE [TASK...]`.

With tasks it only answers their questions.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path

from llava_cl.distributed import be_deterministic, init_world, shutdown
from llava_cl.logging import setup_logging
from llava_cl.pipeline.failures import report_end, report_failure
from llava_cl.pipeline.job import Job, recorded_config
from llava_cl.pipeline.launch import progress_file, stop_file
from llava_cl.pipeline.node import die_with_parent
from llava_cl.pipeline.progress import ProgressWriter
from llava_cl.pipeline.stage import answer_questions, run_stage
from llava_cl.stopping import Stopped, StopRequest
from llava_cl.store import RunDirectory


def main(arguments: list[str]) -> None:
    """Runs a stage, or part of its evaluation, on this rank; a failure is told to the orchestrator and ends it."""
    die_with_parent()
    path, stage, tasks = Path(arguments[0]), int(arguments[1]), arguments[2:]
    rank = int(os.environ.get("RANK", "0"))
    setup_logging(rank=rank)
    stop = StopRequest()
    stop.listen(stop_file(path), before_end=lambda: report_end(path, rank), command=RunDirectory(path, ()).holder)
    try:
        config = recorded_config(path)
        distributed = config.distributed
        if config.deterministic:
            be_deterministic()
        world = init_world(use_deepspeed=distributed.deepspeed is not None, timeout_minutes=distributed.timeout_minutes)
        run = RunDirectory(path, [task.name for task in config.benchmark.tasks])
        job = Job(config, run, world, ProgressWriter(progress_file(path) if world.is_main else None), stop)
        if tasks:
            answer_questions(job, stage, tasks)
        else:
            run_stage(job, stage)
    except Stopped as stopped:
        logging.getLogger(__name__).warning("%s", stopped)
    except Exception as error:  # noqa: BLE001 - whatever ends a rank is told to the user by the orchestrator
        try:
            logging.getLogger(__name__).error("%s", traceback.format_exc())
            report_failure(path, rank, error)
            logging.shutdown()
        finally:
            # A normal exit could wait for ranks that wait for this one.
            os._exit(1)
    shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
