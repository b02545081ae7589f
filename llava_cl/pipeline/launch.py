"""Starting the ranks of a stage job and waiting for them: torchrun on one node, DeepSpeed's launcher on several."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from llava_cl.errors import InputError, LlavaClError, RunError
from llava_cl.parsing import read_text, shown
from llava_cl.store import read_json

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 20
_WORKER = "llava_cl.pipeline.worker"
_PR_SET_PDEATHSIG = 1
_RUN_PID = "LLAVA_CL_RUN_PID"
_ROOT_CAUSE = re.compile(
    r"^\s*rank\s*:\s*(?P<rank>\d+).*?^\s*exitcode\s*:\s*(?P<exitcode>-?\d+)", re.DOTALL | re.MULTILINE
)


def die_with_parent() -> None:
    """Asks the kernel to kill this process when its parent dies, so that no rank outlives a killed run (Linux).

    A run that has been killed before the request is found by its process id, which only its own node has.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    run = os.environ.get(_RUN_PID)
    if run is not None and not Path(f"/proc/{run}").exists():
        os._exit(1)


def progress_file(run: Path) -> Path:
    """Where rank 0 reports its progress."""
    return run / "logs" / "progress.jsonl"


def failure_file(run: Path, rank: int) -> Path:
    """Where a rank says why it failed."""
    return run / "logs" / f"failure-rank{rank}.json"


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
        return [*launcher, "--num_gpus", str(ranks), "--module", _WORKER, *worker]
    return [*torchrun(ranks), "-m", _WORKER, *worker]


def torchrun(ranks: int) -> list[str]:
    """The start of a command line that starts `ranks` ranks on this node; what they run follows."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]


def environment(ranks: int) -> dict[str, str]:
    """The ranks' environment: threads shared out on a CPU, no network."""
    values = {**os.environ, _RUN_PID: str(os.getpid())}
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
    poll: Callable[[], None],
    tasks: Sequence[str] = (),
) -> None:
    """Runs a stage's job to its end.

    Args:
        run: run directory.
        stage: the stage.
        ranks: ranks on each node.
        hostfile: see `command`.
        poll: called several times a second while the job runs.
        tasks: see `command`.

    Raises:
        InputError, RunError: a rank failed; the message names the rank, its error, and the log file.
    """
    log = log_file(run, stage)
    log.parent.mkdir(parents=True, exist_ok=True)
    for old in log.parent.glob("failure-rank*.json"):
        old.unlink()
    progress_file(run).unlink(missing_ok=True)
    with log.open("ab") as stream:
        log_begin = stream.tell()
        process = subprocess.Popen(
            command(run, stage, ranks=ranks, hostfile=hostfile, tasks=tasks),
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment(ranks),
            preexec_fn=die_with_parent,
        )
        try:
            while process.poll() is None:
                time.sleep(_POLL_SECONDS)
                poll()
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(_GRACE_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
    poll()
    if process.returncode:
        raise _failure(run, stage, process.returncode, log_begin)


def _failure(run: Path, stage: int, code: int, log_begin: int) -> LlavaClError:
    """The first failure that explains itself, else the rank that a signal ended; the others are only the echo of it."""
    log = log_file(run, stage)
    reports = [read_json(file) for file in log.parent.glob("failure-rank*.json")]
    first = min(reports, key=lambda report: (not report["explained"], report["time"]), default=None)
    killed = _killed(log, log_begin)
    if killed is not None and not (first and first["explained"]):
        rank, name = killed
        cause = "; the system does so where memory runs out" if name == "SIGKILL" else ""
        return RunError(f"stage {stage}, rank {rank}: was ended by {name}{cause}. Details: {log}")
    if first:
        kind = InputError if first["exit_code"] == InputError.exit_code else RunError
        return kind(f"stage {stage}, rank {first['rank']}: {first['message']}\nDetails: {log}")
    return RunError(f"stage {stage}: the job ended with exit code {code} and no rank said why. Details: {log}")


def _killed(log: Path, begin: int) -> tuple[int, str] | None:
    """Rank and signal of the first failure that torchrun's summary at the end of the log tells, if it was a signal."""
    with log.open("rb") as stream:
        stream.seek(begin)
        text = stream.read().decode(errors="replace")
    summary = text.rpartition("Root Cause")[2] if "Root Cause" in text else ""
    found = _ROOT_CAUSE.search(summary)
    if found is None:
        return None
    number = -int(found["exitcode"])
    names = {int(each): each.name for each in signal.Signals}
    return (int(found["rank"]), names[number]) if number in names else None
