"""The bench at the size of LLaVA-1.5-7B, on a toy model: it runs to its end, and its figures follow its formulas."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("llava7b")


def test_the_tiny_form_runs(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = bench.main(["--tiny", "--output", str(tmp_path / "bench")])
    assert result["tiny"] is True
    for form in ("ours", "reference"):
        assert all(math.isfinite(value) and value > 0 for value in result[form].values())
        assert result["ucit_on_four_gpus_seconds"][form].keys() == {"measure", "decompose", "train", "generate", "load"}
    ours = result["ours"]
    # Two micro-batches of two samples in a step.
    mfu = 4 * ours["flops_per_sample"] / ours["train_seconds_per_step"] / result["matmul_flops_per_second"]
    assert ours["mfu"] == pytest.approx(mfu)
    assert result["predicted_bytes"].keys() == {"measure", "train", "evaluate"}
    assert "| train, ms a step |" in capsys.readouterr().out


def test_shapes_are_those_of_llava(bench: Any) -> None:
    architecture = bench.architecture(tiny=False)
    with torch.device("meta"):
        model = bench.LlavaForConditionalGeneration(architecture)
    decoder = sum(parameter.numel() for parameter in model.model.language_model.layers.parameters())
    # LLaMA-7B's blocks, and the projector of LLaVA-1.5.
    assert decoder == 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    assert sum(p.numel() for p in model.model.multi_modal_projector.parameters()) == 20_979_712


def test_a_whole_run_is_projected_from_its_steps(bench: Any) -> None:
    form = {
        "measure_seconds_per_sample": 0.1,
        "decompose_base_seconds": 40.0,
        "decompose_stage_seconds": 20.0,
        "train_seconds_per_step": 3.0,
        "generate_seconds_per_question": 0.2,
        "load_seconds": 10.0,
    }
    # Six tasks of 40,000 samples and 3,000 questions on four GPUs; 16 samples in a step of a GPU.
    assert bench.project(form, 16, 4) == pytest.approx(
        {"measure": 2 * 12_000 * 0.1, "decompose": 40.0, "train": 60_000 / 16 * 3, "generate": 5_400.0, "load": 240.0}
    )


@pytest.mark.distributed
def test_the_tiny_form_runs_on_two_ranks(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [str(BENCH / "llava7b.py"), "--tiny", "--output", str(tmp_path / "bench")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| train, ms a step |") == 1
    assert json.loads((tmp_path / "bench" / "llava7b.json").read_text())["ranks"] == 2
