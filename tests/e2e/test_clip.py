"""CLIP on two ranks over ZeRO-2, through the command line, equals one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny_clip
from llava_cl.config import load_config
from llava_cl.distributed import World
from llava_cl.pipeline import steps
from llava_cl.pipeline.job import Job
from llava_cl.pipeline.progress import ProgressWriter
from llava_cl.store import RunDirectory, load_tensors
from runs import run_here, write_config

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]
ZERO2 = Path(__file__).parents[2] / "configs" / "deepspeed" / "zero2.json"


def test_two_ranks_over_zero2_equal_one_process(tmp_path: Path) -> None:
    content = tiny_clip.run_content(tmp_path, cosine_heads=True)
    content["method"]["options"] = {"weight_energy": 0.5, "protect": "mean_feature", "b": "gradient"}
    content["training"]["weight_decay"] = 0.01
    config, two, one = write_config(tmp_path, content), tmp_path / "two", tmp_path / "one"
    options = ["--output", str(two), "--nproc", "2", "--until", "2", "--set", f"distributed.deepspeed={ZERO2}"]
    command = [sys.executable, "-m", "llava_cl.cli", "run", str(config), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = run_here(load_config(config), one, until=2)
    assert len(metrics["matrix"]) == 2
    for stage in ("01-T1", "02-T2"):
        ours, theirs = (
            load_tensors(run / "stages" / stage / "adapter" / "adapter_model.safetensors")[0] for run in (two, one)
        )
        assert any(".heads." in name for name in ours)
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=2e-4)
        for task in ("T1", "T2", "T3"):
            answers = [(run / "stages" / stage / "predictions" / f"{task}.jsonl").read_text() for run in (two, one)]
            assert answers[0] == answers[1]


def _start(folder: Path, *, cosine_heads: bool) -> dict[str, torch.Tensor]:
    """What the first stage starts from."""
    content = tiny_clip.run_content(folder, cosine_heads=cosine_heads)
    content["method"]["options"] = {"weight_energy": 0.5, "b": "gradient"}
    config = load_config(write_config(folder, content))
    run = RunDirectory(folder / f"run-{cosine_heads}", [task.name for task in config.benchmark.tasks])
    job = Job(config, run, World(0, 1, torch.device("cpu")), ProgressWriter(None))
    steps.protect_base(job, 0)
    (file,) = steps.initialise(job, 1)
    return load_tensors(file)[0]


def test_the_gradient_is_measured_before_the_head_of_class_means_is_there(tmp_path: Path) -> None:
    """As the authors of KeepLoRA+ do: the adapters start as KeepLoRA's, bit for bit."""
    plain, plus = _start(tmp_path, cosine_heads=False), _start(tmp_path, cosine_heads=True)
    head = plus.pop("start:heads.0.weight")
    torch.testing.assert_close(head.norm(dim=1), torch.ones(len(head)), rtol=0, atol=1e-5)
    assert plain.keys() == plus.keys()
    assert any(value.any() for value in plain.values())
    for name, value in plain.items():
        assert torch.equal(value, plus[name]), name
