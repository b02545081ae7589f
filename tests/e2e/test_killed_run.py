"""The command line on two ranks over ZeRO-2: killed without warning, it leaves no process and can be continued."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tiny
from held_command import held_file
from llava_cl.store import read_json, read_jsonl
from processes import family_of, gone, processes_of, wait_for
from runs import result_hashes, write_config

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]
ROOT = Path(__file__).parents[2]
SHORT = {"zero_shot": False, "max_new_tokens": 3}
SOON = ("--set", "distributed.grace_seconds=5")


def start(
    config: Path, output: Path, *options: str, program: Sequence[str] = ("-m", "llava_cl.cli")
) -> subprocess.Popen[bytes]:
    """Starts the command line on two ranks."""
    arguments = [*program, "run", str(config), "--output", str(output), "--nproc", "2"]
    deepspeed = ["--set", f"distributed.deepspeed={ROOT / 'configs/deepspeed/zero2.json'}"]
    with (output.parent / f"{output.name}.log").open("ab") as log:
        return subprocess.Popen([sys.executable, *arguments, *deepspeed, *options], stdout=log, stderr=log)


def test_killed_run_continues_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another program has left its settings in the environment."""
    config = write_config(tmp_path, tiny.run_content(tmp_path))
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert start(config, undisturbed).wait(300) == 0, (tmp_path / "undisturbed.log").read_text()

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("PET_NNODES", "2")
    process = start(config, killed)
    wait_for((killed / "stages/01-Colour/steps/initialise.json").exists)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not processes_of(killed), 30)
    assert not (killed / "stages/01-Colour/stage.json").exists()

    assert start(config, killed).wait(300) == 0, (tmp_path / "killed.log").read_text()
    assert result_hashes(killed) == result_hashes(undisturbed)
    assert len(result_hashes(killed)) > 10
    assert "data-refresh" not in (killed / "report" / "index.html").read_text()  # nothing follows
    bases = [stage["basis"] for stage in read_json(killed / "metrics.json")["stages"]]
    assert all(0 < layer["energy"] <= 1 for basis in bases for layer in basis.values())
    assert len(bases[0]) > 10
    curves = EventAccumulator(str(killed / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    for folder in ("01-Colour", "02-Tone"):
        rows = read_jsonl(killed / "stages" / folder / "train_log.jsonl")
        points = [(point.step, point.value) for point in curves.Scalars(f"loss/{folder}")]
        assert points == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in rows]


def test_failing_rank_is_named_and_stops_the_job(tmp_path: Path) -> None:
    config, picture = write_config(tmp_path, tiny.run_content(tmp_path)), tmp_path / "data/images/Colour/3.png"
    Image.effect_noise((400, 400), 80).save(picture)
    assert start(config, tmp_path / "run", "--until", "0").wait(300) == 0
    # After the run has checked its data, and where the fingerprint of a large picture does not look.
    content = bytearray(picture.read_bytes())
    assert len(content) > 100_000
    content[len(content) // 2] ^= 1
    picture.write_bytes(content)
    assert start(config, tmp_path / "run").wait(300) == 2
    said = (tmp_path / "run.log").read_text()
    assert re.search(r"error: stage 1, [a-z]+.*, rank \d: ", said)
    assert "Colour/3.png" in said
    assert not processes_of(tmp_path / "run")


def test_a_killed_rank_is_named_with_its_signal(tmp_path: Path) -> None:
    config, run = write_config(tmp_path, tiny.run_content(tmp_path)), tmp_path / "run"
    process = start(config, run, "--until", "1")
    wait_for((run / "stages/01-Colour/steps/initialise.json").exists)
    ranks = [pid for pid in processes_of(run) if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
    assert len(ranks) == 1
    os.kill(ranks[0], signal.SIGKILL)
    assert process.wait(120) == 1
    said = (tmp_path / "run.log").read_text()
    assert re.search(r"error: stage 1, [a-z]+.*, rank 1: was ended by SIGKILL", said)
    assert "Connection" not in said
    assert not processes_of(run)


def trained_steps(run: Path) -> int:
    """Optimizer steps of the running stage that rank 0 has told of."""
    file = run / "logs" / "progress.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    events = [json.loads(line) for line in lines if line.endswith("}")]
    return max((event["done"] for event in events if event["step"] == "train"), default=0)


def test_a_run_that_is_asked_to_stop_keeps_its_training_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ctrl-C, by a cluster that signals every process, and by a lost terminal under Python 3.14's start method."""
    content = tiny.run_content(tmp_path, evaluation=SHORT)
    content["training"] |= {"epochs": 3, "workers": 2}
    config = write_config(tmp_path, content)
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    assert start(config, undisturbed, "--until", "1").wait(300) == 0, (tmp_path / "undisturbed.log").read_text()

    tests = Path(__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", str(tests))
    rounds = ((signal.SIGINT, 2, "fork"), (signal.SIGTERM, 4, "fork"), (signal.SIGHUP, 7, "forkserver"))
    for number, step, method in rounds:
        monkeypatch.setenv("HELD", str(step))
        monkeypatch.setenv("START_METHOD", method)
        process = start(config, stopped, "--until", "1", program=[str(tests / "held_command.py")])
        waiting = [held_file(stopped, step, rank) for rank in range(2)]
        wait_for(lambda: all(file.exists() for file in waiting) or process.poll() is not None)  # noqa: B023
        family = family_of(process.pid)
        assert len(family) >= 8, (tmp_path / "stopped.log").read_text()  # command, torchrun, ranks, readers
        served = [pid for pid in family if b"forkserver import main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(served) == (6 if method == "forkserver" else 0)  # a server and two readers for each rank
        # A server imports for all.
        assert all("libtorch" in Path(f"/proc/{pid}/maps").read_text() for pid in served)
        for pid in [process.pid] if number == signal.SIGINT else family:
            os.kill(pid, number)
        assert process.wait(300) == 128 + number
        said = (tmp_path / "stopped.log").read_text()
        assert re.search(rf"stopped by {number.name} in stage 1, train .*training up to step {step}\.", said), said
        wait_for(lambda: gone(family))  # noqa: B023
        assert not (stopped / "stages/01-Colour/steps/train.json").exists()

    assert start(config, stopped, "--until", "1").wait(300) == 0, (tmp_path / "stopped.log").read_text()
    assert result_hashes(stopped) == result_hashes(undisturbed)


def test_a_rank_that_hangs_is_named_and_all_ranks_end(tmp_path: Path) -> None:
    """Torchrun waits for it as long as it would for a resume point."""
    content = tiny.run_content(tmp_path, evaluation=SHORT)
    content["training"]["epochs"] = 500
    config, run = write_config(tmp_path, content), tmp_path / "run"
    process = start(config, run, "--until", "1", "--set", "distributed.timeout_minutes=0.4", *SOON)
    wait_for(lambda: trained_steps(run) > 0)
    ranks = [pid for pid in processes_of(run) if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
    os.kill(ranks[0], signal.SIGSTOP)
    assert process.wait(240) == 1
    said = (tmp_path / "run.log").read_text()
    assert re.search(
        r"error: stage 1, train \d+/\d+: others waited 0\.4 minutes \(\S+\) in vain for rank 1,",
        said,
    ), said
    assert not processes_of(run)


def test_a_rank_that_hangs_alone_is_named_and_ended(tmp_path: Path) -> None:
    """Nobody waits for it, so the command itself notices that there is no progress."""
    content = tiny.run_content(tmp_path, evaluation=SHORT)
    content["training"]["epochs"] = 500
    config, run = write_config(tmp_path, content), tmp_path / "run"
    process = start(config, run, "--until", "1", "--nproc", "1", "--set", "distributed.timeout_minutes=0.05")
    wait_for(lambda: trained_steps(run) > 0)
    ranks = [pid for pid in processes_of(run) if b"RANK=0" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
    os.kill(ranks[0], signal.SIGSTOP)
    assert process.wait(300) == 1
    said = (tmp_path / "run.log").read_text()
    assert re.search(
        r"error: stage 1, train \d+/\d+: no progress for 1\.1 minutes .* because of rank 0, which did not answer", said
    ), said
    assert not processes_of(run)


def test_ranks_that_a_remote_shell_started_end_with_their_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are children of the shell's server, which tells them that the connection is gone."""
    shell = tmp_path / "bin" / "ssh"
    shell.parent.mkdir()
    shell.write_text('#!/bin/sh\nwhile [ "$1" != node1 ]; do shift; done\nshift\nexec sh -c "$*"\n')
    shell.chmod(0o755)
    monkeypatch.setenv("PATH", f"{shell.parent}:{os.environ['PATH']}")
    (tmp_path / "hosts").write_text("node1 slots=1\n")
    content = tiny.run_content(tmp_path, evaluation=SHORT)
    content["training"]["epochs"] = 500
    config, run = write_config(tmp_path, content), tmp_path / "run"
    process = start(config, run, "--until", "1", "--nproc", "1", "--hostfile", str(tmp_path / "hosts"))
    wait_for(lambda: trained_steps(run) > 0 or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not processes_of(run))
    assert not (run / "stages/01-Colour/steps/train.json").exists()
