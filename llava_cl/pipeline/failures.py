"""Why a job failed: what its ranks leave behind, and the one message that is made of it."""

from __future__ import annotations

import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llava_cl.distributed import out_of_memory
from llava_cl.errors import InputError, LlavaClError, RunError
from llava_cl.store import read_json, write_json
from llava_cl.terminal import printable

_TORCH = Path(torch.__file__).parent
_PACKAGE = Path(__file__).parents[1]
_FULL_DISK = 1 << 20
"""Free bytes below which a disk is called full."""
_OUT_OF_MEMORY = (
    "Halve the batch of what it did: training.micro_batch, measurement.batch_size or evaluation.batch_size; the global "
    "batch stays as it is. docs/troubleshooting.md says what else helps."
)
_CAUSES = {
    "SIGKILL": "; the system does so where memory runs out",
    "SIGBUS": "; the system does so where /dev/shm or a disk is full (llava-cl doctor says how much there is)",
}
_ROOT_CAUSE = re.compile(
    r"^\s*rank\s*:\s*(?P<rank>\d+).*?^\s*exitcode\s*:\s*(?P<exitcode>-?\d+)", re.DOTALL | re.MULTILINE
)


def failure_file(run: Path, rank: int) -> Path:
    """Where a rank says why it failed."""
    return run / "logs" / f"failure-rank{rank}.json"


def failure_files(run: Path) -> list[Path]:
    """Those that ranks have left."""
    return sorted((run / "logs").glob("failure-rank*.json"))


def report_failure(run: Path, rank: int, error: Exception) -> None:
    """Tells the orchestrator what ended this rank."""
    explained = isinstance(error, LlavaClError)
    message = str(error) if explained else f"{type(error).__name__}: {error}"
    no_memory = out_of_memory(error)
    if no_memory:
        message += f"\n{_OUT_OF_MEMORY}"
    if not explained and shutil.disk_usage(run).free < _FULL_DISK:
        message += f"\n{_full(run)}"
    frames = traceback.extract_tb(error.__traceback__)
    # Most errors of the calculation itself have types of their own.
    waited = not no_memory and (type(error) is RuntimeError or isinstance(error, dist.DistError))
    _report(
        run,
        rank,
        frames,
        explained=explained,
        message=printable(message),
        exit_code=error.exit_code if isinstance(error, LlavaClError) else 1,
        waiting=waited and _waits(frames),
    )


def report_end(run: Path, rank: int) -> None:
    """Tells the orchestrator where this rank's main thread is, before the rank is ended from outside."""
    if failure_file(run, rank).exists():
        return
    frames = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident or 0])
    _report(run, rank, frames, ended=True, waiting=_waits(frames))


def _report(run: Path, rank: int, frames: Sequence[traceback.FrameSummary], **facts: Any) -> None:
    content = {"explained": False, "ended": False, "exit_code": 1, "message": "", **facts}
    content |= {"rank": rank, "time": time.time(), "place": _place(frames)}
    write_json(failure_file(run, rank), content)


def _waits(frames: Sequence[traceback.FrameSummary]) -> bool:
    """Whether the innermost frame is one in which a rank waits for others: a collective, or a backward pass."""
    innermost = Path(frames[-1].filename)
    return any(innermost.is_relative_to(_TORCH / part) for part in ("distributed", "autograd"))


def _place(frames: Sequence[traceback.FrameSummary]) -> str:
    """The innermost frame, and the innermost of this package."""
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)]
    places = [f"{'/'.join(Path(f.filename).parts[-2:])}:{f.lineno} in {f.name}" for f in (frames[-1], *own[-1:])]
    return ", from ".join(dict.fromkeys(places))


def longest_silence(timeout_minutes: float) -> float:
    """Minutes without progress after which a job hangs.

    A rank's own work may take as long as ranks wait for it; and where they have waited in vain, they have failed and
    torchrun has ended the rank that did not come, for which it takes half a minute.
    """
    return 2 * timeout_minutes + 1


def hang(run: Path, where: str, log: Path, ranks: int, timeout_minutes: float) -> RunError:
    """What to tell the user of a job that was ended because it hung; the arguments are those of `failure`."""
    elsewhere, silent = _absent(_reports(run), ranks)
    culprits = "; ".join(silent + elsewhere) or "every rank, as each waits for others"
    return RunError(
        f"{where}: no progress for {longest_silence(timeout_minutes):g} minutes (twice distributed.timeout_minutes, "
        f"and one), because of {culprits}. All ranks were ended. Details: {log}"
    )


def failure(
    run: Path,
    where: str,
    code: int,
    log: Path,
    log_begin: int,
    ranks: int,
    timeout_minutes: float,
    lost: Sequence[str] = (),
) -> LlavaClError:
    """What to tell the user of a job that failed: the first cause; what other ranks say is only the echo of it.

    Args:
        run: run directory.
        where: stage and step, for the message.
        code: exit code of the launcher.
        log: the job's log, whose end has torchrun's summary.
        log_begin: where in it the job began.
        ranks: of the job, on all nodes.
        timeout_minutes: how long ranks wait for one another.
        lost: nodes the connection to which ended before their ranks did.
    """
    reports = _reports(run)
    failed = sorted((each for each in reports if not each["ended"]), key=lambda each: each["time"])
    details = f"Details: {log}"
    for report in failed:
        if report["explained"]:
            kind = InputError if report["exit_code"] == InputError.exit_code else RunError
            return kind(f"{where}, rank {report['rank']}: {report['message']}\n{details}")
    killed = _killed(log, log_begin)
    # NCCL's watchdog aborts the ranks that have waited too long.
    waited = failed[0]["waiting"] if failed else bool(killed and killed[1] == "SIGABRT")
    if killed is not None and not (waited and killed[1] == "SIGABRT"):
        rank, name = killed
        return RunError(f"{where}, rank {rank}: was ended by {name}{_CAUSES.get(name, '')}. {details}")
    own = next((report for report in failed if not report["waiting"]), None)
    if own:
        return RunError(f"{where}, rank {own['rank']}: {own['message']}\n{details}")
    if lost:
        return RunError(
            f"{where}: the connection to {', '.join(lost)} was lost, and the ranks there with it. {details}"
        )
    if waited:
        elsewhere, silent = _absent(reports, ranks)
        absent = elsewhere or silent
        said = f"\nRank {failed[0]['rank']} then had: {failed[0]['message']}" if failed else ""
        waiting = f"waited {timeout_minutes:g} minutes (distributed.timeout_minutes) in vain for"
        if 0 < len(absent) < ranks:
            return RunError(f"{where}: others {waiting} {'; '.join(absent)}.{said}\n{details}")
        if ranks > 1:
            return RunError(
                f"{where}: the ranks {waiting} one another: is the network between them up?{said}\n{details}"
            )
    if failed:
        return RunError(f"{where}, rank {failed[0]['rank']}: {failed[0]['message']}\n{details}")
    full = f" {_full(run)}" if shutil.disk_usage(run).free < _FULL_DISK else ""
    return RunError(f"{where}: the job ended with exit code {code} and no rank said why.{full} {details}")


def _reports(run: Path) -> list[dict[str, Any]]:
    return [read_json(file) for file in failure_files(run)]


def _absent(reports: Sequence[dict[str, Any]], ranks: int) -> tuple[list[str], list[str]]:
    """The ranks that were not waiting for others when the job ended: those known to be elsewhere, and the silent."""
    elsewhere = [f"rank {each['rank']}, which was at {each['place']}" for each in reports if not each["waiting"]]
    silent = sorted(set(range(ranks)) - {each["rank"] for each in reports})
    return elsewhere, [f"rank {rank}, which did not answer any more" for rank in silent]


def _full(run: Path) -> str:
    return f"The disk of {run} is full: make room, then run the same command again; what is complete is kept."


def _killed(log: Path, begin: int) -> tuple[int, str] | None:
    """Rank and signal of the first failure that torchrun's summaries in the log tell, one a node, if it was a signal.

    A rank that waited in vain for one on another node may have been aborted before that one's end was told.
    """
    with log.open("rb") as stream:
        stream.seek(begin)
        text = stream.read().decode(errors="replace")
    names = {int(each): each.name for each in signal.Signals}
    killed = []
    for summary in text.split("Root Cause")[1:]:
        found = _ROOT_CAUSE.search(summary)
        if found is not None:
            code = int(found["exitcode"])
            # A rank that a signal ends by its own handler has the exit code of a shell.
            number = -code if code < 0 else code - 128
            killed += [(int(found["rank"]), names[number])] if number in names else []
    return min(killed, key=lambda each: each[1] == "SIGABRT", default=None)
