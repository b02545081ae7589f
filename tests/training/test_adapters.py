"""Adapters attached, stored and replayed: nothing is lost, added or rounded twice on the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from llava_cl.config import LoraConfig, ModelConfig
from llava_cl.data import collate_train
from llava_cl.errors import InputError
from llava_cl.methods import LoraFactors
from llava_cl.models import family
from llava_cl.store import load_tensors, save_tensors
from llava_cl.training.adapters import attach, collect, replay, save_adapter
from tiny_samples import PAD_ID, build_samples

LORA = LoraConfig(rank=3, alpha=5)
SCALE = 5 / 3
PROJECTOR = "model.multi_modal_projector"
Q_PROJ = "model.language_model.layers.0.self_attn.q_proj"
PREFIX = "base_model.model."


def _load(run: Path, dtype: str = "float32") -> PreTrainedModel:
    return family(ModelConfig(path=run / "model", dtype=dtype)).load(torch.device("cpu"))


def _factors(model: PreTrainedModel, *, seed: int = 0, zero_b: bool = False) -> dict[str, LoraFactors]:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    targets = family(ModelConfig(path=Path(str(model.config.name_or_path)))).linear_targets(model)
    for name, target in targets.items():
        a = torch.randn(3, target.module.in_features, generator=generator)
        b = torch.randn(target.module.out_features, 3, generator=generator) * 0.05
        factors[name] = LoraFactors(a, torch.zeros_like(b) if zero_b else b)
    return factors


def _logits(model: torch.nn.Module) -> torch.Tensor:
    batch = collate_train(build_samples("itti"), PAD_ID)
    pixels = batch["pixel_values"].to(next(model.parameters()).dtype)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], pixel_values=pixels).logits
    return logits[batch["attention_mask"].bool()]


def _store(run: Path, folder: Path, *, seed: int = 0, projector: str | None = PROJECTOR) -> dict[str, LoraFactors]:
    """Writes an adapter as training would: zero start, B and the projector moved; returns what it adds."""
    model = _load(run)
    moved = _factors(model, seed=seed)
    start = _factors(model, seed=seed, zero_b=True)
    adapted = attach(model, start, LORA, train_a=False, projector=projector, fp32_adapters=True)
    with torch.no_grad():
        for name, factors in moved.items():
            adapted.get_parameter(f"{PREFIX}{name}.lora_B.default.weight").copy_(factors.b)
        if projector:
            for parameter in adapted.get_submodule(f"{PREFIX}{projector}.modules_to_save").parameters():
                parameter.add_(0.01 * (seed + 1))
    save_adapter(folder, collect(adapted, start, projector, train_a=False), list(start), LORA, projector)
    return moved


@pytest.mark.parametrize("zero_b", [True, False], ids=["zero_b", "compensated_b"])
def test_attaching_changes_no_output(tiny_run: Path, zero_b: bool) -> None:
    model = _load(tiny_run)
    before = _logits(model)
    factors = _factors(model, zero_b=zero_b)
    attached = attach(model, factors, LORA, train_a=False, projector=PROJECTOR, fp32_adapters=True).eval()
    torch.testing.assert_close(_logits(attached), before, rtol=1e-4, atol=1e-5)
    with attached.disable_adapter():
        assert torch.allclose(_logits(attached), before, atol=1e-4) == zero_b


def test_compensation_takes_off_what_the_layer_adds_in_bfloat16(tiny_run: Path) -> None:
    """The factors are rounded to bfloat16 first; taking off the unrounded ones would leave their difference."""
    model = _load(tiny_run, "bfloat16")
    weight = model.get_parameter(f"{Q_PROJ}.weight").detach().double().clone()
    factors = _factors(model)
    attached = attach(model, factors, LORA, train_a=False, projector=None, fp32_adapters=False)
    a = attached.get_parameter(f"{PREFIX}{Q_PROJ}.lora_A.default.weight")
    b = attached.get_parameter(f"{PREFIX}{Q_PROJ}.lora_B.default.weight")
    assert a.dtype == b.dtype == torch.bfloat16
    base = attached.get_parameter(f"{PREFIX}{Q_PROJ}.base_layer.weight")
    expected = (weight - SCALE * b.double() @ a.double()).bfloat16()
    assert (base == expected).double().mean() > 0.99


def test_what_is_trained_is_what_was_asked_for(tiny_run: Path) -> None:
    for train_a, projector, parts in (
        (False, None, {"lora_B"}),
        (True, None, {"lora_A", "lora_B"}),
        (False, PROJECTOR, {"lora_B", "modules_to_save"}),
    ):
        model = _load(tiny_run)
        factors = _factors(model, zero_b=True)
        attached = attach(model, factors, LORA, train_a=train_a, projector=projector, fp32_adapters=True)
        trained = [name.split(".") for name, p in attached.named_parameters() if p.requires_grad]
        assert {part for name in trained for part in name if part in ("lora_A", "lora_B", "modules_to_save")} == parts
        assert len(trained) == len(factors) * (1 + train_a) + (4 if projector else 0)


def test_collect_stores_b_less_its_start(tiny_run: Path) -> None:
    model = _load(tiny_run)
    factors = _factors(model)
    attached = attach(model, factors, LORA, train_a=False, projector=None, fp32_adapters=True)
    untouched = collect(attached, factors, None, train_a=False)
    assert all(not tensor.any() for name, tensor in untouched.items() if "lora_B" in name.split("."))
    with torch.no_grad():
        attached.get_parameter(f"{PREFIX}{Q_PROJ}.lora_B.default.weight").add_(0.25)
    moved = collect(attached, factors, None, train_a=False)
    torch.testing.assert_close(moved[f"{PREFIX}{Q_PROJ}.lora_B.weight"], torch.full((24, 3), 0.25))
    assert torch.equal(moved[f"{PREFIX}{Q_PROJ}.lora_A.weight"], factors[Q_PROJ].a)


def test_what_training_did_not_change_is_stored_as_zero_in_bfloat16(tiny_run: Path) -> None:
    model = _load(tiny_run, "bfloat16")
    factors = _factors(model)
    attached = attach(model, factors, LORA, train_a=False, projector=None, fp32_adapters=False)
    tensors = collect(attached, factors, None, train_a=False)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert all(not tensor.any() for name, tensor in tensors.items() if "lora_B" in name.split("."))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_replay_adds_all_deltas_and_rounds_once(tiny_run: Path, tmp_path: Path, dtype: str) -> None:
    folders = [tmp_path / str(stage) for stage in range(3)]
    stages = [_store(tiny_run, folder, seed=seed) for seed, folder in enumerate(folders)]
    model, base = _load(tiny_run, dtype), _load(tiny_run, dtype)
    replay(model, folders)
    for name in stages[0]:
        weight = base.get_parameter(f"{name}.weight").detach()
        exact = weight.double() + sum(SCALE * stage[name].b.double() @ stage[name].a.double() for stage in stages)
        result = model.get_parameter(f"{name}.weight").detach()
        assert result.dtype == weight.dtype
        if dtype == "float32":
            torch.testing.assert_close(result.double(), exact, rtol=1e-6, atol=1e-6)
        else:
            # Rounded stage by stage, a third of the entries come out different.
            assert (result == exact.bfloat16()).double().mean() > 0.99, name


def test_replay_changes_only_targets_and_the_last_projector(tiny_run: Path, tmp_path: Path) -> None:
    targets = _store(tiny_run, tmp_path / "1", seed=1)
    _store(tiny_run, tmp_path / "2", seed=2)
    _store(tiny_run, tmp_path / "3", seed=3, projector=None)
    model, base = _load(tiny_run), dict(_load(tiny_run).named_parameters())
    replay(model, [tmp_path / "1", tmp_path / "2", tmp_path / "3"])
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] in targets:
            assert not torch.equal(parameter, base[name])
        elif name.startswith(f"{PROJECTOR}."):
            torch.testing.assert_close(parameter, base[name] + 0.03)
        else:
            assert torch.equal(parameter, base[name]), name


def test_each_stored_delta_has_the_scale_of_its_own_file(tiny_run: Path, tmp_path: Path) -> None:
    """Other alphas than the run's: an adapter's file says what its factors are multiplied by."""
    folders, stages = [tmp_path / "0", tmp_path / "1"], []
    for seed, folder in enumerate(folders):
        stages.append(_store(tiny_run, folder, seed=seed))
        tensors, _ = load_tensors(folder / "adapter_model.safetensors")
        scaled = LoraConfig(rank=LORA.rank, alpha=LORA.alpha * (seed + 1))
        save_adapter(folder, tensors, list(stages[seed]), scaled, PROJECTOR)
    model, base = _load(tiny_run), _load(tiny_run)
    replay(model, folders)
    first, second = (stage[Q_PROJ] for stage in stages)
    weight = base.get_parameter(f"{Q_PROJ}.weight").detach().double()
    expected = weight + SCALE * first.b.double() @ first.a.double() + 2 * SCALE * second.b.double() @ second.a.double()
    torch.testing.assert_close(model.get_parameter(f"{Q_PROJ}.weight").double(), expected, rtol=1e-6, atol=1e-6)


def test_replay_of_nothing_is_the_base(tiny_run: Path) -> None:
    model, base = _load(tiny_run), _load(tiny_run)
    replay(model, [])
    assert all(map(torch.equal, model.parameters(), base.parameters()))


def test_peft_reads_the_stored_adapter_to_the_same_model(tiny_run: Path, tmp_path: Path) -> None:
    _store(tiny_run, tmp_path / "adapter")
    replayed = _load(tiny_run)
    base = _logits(replayed)
    replay(replayed, [tmp_path / "adapter"])
    plain = LlavaForConditionalGeneration.from_pretrained(tiny_run / "model", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    torch.testing.assert_close(_logits(loaded), _logits(replayed), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(_logits(replayed), base, atol=0.1)


def _write_adapter(folder: Path) -> None:
    names = [f"layers.{block}.{leaf}" for block in range(9) for leaf in ("q_proj", "v_proj")]
    tensors = {
        f"{PREFIX}{name}.lora_{part}.weight": torch.full((2, 2), float(number))
        for number, name in enumerate(names)
        for part in "AB"
    }
    save_adapter(folder, tensors, names, LORA, PROJECTOR)


def test_files_are_the_same_bytes_from_every_process(tmp_path: Path) -> None:
    """Sets and metadata come in an order that changes from process to process."""
    here, there = tmp_path / "here", tmp_path / "there"
    _write_adapter(here)
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; import pathlib, {__name__} as own;"
        "own._write_adapter(pathlib.Path(sys.argv[1]))"
    )
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    subprocess.run([sys.executable, "-c", code, there], env={**os.environ, "PYTHONHASHSEED": seed}, check=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (here / name).read_bytes() == (there / name).read_bytes(), name
    assert sorted(file.name for file in here.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def _spoil(folder: Path, kind: str) -> str:
    """Damages a stored adapter; returns what the error must name."""
    file = folder / "adapter_model.safetensors"
    tensors, metadata = load_tensors(file)
    match kind:
        case "other width":
            key = f"{PREFIX}{Q_PROJ}.lora_A.weight"
            tensors[key] = torch.zeros(3, 7)
            named = Q_PROJ
        case "ranks differ":
            tensors[f"{PREFIX}{Q_PROJ}.lora_A.weight"] = torch.zeros(4, 24)
            named = Q_PROJ
        case "layer missing in the file":
            del tensors[f"{PREFIX}{Q_PROJ}.lora_B.weight"]
            named = f"{Q_PROJ} is missing in the file"
        case "layer missing in the model":
            metadata["layers"].append("model.language_model.layers.9.mlp.up_proj")
            named = r"layers\.9\.mlp\.up_proj is missing in the model"
        case "projector missing in the file":
            del tensors[f"{PREFIX}{PROJECTOR}.linear_1.bias"]
            named = f"{PROJECTOR}.linear_1.bias is missing"
        case "projector of another shape":
            tensors[f"{PREFIX}{PROJECTOR}.linear_1.bias"] = torch.zeros(5)
            named = rf"{PROJECTOR}.linear_1.bias is \(5,\), the model's is \(24,\)"
        case "projector missing in the model":
            metadata["projector"] = "model.connector"
            named = "model.connector is missing in the model"
        case _:
            metadata.clear()
            named = "metadata"
    save_tensors(file, tensors, metadata)
    return named


@pytest.mark.parametrize(
    "kind",
    [
        "other width",
        "ranks differ",
        "layer missing in the file",
        "layer missing in the model",
        "projector missing in the file",
        "projector of another shape",
        "projector missing in the model",
        "no metadata",
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tiny_run: Path, tmp_path: Path, kind: str) -> None:
    _store(tiny_run, tmp_path / "good")
    _store(tiny_run, tmp_path / "bad")
    named = _spoil(tmp_path / "bad", kind)
    model = _load(tiny_run)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(InputError, match=named) as error:
        replay(model, [tmp_path / "good", tmp_path / "bad"])
    assert all(problem.startswith(f"{tmp_path / 'bad'}: ") for problem in error.value.problems)
    assert all(map(torch.equal, before, model.parameters()))
