"""Starting the ranks of a stage job and waiting for them: torchrun on every node, by ssh where there are several."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

import llava_cl
from llava_cl.config import DistributedConfig
from llava_cl.environment import MEETING, RESULT, drop
from llava_cl.errors import InputError
from llava_cl.parsing import read_text, shown
from llava_cl.pipeline import node
from llava_cl.pipeline.failures import failure, failure_files, hang, longest_silence
from llava_cl.pipeline.progress import ProgressReader
from llava_cl.stopping import SIGNALS, Stopped, heeded, noting

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_FAILED_SECONDS = 10
"""How long after a failure the ranks of other nodes, which now wait in vain, may take to end by themselves."""
_ANSWER_SECONDS = 60
"""How long a node may take to answer."""
_SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=20")
_SSH_LOST = 255
_WORKER = "llava_cl.pipeline.worker"
_HOST = re.compile(r"(?P<host>[\w.@:%][\w.@:%-]*)\s+slots=(?P<slots>\d+)")


@dataclass(frozen=True)
class Meeting:
    """Several nodes, and the address and port at which their ranks meet: the first node's."""

    hosts: Sequence[str]
    address: str
    port: int | str


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


def hosts(hostfile: Path | None, ranks: int) -> list[str]:
    """The nodes of a hostfile in DeepSpeed's format (`host slots=n` lines, # comments); this one without a file.

    Args:
        hostfile: the file.
        ranks: to be started on each node.

    Raises:
        InputError: the file cannot be read or names no node, a line is not of that form, a node is there twice or has
            fewer slots than ranks.
    """
    if hostfile is None:
        return ["localhost"]
    found: dict[str, int] = {}
    problems = []
    for number, line in enumerate(read_text(hostfile).splitlines(), 1):
        text = line.split("#")[0].strip()
        match = _HOST.fullmatch(text)
        if match is None:
            problems += (
                [f"{hostfile}, line {number}: {shown(text)} is not of the form `node1 slots=8`."] if text else []
            )
        elif match["host"] in found:
            problems.append(f"{hostfile}, line {number}: {match['host']} is there twice; name each node once.")
        else:
            found[match["host"]] = int(match["slots"])
    problems += [
        f"{hostfile}: {host} has {slots} slots, {ranks} ranks are asked of each node; ask for fewer with --nproc."
        for host, slots in found.items()
        if slots < ranks
    ]
    if problems or not found:
        raise InputError(*(problems or [f"{hostfile}: names no node; give each a line such as `node1 slots=8`."]))
    return list(found)


def meet(names: Sequence[str], run: Path) -> Meeting:
    """Looks whether a job can be started on every node, and asks the first one where ranks can meet.

    Args:
        names: the nodes.
        run: run directory, which all nodes must see.

    Raises:
        InputError: nodes that cannot be reached by ssh, lack this Python or package, or do not see the run directory.
    """
    asked = [
        subprocess.Popen(
            _on(name, str(run)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for name in names
    ]
    problems, answers = [], []
    for name, process in zip(names, asked, strict=True):
        try:
            out, said = process.communicate(timeout=_ANSWER_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            out, said = process.communicate()
            said += f"no answer within {_ANSWER_SECONDS} s"
        if process.returncode:
            problems.append(
                f"{name}: no rank can be started there: {said.strip()}\nA node needs ssh without a password and the "
                "same paths as this one (docs/running.md)."
            )
        else:
            # A login may print lines of its own.
            answers.append(json.loads(out.splitlines()[-1]))
    if problems:
        raise InputError(*problems)
    address, port = answers[0]
    return Meeting(names, address, port)


def _on(host: str, *arguments: str) -> list[str]:
    """The command line that runs `node` on a host."""
    return [*_SSH, host, shlex.join([sys.executable, "-P", node.__file__, *arguments])]


def worker(run: Path, stage: int, tasks: Sequence[str] = ()) -> list[str]:
    """What every rank of a stage runs.

    Args:
        run: run directory, on a file system that all nodes share.
        stage: the stage to run.
        tasks: answer only the questions of these tasks, in place of the whole stage.
    """
    return ["-m", _WORKER, str(run), str(stage), *tasks]


def torchrun(ranks: int, meeting: Meeting | None = None, number: int = 0) -> list[str]:
    """The start of a command line that starts `ranks` ranks on a node, the `number`-th; what they run follows."""
    nodes = ["--standalone"]
    if meeting is not None:
        nodes = [f"--nnodes={len(meeting.hosts)}", f"--node_rank={number}"]
        nodes += [f"--master_addr={meeting.address}", f"--master_port={meeting.port}"]
    return [sys.executable, "-m", "torch.distributed.run", *nodes, "--nproc_per_node", str(ranks)]


def environment(ranks: int) -> dict[str, str]:
    """The ranks' environment: this process's without what changes results, threads shared out on a CPU, no network.

    Ranks import the package that this process has imported, and nothing from the working directory.
    """
    values = dict(os.environ)
    drop(values, RESULT + MEETING)
    values.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    values.setdefault("TOKENIZERS_PARALLELISM", "false")
    values |= {"HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    values["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() else "cpu"
    root = Path(llava_cl.__file__).parents[1]
    if root.name not in ("site-packages", "dist-packages"):
        values["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), values.get("PYTHONPATH"))))
    return values


@contextlib.contextmanager
def started(
    what: Sequence[str], ranks: int, meeting: Meeting | None, output: IO[bytes], grace_seconds: float
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Inside the block one launcher a node is running, and its ranks with it; they end with the block at the latest.

    Args:
        what: what every rank runs, see `worker`.
        ranks: ranks on each node.
        meeting: of several nodes; None for this one.
        output: takes all that the ranks print.
        grace_seconds: for how long they may go on where their launcher gets a signal, too.
    """
    processes = []

    def start(line: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        # Ctrl-C is for the command alone, which passes it on.
        process = subprocess.Popen(line, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, **options)
        processes.append(process)
        return process

    decided = environment(ranks) | {
        # By itself torchrun also takes signals that this process was started to ignore, and gives the ranks 30 s.
        "TORCHELASTIC_SIGNALS_TO_HANDLE": ",".join(number.name for number in heeded()),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(math.ceil(grace_seconds)),
    }
    try:
        if meeting is None:
            own = decided | {node.RUN_PID: str(os.getpid())}
            start([*torchrun(ranks), *what], env=own, preexec_fn=node.die_with_parent)
        else:
            job = {"environment": decided, "folder": str(Path.cwd()), "address": meeting.address}
            for number, host in enumerate(meeting.hosts):
                connection = start(_on(host), stdin=subprocess.PIPE, preexec_fn=_die_with_parent_alone)
                node.send(connection, {**job, "command": [*torchrun(ranks, meeting, number), *what]})
        yield processes
    finally:
        node.end(*processes)


def _die_with_parent_alone() -> None:
    """As `die_with_parent`, for a connection: what asks a whole process group to stop must not cut it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    node.die_with_parent()


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
        hostfile: see `hosts`; None for this node alone.
        distributed: how long ranks wait for one another, and for how long they may go on when asked to stop.
        poll: called several times a second while the job runs.
        tasks: see `worker`.

    Raises:
        InputError, RunError: a rank failed or hangs; the message names the rank, the step, its error, and the log file.
        Stopped: by a signal. The first one asks the ranks to stop, a second one ends them at once.
    """
    log = log_file(run, stage)
    log.parent.mkdir(parents=True, exist_ok=True)
    for old in (*failure_files(run), progress_file(run), stop_file(run)):
        old.unlink(missing_ok=True)
    names = hosts(hostfile, ranks)
    # As a signal comes: where the ranks got it, too, they look for the file at once.
    with log.open("ab") as stream, noting(stop_file(run).touch) as signals:
        log_begin = stream.tell()
        meeting = meet(names, run) if hostfile else None
        with started(worker(run, stage, tasks), ranks, meeting, stream, distributed.grace_seconds) as processes:
            hangs = _wait(processes, poll, signals, run, distributed)
    poll()
    where, minutes = f"stage {stage}, {_step(run)}", distributed.timeout_minutes
    if signals or stop_file(run).exists():
        raise Stopped(signals[0] if signals else signal.SIGTERM, f" in {where}")
    if hangs:
        raise hang(run, where, log, ranks * len(names), minutes)
    codes = [process.returncode for process in processes]
    if any(codes):
        lost = [name for name, code in zip(names, codes, strict=True) if meeting and code == _SSH_LOST]
        raise failure(run, where, next(filter(None, codes)), log, log_begin, ranks * len(names), minutes, lost)


def _wait(
    processes: Sequence[subprocess.Popen[bytes]],
    poll: Callable[[], None],
    signals: list[int],
    run: Path,
    distributed: DistributedConfig,
) -> bool:
    """Waits for the end of a job; once there is a signal, no longer than the grace period.

    Returns:
        Whether the job hangs: rank 0 has told of no progress for `longest_silence`.
    """
    deadline, quiet, told, asked = math.inf, 0.0, 0, False
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        poll()
        # Counted in polls, so that no time passes while everything is suspended.
        before, told = told, _size(progress_file(run))
        quiet = 0.0 if told > before else quiet + _POLL_SECONDS
        if quiet > 60 * longest_silence(distributed.timeout_minutes):
            return True
        if signals and not asked:
            asked, deadline = True, time.monotonic() + distributed.grace_seconds
        elif (
            deadline == math.inf and len(processes) > 1 and (failure_files(run) or any(p.returncode for p in processes))
        ):
            deadline = time.monotonic() + _FAILED_SECONDS
    return False


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _step(run: Path) -> str:
    """The step that rank 0 was in when it last said so, and how far it was."""
    events = ProgressReader(progress_file(run)).new_events()
    if not events:
        return "start"
    last = events[-1]
    return f"{last.step} {last.done}/{last.total}" if last.total else last.step
