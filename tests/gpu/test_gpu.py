"""What only a GPU can try: streams, bfloat16 units, its memory, its kernels, NCCL.

Each test runs in a process of its own (see tests/conftest.py). Where bytes are compared, both are of the GPU.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llava_cl.config import ModelConfig
from llava_cl.data import collate_train
from llava_cl.distributed import World
from llava_cl.models import LinearTarget, family
from llava_cl.store import read_json, read_jsonl
from llava_cl.subspace import expand_basis, principal_basis, residual_directions
from llava_cl.training.statistics import Statistics, measure, saves_memory
from llava_cl.training.sums import DeviceSums, HostSums, SumsPlace, add_product
from runs import result_hashes, write_config
from tiny import run_content
from tiny_samples import PAD_ID, build_samples

pytestmark = pytest.mark.gpu

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ROOT = Path(__file__).parents[2]


def _measured(device: torch.device, folder: Path, dtype: str, place: SumsPlace = "device") -> Statistics:
    llava = family(ModelConfig(path=folder / "model", dtype=dtype))
    model = llava.load(device)
    targets, samples = llava.linear_targets(model), build_samples("ititiitt")
    return measure(
        model,
        [collate_train(samples[start : start + 2], PAD_ID) for start in range(0, len(samples), 2)],
        targets,
        wanted=frozenset({"gradient", "second_moment", "mean_input"}),
        owners=dict.fromkeys([*targets, *(target.source for target in targets.values())], 0),
        world=World(0, 1, device),
        entries=llava.entries(model),
        token_mask=llava.token_mask,
        place=place,
    )


def _compare(found: Statistics, expected: Statistics, bound: float) -> None:
    for kind in ("gradient", "second_moment", "mean_input"):
        assert found.of(kind).keys() == expected.of(kind).keys()
        for name, value in expected.of(kind).items():
            error = (found.of(kind)[name].cpu() - value.cpu()).norm() / value.norm().cpu()
            assert error <= bound, (kind, name)


def test_sums_that_travel_on_streams_are_those_of_the_device() -> None:
    """Large sums, and operands whose memory is given out again while a stream still reads them."""
    places = (DeviceSums(GPU), HostSums(GPU))
    keys = [f"sum {number}" for number in range(5)]
    for sums in places:
        for key in keys:
            sums.start(key, (2048, 2048))
        generator = torch.Generator(GPU).manual_seed(0)
        for turn in range(40):
            left = torch.randn(512, 2048, device=GPU, generator=generator)
            right = torch.randn(512, 2048, device=GPU, generator=generator)
            sums.update(keys[turn % 5], lambda total, a=left, b=right: add_product(total, a, b))
            del left, right
            torch.full((512, 2048), torch.nan, device=GPU)
    for key in keys:
        assert torch.equal(places[0].take(key), places[1].take(key)), key


@pytest.mark.parametrize("place", ["host", 1e-5])
def test_where_sums_are_kept_changes_nothing(tiny_run: Path, place: Any) -> None:
    """But for the rounding of kernels that do not add up in one order."""
    _compare(_measured(GPU, tiny_run, "float32", place), _measured(GPU, tiny_run, "float32"), 1e-5)


def test_measuring_is_that_of_the_cpu(tiny_run: Path) -> None:
    torch.backends.cudnn.allow_tf32 = False
    _compare(_measured(GPU, tiny_run, "float32"), _measured(CPU, tiny_run, "float32"), 1e-3)
    _compare(_measured(GPU, tiny_run, "bfloat16"), _measured(CPU, tiny_run, "bfloat16"), 0.25)


def test_products_of_bfloat16_are_exact_up_to_the_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(4096, 256, generator=generator).bfloat16() for _ in range(2))
    total = torch.zeros(256, 256, device=GPU)
    add_product(total, left.to(GPU), right.to(GPU))
    exact = left.double().T @ right.double()
    # Rounded to bfloat16 the sums themselves would be off by 2e-3.
    assert (total.cpu() - exact).norm() / exact.norm() < 1e-5


def test_directions_are_those_of_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(700, 60, generator=generator), torch.randn(60, 900, generator=generator)
    weight = (left * torch.logspace(0, -3, 60)) @ right
    gradient = torch.randn(700, 900, generator=generator)
    bases = []
    for device in (CPU, GPU):
        basis = principal_basis(weight.to(device), 0.9)
        wider = expand_basis(basis, gradient.T.to(device), 0.3)
        bases.append((basis.cpu(), wider.cpu(), residual_directions(gradient.to(device), wider, 8).a.cpu()))
    for found, expected in zip(bases[1], bases[0], strict=True):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


class _Summed(LlamaForCausalLM):
    """Takes what `measure` gives."""

    def forward(self, per_sample: bool, **batch: Any) -> Any:
        return {"loss": super().forward(**batch).loss}


def test_a_gpu_whose_memory_runs_out_measures_again_with_checkpointing() -> None:
    """A real lack: the process may take half of what it takes without one."""
    torch.manual_seed(0)
    model = _Summed(LlamaConfig(vocab_size=64, hidden_size=512, intermediate_size=2048, num_hidden_layers=12))
    model.to(GPU).requires_grad_(False).eval()
    targets = {
        name: LinearTarget(module, name)
        for name, module in model.named_modules()
        if name.endswith("mlp.down_proj") and isinstance(module, torch.nn.Linear)
    }
    ids = torch.randint(64, (4, 2048), generator=torch.Generator().manual_seed(0))

    def run() -> tuple[Statistics, int]:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        measured = measure(
            model,
            [{"input_ids": ids, "labels": ids, "index": torch.arange(4)}],
            targets,
            wanted=frozenset({"gradient"}),
            owners=dict.fromkeys(targets, 0),
            world=World(0, 1, GPU),
            entries=[model.get_input_embeddings()],
            token_mask=lambda batch, source: batch["index"] >= 0,
        )
        return measured, torch.cuda.max_memory_reserved()

    expected, plenty = run()
    assert not saves_memory(model)
    torch.cuda.set_per_process_memory_fraction(plenty / 2 / torch.cuda.mem_get_info()[1])
    found, little = run()
    assert saves_memory(model)
    assert little <= plenty / 2
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed")
def test_flash_attention_gives_the_same_answers(tiny_run: Path) -> None:
    losses = []
    batch = {key: value.to(GPU) for key, value in collate_train(build_samples("itti"), PAD_ID).items()}
    del batch["index"]
    for attention in ("sdpa", "flash_attention_2"):
        config = ModelConfig.model_validate({"path": tiny_run / "model", "attention": attention})
        losses.append(float(family(config).load(GPU)(**batch)["loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def _run(folder: Path, output: str, ranks: int, **changes: Any) -> Path:
    """A whole stream as a user runs it; returns the run directory."""
    content = {**run_content(folder), "distributed": {"ranks": ranks}, **changes}
    command = [sys.executable, "-m", "llava_cl.cli", "run", str(write_config(folder, content))]
    done = subprocess.run([*command, "--output", str(folder / output)], capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr
    return folder / output


def _losses(run: Path) -> list[float]:
    return [row["loss"] for log in sorted(run.glob("stages/*/train_log.jsonl")) for row in read_jsonl(log)]


def test_a_run_that_is_deterministic_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (_run(tmp_path, name, 1, deterministic=True) for name in ("first", "second"))
    assert result_hashes(first)
    assert result_hashes(first) == result_hashes(second)


@pytest.mark.gpu(count=2)
def test_ranks_of_nccl_learn_what_one_learns(tmp_path: Path) -> None:
    alone, together = (_run(tmp_path, f"of-{ranks}", ranks) for ranks in (1, 2))
    assert _losses(together) == pytest.approx(_losses(alone), rel=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_on_a_gpu_learns_what_plain_training_learns(tmp_path: Path, stage: int) -> None:
    settings = {"ranks": 1, "deepspeed": str(ROOT / "configs" / "deepspeed" / f"zero{stage}.json")}
    plain, zero = _run(tmp_path, "plain", 1), _run(tmp_path, "zero", 1, distributed=settings)
    assert _losses(zero) == pytest.approx(_losses(plain), rel=1e-3)


def test_the_bench_at_7b_runs_in_its_smallest_form(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "llava7b.py"), "--tiny", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert not done.returncode, done.stdout + done.stderr
    result = read_json(tmp_path / "llava7b.json")
    assert result["device"] == torch.cuda.get_device_name()
    assert result["ours"]["measure_peak_bytes"] > 0
