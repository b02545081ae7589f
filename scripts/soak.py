"""Kills a run again and again, at random moments, until it ends; then compares its bytes with an undisturbed run's.

    python scripts/soak.py --output runs/soak --kills 300

Each round starts the command line and, after a random time, ends the command, one rank or all ranks with SIGKILL, or
sends the command SIGTERM, SIGINT or SIGHUP, or all processes SIGTERM. After every round no process may be left, and no
step that was recorded may have been recorded again. Runs that end are compared, and the next one begins, until there
were enough kills. The result is written to `soak.json`; the exit code is 1 where anything was wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAULTS = ("command", "one rank", "all ranks", "SIGTERM", "SIGINT", "SIGHUP", "SIGTERM to all")
RESULTS = ("adapter/*", "*.safetensors", "scores.json", "predictions/*.jsonl", "train_log.jsonl")
SECONDS_TO_END = 60


def start(arguments: argparse.Namespace, run: Path) -> subprocess.Popen[bytes]:
    """Starts the command line on a run directory."""
    command = [sys.executable, "-m", "llava_cl.cli", "run", str(arguments.config), "--output", str(run)]
    command += ["--nproc", str(arguments.nproc), "--until", str(arguments.until)]
    for override in (
        f"distributed.deepspeed={arguments.deepspeed}",
        "training.checkpoint_every=5",
        *arguments.overrides,
    ):
        command += ["--set", override]
    with run.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=heed_interrupts)


def heed_interrupts() -> None:
    """A shell's background jobs, and what they start, would ignore SIGINT, and those of nohup SIGHUP."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def processes_of(run: Path) -> dict[int, bool]:
    """Ids of the processes that have the run directory on their command line, and whether they are ranks."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                names = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(run).encode() in words:
                found[int(entry.name)] = any(name.startswith(b"RANK=") for name in names)
    return found


def disturb(process: subprocess.Popen[bytes], run: Path, fault: str, choice: random.Random) -> None:
    """Does to a running run what `fault` says."""
    all_of_it = processes_of(run)
    ranks = sorted(pid for pid, is_rank in all_of_it.items() if is_rank)
    victims = {"one rank": ranks and [choice.choice(ranks)], "all ranks": ranks, "SIGTERM to all": list(all_of_it)}
    number = signal.Signals[fault.split()[0]] if fault.startswith("SIG") else signal.SIGKILL
    for pid in victims.get(fault) or [process.pid]:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def records(run: Path) -> dict[str, int]:
    """When each complete step was recorded."""
    return {str(file): file.stat().st_mtime_ns for file in run.glob("stages/*/steps/*.json")}


def hashes(run: Path) -> dict[str, str]:
    """Hash of each adapter, basis, prediction and score."""
    files = sorted({file for pattern in RESULTS for file in run.glob(f"stages/*/{pattern}")})
    return {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def main() -> None:
    """Runs the rounds and writes the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/runs/playground_ucit_keeplora.yaml")
    parser.add_argument("--output", type=Path, required=True, help="a new folder for runs, logs and the summary")
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--until", type=int, default=2)
    parser.add_argument("--deepspeed", type=Path, default=ROOT / "configs/deepspeed/zero2.json")
    parser.add_argument("--longest", type=float, default=90, help="most seconds until a round is disturbed")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C")
    arguments = parser.parse_args()
    folder = arguments.output.resolve()
    folder.mkdir(parents=True)
    choice = random.Random(arguments.seed)
    begin = time.monotonic()
    if start(arguments, folder / "undisturbed").wait():
        sys.exit(f"the undisturbed run failed, see {folder / 'undisturbed.log'}")
    expected = hashes(folder / "undisturbed")
    kills: Counter[str] = Counter()
    wrong: list[str] = []
    finished = 0
    while kills.total() < arguments.kills:
        run = folder / f"run-{finished}"
        before, fault = records(run), choice.choice(FAULTS)
        process = start(arguments, run)
        try:
            code = process.wait(choice.uniform(1, arguments.longest))
        except subprocess.TimeoutExpired:
            disturb(process, run, fault, choice)
            kills[fault] += 1
            code = process.wait()
        else:
            if code:
                wrong.append(f"{run.name}: ended with {code} undisturbed")
        end = time.monotonic() + SECONDS_TO_END
        while processes_of(run) and time.monotonic() < end:
            time.sleep(0.2)
        if processes_of(run):
            wrong.append(f"{run.name}: processes are left {SECONDS_TO_END} s after {fault}")
            break
        after = records(run)
        wrong += [f"{file}: was recorded again" for file, then in before.items() if after.get(file) != then]
        if code == 0:
            found = hashes(run)
            different = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
            wrong += [f"{run.name}/{name}: differs from the undisturbed run" for name in sorted(different)]
            finished += 1
        print(f"{kills.total()} of {arguments.kills}: {fault}, exit code {code}, {len(wrong)} wrong", flush=True)
        if wrong:
            break
    summary = {
        "seed": arguments.seed,
        "kills": dict(kills),
        "runs_compared": finished,
        "files_compared": len(expected),
        "wrong": wrong,
        "seconds": round(time.monotonic() - begin),
    }
    (folder / "soak.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
