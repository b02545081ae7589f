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
import torch
from typer.testing import CliRunner

import llava_cl
from llava_cl.cli import app
from llava_cl.config import load_config
from llava_cl.errors import InputError
from llava_cl.pipeline import node
from llava_cl.pipeline.launch import environment, hosts, meet, started, torchrun, worker
from llava_cl.pipeline.worker import _check_command
from llava_cl.store import RunDirectory
from llava_cl.store.fingerprint import fingerprint_code

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
    assert result.exit_code == 2, result.output  # the model is not there
    plan = json.loads(result.output)
    assert any("config.json" in problem for problem in plan["missing"])
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


LEFTOVERS = {
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "PARALLELISM_CONFIG_TP_SIZE": "2",
    "TRANSFORMERS_SDPA_FORCE_GQA": "1",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
    "NVIDIA_TF32_OVERRIDE": "1",
    "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
    "DS_ALLOW_DEPRECATED_FP16": "1",
    "DEEPSPEED_TIMEOUT": "1",
    "PET_NNODES": "2",
    "PET_RDZV_ENDPOINT": "nowhere:1",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "RANK": "7",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "7",
    "MASTER_ADDR": "nowhere",
    "MASTER_PORT": "1",
    "GROUP_RANK": "1",
    "OMPI_COMM_WORLD_RANK": "3",
    "PMI_SIZE": "4",
}
"""What other programs leave in an environment, which changes results or keeps a job from starting."""
PLACES = {"CUDA_VISIBLE_DEVICES": "", "NCCL_SOCKET_IFNAME": "lo", "HF_HOME": "/h", "TRANSFORMERS_VERBOSITY": "info"}


def test_ranks_get_no_variable_that_changes_a_result_or_a_meeting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**LEFTOVERS, **PLACES, "HF_HUB_OFFLINE": "0", "DS_ACCELERATOR": "xpu"}.items():
        monkeypatch.setenv(name, value)
    decided = environment(2)
    assert not LEFTOVERS.keys() & decided.keys()
    assert {name: decided.get(name) for name in PLACES} == PLACES
    assert (decided["HF_HUB_OFFLINE"], decided["DS_ACCELERATOR"]) == ("1", "cpu")
    assert decided["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize("installed", [True, False])
def test_ranks_import_the_package_of_the_command(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        llava_cl, "__file__", str(tmp_path / ("site-packages" if installed else "src") / "llava_cl/x.py")
    )
    monkeypatch.setenv("PYTHONPATH", "/mine")
    assert environment(1)["PYTHONPATH"] == ("/mine" if installed else f"{tmp_path / 'src'}:/mine")
    monkeypatch.delenv("PYTHONPATH")
    assert environment(1).get("PYTHONPATH") == (None if installed else str(tmp_path / "src"))


PROBE = """
import json, os, sys, pathlib
import torch, accelerate, llava_cl
print(json.dumps({
    "rank": os.environ["RANK"], "size": os.environ["WORLD_SIZE"], "llava_cl": llava_cl.__file__,
    "torch": torch.__version__, "precision": accelerate.Accelerator(cpu=True).mixed_precision}), flush=True)
"""


@pytest.mark.distributed
def test_a_job_in_a_strange_environment_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules in the working directory are not those of the ranks."""
    for name in ("torch.py", "accelerate.py", "llava_cl/__init__.py", "llava_cl/pipeline/worker.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('the wrong module')")
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "probe.py").write_text(PROBE)
    monkeypatch.chdir(tmp_path)
    for name, value in LEFTOVERS.items():
        monkeypatch.setenv(name, value)
    with (
        (tmp_path / "log").open("wb") as log,
        started([str(tmp_path / "probe" / "probe.py")], 1, None, log, 9) as (job,),
    ):
        code = job.wait(300)
    said = (tmp_path / "log").read_text()
    assert code == 0, said
    line = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    assert line == {
        "rank": "0",
        "size": "1",
        "llava_cl": llava_cl.__file__,
        "torch": torch.__version__,
        "precision": "no",
    }


def test_a_rank_with_other_code_or_settings_than_the_command_refuses(tmp_path: Path) -> None:
    config = load_config(RUNS / "playground_ucit_keeplora.yaml")
    run, code = RunDirectory(tmp_path, ()), fingerprint_code(config)
    identity = {"deepspeed": {}}
    run.record({"code": code, "identity": identity})
    _check_command(run, config)
    run.record({"code": {**code, "pipeline/steps.py": "0" * 64}, "identity": identity})
    with pytest.raises(InputError, match=rf"{Path(llava_cl.__file__).parent}: .*other than .* pipeline/steps\.py"):
        _check_command(run, config)
    run.record({"code": code, "identity": {"deepspeed": {"communication_data_type": "fp16"}}})
    with pytest.raises(InputError, match=r"zero2\.json: has changed since the command began"):
        _check_command(run, config)
    run.record({"code": code, "identity": {"deepspeed": True}})  # by an earlier version
    _check_command(run, config)
