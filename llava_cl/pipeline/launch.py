"""Starting the ranks of a stage job and waiting for them: torchrun on one node, DeepSpeed's launcher on several."""

from __future__ import annotations

import ctypes
import logging
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from llava_cl.config import DistributedConfig
from llava_cl.errors import InputError
from llava_cl.parsing import read_text, shown
from llava_cl.pipeline.failures import failure, hang, longest_silence
from llava_cl.pipeline.progress import ProgressReader
from llava_cl.stopping import Stopped, noting

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_END_SECONDS = 5
_WORKER = "llava_cl.pipeline.worker"
_PR_SET_PDEATHSIG = 1
_RUN_PID = "LLAVA_CL_RUN_PID"


def die_with_parent() -> bool:
    """Asks the kernel to kill this process when its parent dies, so that no rank outlives a killed run (Linux).

    A run that has been killed before the request is found by its process id, which only its own node has.

    Returns:
        Whether this process is a rank that now ends with its command.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    run = os.environ.get(_RUN_PID)
    if run is None or sys.platform != "linux":
        return False
    if not Path(f"/proc/{run}").exists():
        os._exit(1)
    return True


def progress_file(run: Path) -> Path:
    """Where rank 0 reports its progress."""
    return run / "logs" / "progress.jsonl"


def stop_file(run: Path) -> Path:
    """Its existence asks the ranks of the running job to stop."""
    return run / "logs" / "stop"


def log_file(run: Path, stage: int) -> Path:
    """Everything that the ranks of a stage print."""
    return run / "logs" / f"stage-{stage:02d}.log"


def ranks_per_node(configured: int | None, asked: int | None = None) -> int:
    """The ranks to start on each node: as asked for on the command line, else as configured, else one a GPU, else one.

    A configured number is cut to the GPUs that there are.

    Raises:
        InputError: more ranks are asked for than there are GPUs.
    """
    gpus = torch.cuda.device_count()
    if asked:
        if 0 < gpus < asked:
            raise InputError(f"--nproc {asked}: this node has {gpus} GPUs; ask for at most that many.")
        return asked
    if configured and 0 < gpus < configured:
        logger.warning("%d ranks are configured, but there are %d GPUs: one rank runs on each", configured, gpus)
        return gpus
    return configured or gpus or 1


def hosts(hostfile: Path | None, run: Path) -> int:
    """Number of nodes in a DeepSpeed hostfile (`host slots=n` lines, # comments); one without a file.

    Args:
        hostfile: the file.
        run: the run directory.

    Raises:
        InputError: the file cannot be read, or on several nodes a path that DeepSpeed hands to their shells unquoted
            has letters that a shell reads as more than a name.
    """
    if hostfile is None:
        return 1
    lines = (line.split("#")[0].strip() for line in read_text(hostfile).splitlines())
    nodes = sum(1 for line in lines if line)
    problems = [
        f"{what} {shown(str(path))}: DeepSpeed's launcher passes it to the shell of every node, where only letters, "
        "digits and @%+=:,./-_ are safe; use another path."
        for what, path in (("--output", run), ("working directory", Path.cwd()), ("Python", sys.executable))
        if shlex.quote(str(path)) != str(path)
    ]
    if nodes > 1 and problems:
        raise InputError(*problems)
    return nodes


def command(run: Path, stage: int, *, ranks: int, hostfile: Path | None, tasks: Sequence[str] = ()) -> list[str]:
    """The command line that starts all ranks of a stage.

    Args:
        run: run directory, on a file system that all nodes share.
        stage: the stage to run.
        ranks: ranks on each node.
        hostfile: DeepSpeed hostfile (`host slots=n` lines) for several nodes.
        tasks: answer only the questions of these tasks, in place of the whole stage.
    """
    worker = [str(run), str(stage), *tasks]
    if hostfile is not None:
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile)]
        # Otherwise it puts an argument before those of the worker.
        return [*launcher, "--num_gpus", str(ranks), "--no_local_rank", "--module", _WORKER, *worker]
    return [*torchrun(ranks), "-m", _WORKER, *worker]


def torchrun(ranks: int) -> list[str]:
    """The start of a command line that starts `ranks` ranks on this node; what they run follows."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]


def environment(ranks: int) -> dict[str, str]:
    """The ranks' environment: threads shared out on a CPU, no network."""
    values = dict(os.environ)
    values.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    values.setdefault("HF_HUB_OFFLINE", "1")
    values.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not torch.cuda.is_available():
        values.setdefault("DS_ACCELERATOR", "cpu")
    return values


def run_job(
    run: Path,
    stage: int,
    *,
    ranks: int,
    hostfile: Path | None,
    distributed: DistributedConfig,
    poll: Callable[[], None],
    tasks: Sequence[str] = (),
) -> None:
    """Runs a stage's job to its end.

    Args:
        run: run directory.
        stage: the stage.
        ranks: ranks on each node.
        hostfile: see `command`.
        distributed: how long ranks wait for one another, and for how long they may go on when asked to stop.
        poll: called several times a second while the job runs.
        tasks: see `command`.

    Raises:
        InputError, RunError: a rank failed or hangs; the message names the rank, the step, its error, and the log file.
        Stopped: by a signal. The first one asks the ranks to stop, a second one ends them at once.
    """
    log = log_file(run, stage)
    log.parent.mkdir(parents=True, exist_ok=True)
    for old in (*log.parent.glob("failure-rank*.json"), progress_file(run), stop_file(run)):
        old.unlink(missing_ok=True)
    world_size = ranks * hosts(hostfile, run)
    with log.open("ab") as stream, noting() as signals:
        log_begin = stream.tell()
        process = subprocess.Popen(
            command(run, stage, ranks=ranks, hostfile=hostfile, tasks=tasks),
            stdout=stream,
            stderr=subprocess.STDOUT,
            # Ranks that a remote shell starts are not below this process, even on its own node.
            env=environment(ranks) | ({_RUN_PID: str(os.getpid())} if hostfile is None else {}),
            preexec_fn=die_with_parent,
            # Ctrl-C is for the command alone, which passes it on.
            start_new_session=True,
        )
        try:
            hangs = _wait(process, poll, signals, run, distributed)
        finally:
            _end(process)
    poll()
    where, minutes = f"stage {stage}, {_step(run)}", distributed.timeout_minutes
    if signals or stop_file(run).exists():
        raise Stopped(signals[0] if signals else signal.SIGTERM, f" in {where}")
    if hangs:
        raise hang(run, where, log, world_size, minutes)
    if process.returncode:
        raise failure(run, where, process.returncode, log, log_begin, world_size, minutes)


def _wait(
    process: subprocess.Popen[bytes],
    poll: Callable[[], None],
    signals: list[int],
    run: Path,
    distributed: DistributedConfig,
) -> bool:
    """Waits for the end of a job; once there is a signal, no longer than the grace period.

    Returns:
        Whether the job hangs: rank 0 has told of no progress for `longest_silence`.
    """
    deadline, quiet, told = math.inf, 0.0, 0
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        poll()
        # Counted in polls, so that no time passes while everything is suspended.
        before, told = told, _size(progress_file(run))
        quiet = 0.0 if told > before else quiet + _POLL_SECONDS
        if quiet > 60 * longest_silence(distributed.timeout_minutes):
            return True
        if signals and deadline == math.inf:
            stop_file(run).touch()
            deadline = time.monotonic() + distributed.grace_seconds
    return False


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a job that is still running; its ranks go with it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _step(run: Path) -> str:
    """The step that rank 0 was in when it last said so, and how far it was."""
    events = ProgressReader(progress_file(run)).new_events()
    if not events:
        return "start"
    last = events[-1]
    return f"{last.step} {last.done}/{last.total}" if last.total else last.step
