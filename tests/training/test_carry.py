"""An adapter trained on through all tasks: each stage stores what it added, and where the next one starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from llava_cl.config import ClassTaskConfig, LoraConfig, ModelConfig
from llava_cl.methods import LoraFactors
from llava_cl.models import family
from llava_cl.store import load_tensors
from llava_cl.training.adapters import attach, collect, combine, load_factors, replay, save_adapter
from tiny_vit import build_model

LORA = LoraConfig(rank=3, alpha=5)
SCALE = 5 / 3
PREFIX = "base_model.model."
TASK = ClassTaskConfig(name="T", train="train", test="test", classes=("a", "b"))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("vit"))


def _load(folder: Path, stages: list[Path], dtype: str = "float32") -> Any:
    """The base with the stored stages."""
    vit: Any = family(ModelConfig(family="vit", path=folder, dtype=dtype))
    model = vit.load(CPU)
    vit.install(model, [TASK])
    replay(model, stages)
    return model


def _weights(model: Any) -> dict[str, torch.Tensor]:
    """Adapted layer -> weight."""
    targets = family(ModelConfig(family="vit", path=Path(model.config.name_or_path))).linear_targets(model)
    return {name: target.module.weight.detach().clone() for name, target in targets.items()}


def _factors(folder: Path, seed: int, *, zero_b: bool = False) -> dict[str, LoraFactors]:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, weight in _weights(_load(folder, [])).items():
        a = torch.randn(3, weight.shape[1], generator=generator)
        b = torch.randn(weight.shape[0], 3, generator=generator) * 0.05
        factors[name] = LoraFactors(a, torch.zeros_like(b) if zero_b else b)
    return factors


def _train(adapted: PeftModel, factors: dict[str, LoraFactors]) -> None:
    """Gives the adapters the factors that training ends with."""
    with torch.no_grad():
        for name, (a, b) in factors.items():
            adapted.get_parameter(f"{PREFIX}{name}.lora_A.default.weight").copy_(a)
            adapted.get_parameter(f"{PREFIX}{name}.lora_B.default.weight").copy_(b)


def _stage(
    folder: Path,
    stages: list[Path],
    start: dict[str, LoraFactors],
    end: dict[str, LoraFactors] | None,
    output: Path,
    dtype: str = "float32",
) -> PeftModel:
    """Trains a stage from `start` to `end` and stores it; returns the trained model."""
    fp32 = dtype == "float32"
    model = _load(folder, stages, dtype)
    adapted = attach(model, start, LORA, train_a=True, projector=None, fp32_adapters=fp32)
    if end is not None:
        _train(adapted, end)
    save_adapter(output, collect(adapted, start, None, train_a=True), list(start), LORA, None)
    return adapted.eval()


@pytest.fixture(scope="module")
def stored(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three stages, each trained from the end of the one before to the factors of its number."""
    place = tmp_path_factory.mktemp("stages")
    folders = [place / str(number) for number in (1, 2, 3)]
    for number, output in enumerate(folders, start=1):
        start = load_factors(folders[number - 2], _factors(folder, 0)) if number > 1 else None
        _stage(
            folder,
            folders[: number - 1],
            start or _factors(folder, 0, zero_b=True),
            _factors(folder, number),
            output,
        )
    return folders


def _update(folder: Path, name: str) -> torch.Tensor:
    """What a stored stage adds to a weight, float64."""
    tensors, metadata = load_tensors(folder / "adapter_model.safetensors")
    a, b = (tensors[f"{PREFIX}{name}.lora_{part}.weight"].double() for part in "AB")
    return metadata["scale"] * b @ a


def _features(model: Any) -> torch.Tensor:
    pixels = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    inner = model.base_model.model if isinstance(model, PeftModel) else model
    with torch.no_grad():
        return inner.features(pixels)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_base_and_stored_updates_are_the_model_with_the_trained_factors(
    folder: Path, stored: list[Path], stage: int
) -> None:
    base, replayed = _weights(_load(folder, [])), _weights(_load(folder, stored[:stage]))
    for name, (a, b) in _factors(folder, stage).items():
        exact = base[name].double() + SCALE * b.double() @ a.double()
        torch.testing.assert_close(replayed[name].double(), exact, rtol=0, atol=1e-6)
        total = sum(_update(part, name) for part in stored[:stage])
        torch.testing.assert_close(total, SCALE * b.double() @ a.double(), rtol=0, atol=1e-6)


def test_the_trained_model_and_the_replayed_one_answer_alike(folder: Path, stored: list[Path], tmp_path: Path) -> None:
    start = load_factors(stored[0], _factors(folder, 0))
    trained = _stage(folder, stored[:1], start, _factors(folder, 2), tmp_path / "again")
    replayed = _load(folder, stored[:2])
    torch.testing.assert_close(_features(trained), _features(replayed), rtol=0, atol=1e-5)
    assert (_features(replayed) - _features(_load(folder, stored[:1]))).abs().max() > 0.1


def test_attaching_the_last_tasks_factors_changes_no_output(folder: Path, stored: list[Path]) -> None:
    model = _load(folder, stored[:2])
    before, base = _features(model), _weights(_load(folder, []))
    start = load_factors(stored[1], _factors(folder, 0))
    adapted = attach(model, start, LORA, train_a=True, projector=None, fp32_adapters=True).eval()
    torch.testing.assert_close(_features(adapted), before, rtol=0, atol=1e-5)
    for name, weight in base.items():
        frozen = adapted.get_parameter(f"{PREFIX}{name}.base_layer.weight")
        torch.testing.assert_close(frozen, weight, rtol=0, atol=1e-6)
        for part in "AB":
            assert adapted.get_parameter(f"{PREFIX}{name}.lora_{part}.default.weight").requires_grad


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_trained_factors_are_given_back(folder: Path, stored: list[Path], stage: int) -> None:
    expected = _factors(folder, stage)
    found = load_factors(stored[stage - 1], expected)
    assert found.keys() == expected.keys()
    for name, factors in found.items():
        assert all(map(torch.equal, factors, expected[name])), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stage_that_changes_nothing_stores_a_zero_update(
    folder: Path, stored: list[Path], tmp_path: Path, dtype: str
) -> None:
    """To the rounding of a sum of terms that cancel."""
    start = load_factors(stored[0], _factors(folder, 0))
    _stage(folder, stored[:1], start, None, tmp_path / "idle", dtype)
    for name in start:
        assert _update(tmp_path / "idle", name).abs().max() < 1e-15
    before, after = _load(folder, stored[:1]), _load(folder, [stored[0], tmp_path / "idle"])
    for name, weight in _weights(before).items():
        torch.testing.assert_close(_weights(after)[name], weight, rtol=0, atol=1e-6)


def test_a_first_stage_that_changes_nothing_changes_no_bit(folder: Path, tmp_path: Path) -> None:
    _stage(folder, [], _factors(folder, 0, zero_b=True), None, tmp_path / "idle")
    base, after = _load(folder, []), _load(folder, [tmp_path / "idle"])
    assert all(map(torch.equal, base.parameters(), after.parameters()))


def test_only_a_stage_that_goes_on_stores_where_it_began(folder: Path, stored: list[Path]) -> None:
    ranks = []
    for stage in stored:
        tensors, _ = load_tensors(stage / "adapter_model.safetensors")
        ranks.append({len(value) for key, value in tensors.items() if key.endswith("lora_A.weight")})
    assert ranks == [{3}, {6}, {6}]


def test_peft_adds_what_a_stage_added(folder: Path, stored: list[Path]) -> None:
    loaded = PeftModel.from_pretrained(_load(folder, stored[:1]), stored[1]).eval()
    torch.testing.assert_close(_features(loaded), _features(_load(folder, stored[:2])), rtol=0, atol=1e-5)


def test_the_stages_in_one_are_the_last_ones_factors(folder: Path, stored: list[Path], tmp_path: Path) -> None:
    combine(stored, tmp_path / "all")
    for name, (a, b) in _factors(folder, 3).items():
        torch.testing.assert_close(_update(tmp_path / "all", name), SCALE * b.double() @ a.double(), rtol=0, atol=1e-6)
    loaded = PeftModel.from_pretrained(_load(folder, []), tmp_path / "all").eval()
    torch.testing.assert_close(_features(loaded), _features(_load(folder, stored)), rtol=0, atol=1e-5)


def test_a_layer_that_did_not_learn_before_does_not_spoil_the_stage(
    folder: Path, stored: list[Path], tmp_path: Path
) -> None:
    """Its B is still zero, while those of the others are not."""
    start = load_factors(stored[0], _factors(folder, 0))
    idle = next(iter(start))
    start[idle] = LoraFactors(start[idle].a, torch.zeros_like(start[idle].b))
    trained = _stage(folder, [], start, _factors(folder, 2), tmp_path / "stage")
    for name, (a, b) in _factors(folder, 2).items():
        expected = SCALE * (b.double() @ a.double() - start[name].b.double() @ start[name].a.double())
        torch.testing.assert_close(_update(tmp_path / "stage", name), expected, rtol=0, atol=1e-6)
    loaded = PeftModel.from_pretrained(_load(folder, []), tmp_path / "stage").eval()
    torch.testing.assert_close(_features(loaded), _features(trained), rtol=0, atol=1e-5)
