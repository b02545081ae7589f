"""One rank of a stage job; started by the launcher as `python -m llava_cl.pipeline.worker RUN_DIR STAGE [TASK...]`.

With tasks it only answers their questions.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import traceback
from pathlib import Path

import llava_cl
from llava_cl.config import RunConfig
from llava_cl.distributed import be_deterministic, init_world, shutdown
from llava_cl.errors import InputError
from llava_cl.logging import setup_logging
from llava_cl.pipeline.failures import report_end, report_failure
from llava_cl.pipeline.job import Job, recorded_config
from llava_cl.pipeline.launch import progress_file, stop_file
from llava_cl.pipeline.node import die_with_parent
from llava_cl.pipeline.progress import ProgressWriter
from llava_cl.pipeline.stage import answer_questions, run_stage
from llava_cl.stopping import Stopped, StopRequest
from llava_cl.store import RunDirectory
from llava_cl.store.fingerprint import changed_code, fingerprint_code
from llava_cl.training.deepspeed_file import result_settings


def main(arguments: list[str]) -> None:
    """Runs a stage, or part of its evaluation, on this rank; a failure is told to the orchestrator and ends it."""
    die_with_parent()
    path, stage, tasks = Path(arguments[0]), int(arguments[1]), arguments[2:]
    rank = int(os.environ.get("RANK", "0"))
    setup_logging(rank=rank)
    # Where processes that read data come from a fork server (Python 3.14), it imports for all of them.
    multiprocessing.set_forkserver_preload(["llava_cl.data"])
    stop = StopRequest()
    stop.listen(stop_file(path), before_end=lambda: report_end(path, rank), command=RunDirectory(path, ()).holder)
    try:
        config = recorded_config(path)
        _check_command(RunDirectory(path, ()), config)
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


def _check_command(run: RunDirectory, config: RunConfig) -> None:
    """Refuses to work with other code or DeepSpeed settings than the command's, which other places may have."""
    recorded = run.recorded("code", "identity")
    if recorded["identity"]["deepspeed"] not in (True, result_settings(config.distributed.deepspeed)):
        raise InputError(f"{config.distributed.deepspeed}: has changed since the command began; run it again.")
    other = changed_code(recorded["code"], fingerprint_code(config))
    if other:
        raise InputError(
            f"{Path(llava_cl.__file__).parent}: is the package that this rank imports, and other than the one of the "
            f"command, by what {run.manifest} says of {', '.join(other)}. Install the same one on every node, and see "
            "that PYTHONPATH names no other."
        )


if __name__ == "__main__":
    main(sys.argv[1:])
