"""The command lines that start a job's ranks, on one node and on several."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llava_cl.cli import app
from llava_cl.errors import InputError
from llava_cl.pipeline.launch import command, hosts

RUNS = Path(__file__).parents[2] / "configs" / "runs"


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    file = tmp_path / "hosts"
    file.write_text("# two nodes\nnode1 slots=8\n\nnode2 slots=8  # the second\n")
    return file


def test_dry_run_on_several_nodes_shows_deepspeeds_command(hostfile: Path, tmp_path: Path) -> None:
    arguments = ["--hostfile", str(hostfile), "--nproc", "4", "--output", str(tmp_path / "run"), "--dry-run"]
    result = CliRunner().invoke(app, ["run", str(RUNS / "ucit_keeplora.yaml"), *arguments])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.output)
    started = shlex.split(plan["stages"][2]["command"])
    assert started[1:] == [
        *("-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--num_gpus", "4", "--no_local_rank"),
        *("--module", "llava_cl.pipeline.worker", str(tmp_path / "run"), "3"),
    ]
    assert not (tmp_path / "run").exists()
    assert hosts(hostfile, Path("run")) == 2


def test_ranks_of_all_nodes_must_share_the_global_batch(hostfile: Path, tmp_path: Path) -> None:
    arguments = ["--hostfile", str(hostfile), "--nproc", "3", "--dry-run"]
    result = CliRunner().invoke(app, ["run", str(RUNS / "ucit_keeplora.yaml"), *arguments])
    assert "6 ranks cannot share 64 samples evenly" in str(result.exception)


def test_paths_that_a_remote_shell_would_take_apart_are_refused(hostfile: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--output '.*a b'.*shell of every node"):
        hosts(hostfile, tmp_path / "a b")
    hostfile.write_text("node1 slots=8\n")
    assert hosts(hostfile, tmp_path / "a b") == 1
    with pytest.raises(InputError, match="none: cannot be read"):
        hosts(tmp_path / "none", tmp_path)


def test_one_node_is_started_by_torchrun(tmp_path: Path) -> None:
    started = command(tmp_path, 2, ranks=4, hostfile=None, tasks=["Fashion"])
    assert started[1:] == [
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"),
        *("-m", "llava_cl.pipeline.worker", str(tmp_path), "2", "Fashion"),
    ]
    assert hosts(None, Path("run")) == 1
