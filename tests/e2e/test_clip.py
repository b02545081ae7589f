"""CLIP on two ranks over ZeRO-2, through the command line, equals one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny_clip
from llava_cl.config import load_config
from llava_cl.store import load_tensors
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
