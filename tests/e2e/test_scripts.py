"""The shell scripts on the playground: four ranks answer and score as one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_cl.config import load_config
from llava_cl.store import load_tensors
from runs import run_here

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]
ROOT = Path(__file__).parents[2]
SMALL = ["training.epochs=1", "training.global_batch=64", "measurement.ratio=0.1", "evaluation.zero_shot=false"]
SMALL += ["evaluation.split=validation"]


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in the environment of the tests."""
    environment = {
        **os.environ,
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = ["bash", str(ROOT / "scripts" / name), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def test_four_ranks_over_the_scripts_equal_one_process(tmp_path: Path) -> None:
    four, one = tmp_path / "four", tmp_path / "one"
    overrides = [word for override in SMALL for word in ("--set", override)]
    done = script("Train_DCL/Task.sh", "1", "--nproc", "4", "--output", str(four), *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("Running the embedded playground; for LLaVA-1.5-7B set LLAVA_CL_MODEL")
    assert (four / "report" / "index.html").is_file()
    config = load_config(
        ROOT / "configs" / "runs" / "playground_dcl_keeplora.yaml", [*SMALL, "distributed.deepspeed=null"]
    )
    run_here(config, one, until=1)
    adapters = [load_tensors(run / "stages/01-Satellite/adapter/adapter_model.safetensors")[0] for run in (four, one)]
    for name, tensor in adapters[0].items():
        # Single elements near zero differ by more, as the ranks' sums are rounded in another order.
        assert (tensor - adapters[1][name]).norm() <= 1e-4 * adapters[1][name].norm(), name
    predictions = [sorted((run / "stages/01-Satellite/predictions").iterdir()) for run in (four, one)]
    assert len(predictions[0]) == 6
    for ours, theirs in zip(*predictions, strict=True):
        assert ours.read_text() == theirs.read_text()
    asked = script("eval/eval_task.sh", str(four), "1", "Satellite", "--json")
    assert asked.returncode == 0, asked.stderr
    score = json.loads(asked.stdout)["1"]["Satellite"]["score"]
    assert score == json.loads((one / "stages/01-Satellite/scores.json").read_text())["scores"]["Satellite"]["score"]


def test_a_script_without_what_it_needs_says_how_it_is_used() -> None:
    for name, said in (("Train_UCIT/Task.sh", "Task.sh N"), ("eval/eval_task.sh", "RUN STAGE TASK")):
        asked = script(name)
        assert asked.returncode == 2
        assert said in asked.stderr
