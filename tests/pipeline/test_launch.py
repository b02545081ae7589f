"""The command lines that start a job's ranks, on one node and on several, and what is read from a hostfile."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llava_cl.cli import app
from llava_cl.errors import InputError
from llava_cl.pipeline import node
from llava_cl.pipeline.launch import hosts, meet, torchrun, worker

RUNS = Path(__file__).parents[2] / "configs" / "runs"


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    file = tmp_path / "hosts"
    file.write_text("# two nodes\nnode1 slots=8\n\nme@node2.cluster slots=8  # the second\n")
    return file


def _shell(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """An `ssh` that runs a script with the host in $1 and the command in $2."""
    (folder / "ssh").write_text(f'#!/bin/sh\nwhile [ "${{1#node}}" = "$1" ]; do shift; done\n{script}\n')
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_dry_run_on_several_nodes_shows_the_first_nodes_command(hostfile: Path, tmp_path: Path) -> None:
    arguments = ["--hostfile", str(hostfile), "--nproc", "4", "--output", str(tmp_path / "run"), "--dry-run"]
    result = CliRunner().invoke(app, ["run", str(RUNS / "ucit_keeplora.yaml"), *arguments])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.output)
    started = shlex.split(plan["stages"][2]["command"])
    assert started[1:] == [
        *("-m", "torch.distributed.run", "--nnodes=2", "--node_rank=0", "--master_addr=node1", "--master_port=PORT"),
        *("--nproc_per_node", "4", "-m", "llava_cl.pipeline.worker", str(tmp_path / "run"), "3"),
    ]
    assert not (tmp_path / "run").exists()
    assert hosts(hostfile, 4) == ["node1", "me@node2.cluster"]


def test_ranks_of_all_nodes_must_share_the_global_batch(hostfile: Path, tmp_path: Path) -> None:
    arguments = ["--hostfile", str(hostfile), "--nproc", "3", "--dry-run"]
    result = CliRunner().invoke(app, ["run", str(RUNS / "ucit_keeplora.yaml"), *arguments])
    assert "6 ranks cannot share 64 samples evenly" in str(result.exception)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "names no node"),
        ("# node1 slots=8\n\n", "names no node"),
        ("node1\n", r"line 1: 'node1' is not of the form `node1 slots=8`"),
        ("node1 slots=8\nnode2 slots=\n", "line 2: 'node2 slots='"),
        ("node1 slots=8 max=9\n", "line 1: "),
        ("-oProxyCommand=x slots=8\n", "line 1: "),
        ("a;b slots=8\n", "line 1: "),
        ("node1 slots=8\nnode1 slots=8\n", "line 2: node1 is there twice"),
        ("node1 slots=8\nnode2 slots=3\n", "node2 has 3 slots, 4 ranks are asked of each node"),
        ("node1 slots=0\n", "node1 has 0 slots"),
    ],
)
def test_hostfiles_that_name_no_nodes_are_refused(tmp_path: Path, text: str, wrong: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(InputError, match=wrong):
        hosts(tmp_path / "hosts", 4)


def test_all_that_is_wrong_with_a_hostfile_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("junk\nnode1 slots=1\nmore junk\n")
    with pytest.raises(InputError) as error:
        hosts(tmp_path / "hosts", 2)
    assert all(part in str(error.value) for part in ("line 1", "line 3", "node1 has 1 slots"))
    with pytest.raises(InputError, match="none: cannot be read"):
        hosts(tmp_path / "none", 1)


def test_one_node_is_started_by_torchrun(tmp_path: Path) -> None:
    assert [*torchrun(4), *worker(tmp_path, 2, ["Fashion"])][1:] == [
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"),
        *("-m", "llava_cl.pipeline.worker", str(tmp_path), "2", "Fashion"),
    ]
    assert hosts(None, 4) == ["localhost"]


def test_nodes_that_cannot_take_part_are_all_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is down, one without the Python, one that does not see the run directory; what a login prints is none
    of an answer.
    """
    _shell(
        tmp_path,
        monkeypatch,
        'case $1 in\nnode1) echo Welcome; exec sh -c "$2";;\nnode2) echo No route to host >&2; exit 255;;\n'
        'node3) sh -c "/none/$2";;\nnode4) cd /; exec sh -c "$(echo "$2" | sed s/run-directory/elsewhere/)";;\nesac',
    )
    run = tmp_path / "run-directory of mine"
    run.mkdir()
    with pytest.raises(InputError) as error:
        meet(["node1", "node2", "node3", "node4"], run)
    said = str(error.value)
    assert "node1:" not in said
    for part in (
        "node2: no rank can be started there: No route to host",
        "node3: ",
        "node4: ",
        "elsewhere of mine is not there",
    ):
        assert part in said
    meeting = meet(["node1"], run)
    assert isinstance(meeting.port, int)
    assert meeting.address == subprocess.check_output(["hostname", "-I"], text=True).split()[0]


def test_ranks_of_every_node_have_the_environment_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A login's own variables, which a node's shell sets, change no calculation: neither by being there nor missing."""
    sent = {
        "OMP_NUM_THREADS": "3",
        "NCCL_DEBUG": "a b\n'\"$x",
        "HOME": "/home/here",
        "SSH_TTY": "1",
        "PATH": "/venv/bin",
    }
    here = {"ACCELERATE_MIXED_PRECISION": "bf16", "HOME": "/home/there", "XDG_RUNTIME_DIR": "/run/1", "PATH": "/bin"}
    assert node.ranks_environment(sent, here) == {
        "OMP_NUM_THREADS": "3",
        "NCCL_DEBUG": "a b\n'\"$x",
        "HOME": "/home/there",
        "XDG_RUNTIME_DIR": "/run/1",
        "PATH": "/venv/bin",
    }


def _held(job: dict[str, object]) -> subprocess.Popen[bytes]:
    holder = subprocess.Popen([sys.executable, "-P", node.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    node.send(holder, {"folder": "/", "environment": {}, "address": "127.0.0.1", **job})
    return holder


def test_a_node_passes_on_output_and_exit_code_of_its_ranks() -> None:
    show = 'import os; print(os.environ["A"], os.environ["GLOO_SOCKET_IFNAME"], os.getcwd()); raise SystemExit(7)'
    holder = _held({"command": [sys.executable, "-c", show], "environment": {"A": 'é \' "$x"'}})
    assert holder.stdout is not None
    assert holder.stdout.read().decode() == 'é \' "$x" lo /\n'
    assert holder.wait() == 7
    holder = _held({"command": [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]})
    assert holder.wait() == 128 + signal.SIGKILL


@pytest.mark.parametrize("ending", ["the connection ends", "the node's holder is killed"])
def test_ranks_on_a_node_end_with_their_connection(ending: str) -> None:
    """Also those that heed no signal."""
    stubborn = 'import signal, time; signal.signal(15, signal.SIG_IGN); print("there", flush=True); time.sleep(600)'
    holder = _held({"command": [sys.executable, "-c", f"import os; print(os.getpid()); {stubborn}"]})
    assert holder.stdout is not None and holder.stdin is not None
    pid = int(holder.stdout.readline())
    assert holder.stdout.readline() == b"there\n"
    if ending == "the connection ends":
        holder.stdin.close()
    else:
        holder.kill()
    holder.wait(60)
    end = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
