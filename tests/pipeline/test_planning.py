"""Predictions of memory and disk, against the tensors and files of real steps."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

import tiny
import tiny_clip
import tiny_vit
from llava_cl.cli import app
from llava_cl.config import RunConfig
from llava_cl.distributed import World
from llava_cl.errors import InputError
from llava_cl.methods import LoraFactors
from llava_cl.pipeline import doctor, planning
from llava_cl.pipeline.activations import ANSWER_TOKENS, TEXT_TOKENS, Size, Step, task_size
from llava_cl.pipeline.planning import (
    Needs,
    Shapes,
    host_memory_problems,
    least_memory,
    predict_disk,
    predict_memory,
    recomputes,
    training_bytes,
)
from llava_cl.pipeline.preflight import check_memory, check_setup
from llava_cl.pipeline.samples import samples_of
from llava_cl.report.console import needs_tables
from llava_cl.training.adapters import attach
from llava_cl.training.trial import Cost
from runs import run_here, tiny_config, write_config

CPU = torch.device("cpu")
DEEPSPEED = Path(__file__).parents[2] / "configs" / "deepspeed"
SIZE = Size(20, 3)
BFLOAT16 = ("model.dtype=bfloat16", "training.projector_learning_rate=null")


@pytest.fixture(scope="module")
def content(tiny_run: Path) -> dict[str, Any]:
    return tiny.run_content(tiny_run)


@pytest.fixture(scope="module")
def config(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return tiny_config(tmp_path_factory.mktemp("planning"), content)


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_training_without_deepspeed_holds_what_torch_holds(config: RunConfig) -> None:
    samples = samples_of(config)
    model = samples.family.load(CPU)
    weights = _bytes(model.parameters())
    factors = {
        name: LoraFactors(torch.ones(4, target.module.in_features), torch.zeros(target.module.out_features, 4))
        for name, target in samples.family.linear_targets(model).items()
    }
    projector = samples.beside(1)
    assert projector is not None
    adapted = attach(model, factors, config.lora, train_a=False, projector=projector.name, fp32_adapters=True)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    shapes = Shapes.of(config, samples)
    assert shapes.weights == weights
    assert training_bytes(config, shapes, 1, CPU) == {
        "adapters": _bytes(adapted.parameters()) - weights,
        "gradients": _bytes(parameter.grad for parameter in trained),
        "optimizer": _bytes(moments),
    }


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_share_out_what_they_say(config: RunConfig, stage: int) -> None:
    """ZeRO (SC 2020): stage 1 takes the optimizer's state apart, 2 the gradients too, 3 the parameters too."""
    distributed = config.distributed.model_copy(update={"deepspeed": DEEPSPEED / f"zero{stage}.json"})
    config = config.model_copy(update={"distributed": distributed})
    shapes = Shapes.of(config, samples_of(config))
    alone, four = (training_bytes(config, shapes, ranks, CPU) for ranks in (1, 4))
    shared = {"optimizer", *(("gradients",) if stage > 1 else ()), *(("adapters",) if stage > 2 else ())}
    assert {part for part in alone if four[part] == alone[part] // 4} == shared
    assert {part for part in alone if four[part] == alone[part]} == alone.keys() - shared
    # fp32 copy and two moments of each number.
    assert alone["optimizer"] == 12 * (shapes.adapters + shapes.beside)
    memory = predict_memory(config, samples_of(config), SIZE, ranks=4, device=CPU)
    assert memory["train"]["weights"] == shapes.weights // (4 if stage == 3 else 1)
    assert memory["measure"]["weights"] == shapes.weights


def test_measuring_and_evaluating_hold_the_merged_dtype(config: RunConfig) -> None:
    def planned(**dtypes: str) -> tuple[Shapes, dict[Step, dict[str, int]]]:
        changed = config.model_copy(update={"model": config.model.model_copy(update=dtypes)})
        samples = samples_of(changed)
        return Shapes.of(changed, samples), predict_memory(changed, samples, SIZE, ranks=1, device=CPU)

    half, in_half = planned(dtype="bfloat16")
    full, in_full = planned(dtype="float32")
    both, in_both = planned(dtype="bfloat16", merged_dtype="float32")
    assert (in_both["measure"], in_both["evaluate"]) == (in_full["measure"], in_full["evaluate"])
    assert in_both["train"] == in_half["train"] != in_full["train"]
    assert (both.weights, both.merged) == (half.weights, full.weights) == (half.merged, 2 * half.weights)
    narrow = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    trained = sum(training_bytes(narrow, both, 1, CPU).values())
    assert least_memory(narrow, both, 1) == max(both.merged + both.sums, both.weights + trained)


def test_keys_and_values_are_those_of_a_generation(config: RunConfig) -> None:
    samples = samples_of(config)
    model: Any = samples.family.load(CPU)
    rows, new = config.evaluation.batch_size, config.evaluation.max_new_tokens
    ids = torch.full((rows, SIZE.length), 5)
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new + 1,
        min_new_tokens=new + 1,
        do_sample=False,
        return_dict_in_generate=True,
    )
    held = _bytes(tensor for layer in made.past_key_values.layers for tensor in (layer.keys, layer.values))
    memory = predict_memory(config, samples, SIZE, ranks=1, device=CPU)
    assert memory["evaluate"]["keys and values"] == held


def test_disk_is_that_of_a_runs_files(config: RunConfig, tmp_path: Path) -> None:
    run_here(config, tmp_path / "run", until=1)
    parts = predict_disk(config, Shapes.of(config, samples_of(config)))
    stage = tmp_path / "run" / "stages" / "01-Colour"
    stages = len(config.benchmark.tasks)
    adapter = load_file(stage / "adapter" / "adapter_model.safetensors").values()
    assert parts["adapters"] == stages * _bytes(adapter)
    assert parts["their start"] == stages * _bytes(load_file(stage / "initial_factors.safetensors").values())
    bases = [tensor for file in stage.parent.rglob("subspace.safetensors") for tensor in load_file(file).values()]
    assert 0 < _bytes(bases) <= parts["bases, if they grew full"]
    timings = json.loads((stage / "timings.json").read_text())
    # 24 samples in global batches of 8; a sample has 4 image tokens and some words.
    rates = timings["training"]
    assert rates["tokens_per_second"] > 10 * rates["samples_per_second"] > 0
    assert rates["samples_per_second"] * timings["seconds"]["train"] == pytest.approx(24, rel=0.05)


def test_the_longest_sample_is_that_of_the_data(content: dict[str, Any], config: RunConfig) -> None:
    samples = samples_of(config)
    dataset: Any = samples.training(config.task(1), 0).dataset
    lengths = [len(dataset[index]["input_ids"]) for index in range(len(dataset))]
    found = task_size(config, samples, config.task(1))
    assert (found.samples, found.longest.length) == (24, max(lengths))
    assert 0 < found.longest.supervised < 5
    # Without its data a task has what the benchmark says, and an image with a short question.
    elsewhere = config.model_copy(update={"data_root": Path("/nowhere")})
    bare = task_size(elsewhere, samples, config.task(1))
    assert bare == (None, Size(4 + TEXT_TOKENS, ANSWER_TOKENS), Size(4 + TEXT_TOKENS, ANSWER_TOKENS))


def test_layers_are_computed_again_where_memory_is_short(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, task, gpu = samples_of(config), config.task(1), torch.device("cuda", 0)
    held = sum(training_bytes(config, Shapes.of(config, samples), 1, gpu).values())
    monkeypatch.setattr(planning, "try_batch", lambda *args, **options: Cost(10_000_000, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)

    def decided(setting: object, free: float, device: torch.device = gpu) -> bool:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), 0))
        training = config.training.model_copy(update={"gradient_checkpointing": setting})
        chosen = config.model_copy(update={"training": training})
        return recomputes(chosen, samples, task, World(0, 1, device))

    need = 1.1 * (10_000_000 + held) - 300
    assert [decided("auto", need - 2), decided("auto", need + 2)] == [True, False]
    assert [decided(True, 1e12), decided(False, 0), decided("auto", 0, CPU)] == [True, False, False]


def test_sums_that_host_memory_does_not_hold_are_told(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, content, "measurement.sums=host")
    here = Shapes.of(config, samples_of(config))
    assert here.host_sums == 0  # a CPU's sums are in its own memory, which is counted as such
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    shapes = Shapes.of(config, samples_of(config))
    # Pinned memory comes in powers of two: of 24 x 24 numbers 4096 bytes for 2304, of 24 x 40 as many for 3840.
    assert shapes.host_sums == 4096 * round(shapes.host_sums / 4096) > here.sums > shapes.sums
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=2 * shapes.host_sums))
    assert host_memory_problems(shapes, 2) == []
    assert "for 3 ranks" in host_memory_problems(shapes, 3)[0]
    with pytest.raises(InputError, match=r"measurement\.sums: 'host' takes .* for 3 ranks"):
        check_memory(config, 3)


def test_flash_attention_that_is_not_there_gets_one_message(content: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config(tmp_path, content, *BFLOAT16, "model.attention=flash_attention_2")
    with pytest.raises(InputError) as caught:
        check_setup(config, 1)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith("model.attention: flash_attention_2 is not usable here: ")
    assert "llava_cl[flash]" in caught.value.problems[0]


def test_needs_are_shown(content: dict[str, Any], config: RunConfig, tmp_path: Path) -> None:
    needs = Needs.of(config, 2, 2)
    assert needs.problems == []
    out = io.StringIO()
    for table in needs_tables(needs):
        Console(file=out, width=120).print(table)
    text = out.getvalue()
    assert f"Memory of each of 2 ranks, samples of {needs.size.length} tokens" in text
    for word in ("measure", "train", "evaluate", "keys and values", "activations", "their start", "estimated"):
        assert word in text
    assert needs.seconds is not None
    assert set(needs.seconds) == {"measure", "train", "evaluate"}
    shown = CliRunner().invoke(app, ["run", str(write_config(tmp_path, content)), "--nproc", "2", "--dry-run"])
    assert json.loads(shown.output)["needs"]["memory"] == needs.memory


@pytest.mark.parametrize("family", [tiny_vit, tiny_clip])
def test_class_folders_that_are_not_there_change_no_memory(family: Any, tmp_path: Path) -> None:
    content = family.run_content(tmp_path)
    for number, task in enumerate(content["benchmark"]["tasks"]):
        task["classes"] = [2 * number, 2 * number + 1]
    there = Needs.of(tiny_config(tmp_path, content), 2, 2)
    content["data_root"] = str(tmp_path / "nowhere")
    assert isinstance(there.seconds, dict)
    bare = Needs.of(tiny_config(tmp_path, content), 2, 2)
    assert (bare.memory, bare.disk, bare.seconds) == (there.memory, there.disk, None)
    for task in content["benchmark"]["tasks"]:
        task |= {"classes": 2, "records": {"train": 24}}
    counted = Needs.of(tiny_config(tmp_path, content), 2, 2)
    assert counted.memory == there.memory and counted.seconds is not None


def test_doctor_predicts_a_run_whose_class_folders_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "diagnose", lambda ranks: iter(()))
    content = tiny_vit.run_content(tmp_path)
    content["data_root"] = str(tmp_path / "nowhere")
    command = ["doctor", str(write_config(tmp_path, content)), "--nproc", "2"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert "Memory of each of 2 ranks" in shown.output
    monkeypatch.setattr(planning, "host_memory_problems", lambda shapes, ranks: [f"too little for {ranks}"])
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 1
    assert shown.output.splitlines()[-1] == "problem too little for 2"
