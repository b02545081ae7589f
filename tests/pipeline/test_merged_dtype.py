"""`model.merged_dtype`: merged weights in another precision for measuring and evaluating; training is not touched."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from llava_cl.config import load_config
from llava_cl.distributed import World
from llava_cl.errors import InputError
from llava_cl.pipeline.job import Job
from llava_cl.pipeline.preflight import check_plan
from llava_cl.pipeline.progress import ProgressWriter
from llava_cl.store import RunDirectory
from ranks import run_ranks
from runs import result_hashes, run_here, tiny_config

ALONE = World(0, 1, torch.device("cpu"))
ZERO = Path(__file__).parents[2] / "configs" / "deepspeed"
BFLOAT16 = ("model.dtype=bfloat16", "training.projector_learning_rate=null")
FLOAT32 = "model.merged_dtype=float32"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a run of two stages in bfloat16, measured and evaluated in float32."""
    folder = tmp_path_factory.mktemp("merged")
    run_here(tiny_config(folder, tiny.run_content(folder), *BFLOAT16, FLOAT32), folder / "run")
    return folder


def _job(folder: Path, world: World, *overrides: str) -> Job:
    config = load_config(folder / "run.yaml", (*BFLOAT16, *overrides))
    run = RunDirectory(folder / "run", [task.name for task in config.benchmark.tasks])
    return Job(config, run, world, ProgressWriter(None))


def _weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def _merged(folder: Path, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Base plus alpha / rank * B A of both stages in float64."""
    merged = {name: value.double() for name, value in base.items()}
    for file in sorted((folder / "run").glob("stages/*/adapter/adapter_model.safetensors")):
        adapter = load_file(file)
        for key in adapter:
            name, found, _ = key.removeprefix("base_model.model.").partition(".lora_A")
            if found:
                b = adapter[key.replace("lora_A", "lora_B")]
                merged[f"{name}.weight"] += 8 / 4 * b.double() @ adapter[key].double()
    return merged


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 2.0**-23), ("float16", 2.0**-11), (None, 2.0**-8)])
def test_a_merged_weight_is_base_and_delta_to_the_rounding_of_its_dtype(
    folder: Path, dtype: str | None, rounding: float
) -> None:
    overrides = [f"model.merged_dtype={dtype}"] if dtype else []
    job = _job(folder, ALONE, *overrides)
    base, after = _weights(job.model_after(0)), _weights(job.model_after(2))
    changed = 0
    for name, value in _merged(folder, base).items():
        assert after[name].dtype == getattr(torch, dtype or "bfloat16")
        assert ((after[name].double() - value).abs() <= rounding * value.abs() + 1e-7).all(), name
        changed += not torch.equal(after[name], base[name])
    assert changed == 14


def test_training_starts_from_the_same_weights_as_without(folder: Path) -> None:
    plain, job = _job(folder, ALONE), _job(folder, ALONE, FLOAT32)
    before = _weights(job.model_after(1, to_learn=True))
    trained, without = _weights(job.model_to_train(1)), _weights(plain.model_to_train(1))
    for name, weight in without.items():
        assert before[name].dtype == torch.float32
        assert weight.dtype == trained[name].dtype == torch.bfloat16
        assert torch.equal(trained[name], weight)
    assert job.loads == 2


def _through_a_stage(world: World, folder: Path, zero: str) -> list[dict[str, torch.Tensor]]:
    """The weights that measuring, training and evaluating have on a rank."""
    job = _job(folder, world, FLOAT32, f"distributed.deepspeed={zero}")
    models = (lambda: job.model_after(1, to_learn=True), lambda: job.model_to_train(1), lambda: job.model_after(2))
    return [_weights(model()) for model in models]


@pytest.mark.distributed
@pytest.mark.parametrize("zero", [2, 3])
def test_ranks_of_zero_have_the_weights_of_one_process(folder: Path, zero: int) -> None:
    expected = _through_a_stage(ALONE, folder, str(ZERO / f"zero{zero}.json"))
    for result in run_ranks(_through_a_stage, 2, folder, str(ZERO / f"zero{zero}.json")):
        for own, one in zip(result, expected, strict=True):
            assert own.keys() == one.keys()
            assert all(torch.equal(value, one[name]) and value.dtype == one[name].dtype for name, value in own.items())


def test_a_run_that_is_continued_ends_with_the_same_bytes_and_keeps_its_dtype(folder: Path, tmp_path: Path) -> None:
    content = tiny.run_content(folder)
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "stages" / "02-Tone")
    config = tiny_config(tmp_path, content, *BFLOAT16, FLOAT32)
    with pytest.raises(InputError, match=r"identity\.model\.merged_dtype"):
        run_here(tiny_config(tmp_path, content, *BFLOAT16), tmp_path / "run")
    run_here(config, tmp_path / "run")
    assert result_hashes(tmp_path / "run") == result_hashes(folder / "run")


@pytest.mark.parametrize(
    ("dtype", "merged", "named"),
    [("float32", "null", "dtype"), ("bfloat16", "float32", "merged_dtype"), ("float32", "float16", "dtype")],
)
def test_flash_attention_is_refused_in_float32(folder: Path, dtype: str, merged: str, named: str) -> None:
    overrides = ["training.projector_learning_rate=null", "model.attention=flash_attention_2", f"model.dtype={dtype}"]
    with pytest.raises(InputError, match=rf"model\.attention: flash_attention_2 .* model\.{named} is; use sdpa"):
        check_plan(load_config(folder / "run.yaml", [*overrides, f"model.merged_dtype={merged}"]), 1)
    check_plan(load_config(folder / "run.yaml", [*overrides, "model.dtype=bfloat16", "model.merged_dtype=float16"]), 1)
