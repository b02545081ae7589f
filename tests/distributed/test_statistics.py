"""Statistics of frozen linears against one-process autograd in float64, under every way of sharing the samples."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from llava_cl.config import ModelConfig
from llava_cl.data import collate_train
from llava_cl.distributed import World, share_out
from llava_cl.models import LinearTarget, ModelFamily, family
from llava_cl.subspace import Sketch
from llava_cl.training.statistics import Statistics, measure, save_memory
from llava_cl.training.sums import SumsPlace
from ranks import run_ranks
from tiny import build_model
from tiny_samples import PAD_ID, build_samples

pytestmark = pytest.mark.distributed

BOTH = frozenset({"gradient", "second_moment"})
PLACES: tuple[SumsPlace, ...] = ("device", "host", 1e-5)
"""The last takes several passes over the tiny model's sums."""
MODES = ("plain", "ddp", "zero1", "zero2", "zero3")
KINDS = "iitinittin"  # images, text alone, and samples without a label
ROUNDING = {"float32": 1e-6, "bfloat16": 3e-2}
"""Largest relative error. bfloat16 has 8 bits of mantissa, so that one product is off by up to 2^-8 already."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"))


@dataclasses.dataclass
class Reference:
    """Means over all samples by autograd on the base weights, one unpadded sample at a time, in float64."""

    gradients: dict[str, torch.Tensor]
    second_moments: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def reference(model_folder: Path) -> Reference:
    model = LlavaForConditionalGeneration.from_pretrained(model_folder, dtype=torch.float64).eval()
    model.requires_grad_(False)
    weights = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.language_model.layers.")
    }
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in weights}
    for name, module in weights.items():
        module.weight.requires_grad_(True)
        module.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0][0].detach()))
    losses = []
    for sample in build_samples(KINDS):
        pixels = sample.get("pixel_values")
        logits = model(
            input_ids=torch.tensor([sample["input_ids"]]),
            pixel_values=None if pixels is None else pixels.double(),
        ).logits[0]
        labels = torch.tensor(sample["labels"])
        if (labels != -100).any():
            losses.append(nn.functional.cross_entropy(logits[:-1], labels[1:]))
    torch.stack(losses).mean().backward()
    tokens = {name: torch.cat(rows) for name, rows in inputs.items()}
    return Reference(
        {name: module.weight.grad for name, module in weights.items() if module.weight.grad is not None},
        {name: x.T @ x / len(x) for name, x in tokens.items()},
    )


def _wrapped(model: PreTrainedModel, mode: str) -> PreTrainedModel:
    """The module to measure, inside DDP or a DeepSpeed engine that trains its projector at other times."""
    if mode == "plain":
        return model
    projector = model.get_submodule("model.multi_modal_projector")
    projector.requires_grad_(True)
    if mode == "ddp":
        DistributedDataParallel(model)
        model.requires_grad_(False)
        return model
    zero: dict[str, Any] = {"stage": int(mode[-1]), "overlap_comm": False, "reduce_bucket_size": 500}
    if mode == "zero3":
        zero["stage3_param_persistence_threshold"] = 0
    deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(projector.parameters()),
        model_parameters=list(projector.parameters()),
        config={
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
            "train_micro_batch_size_per_gpu": 1,
        },
    )
    model.requires_grad_(False)
    return model


def _batches(world: World, mode: str) -> list[dict[str, torch.Tensor]]:
    """Unequal shards: the last rank has one sample. Under ZeRO every rank then runs as many forward passes."""
    samples = build_samples(KINDS)
    shard = samples[world.rank : -1 : world.size - 1] if world.size > 1 else samples
    if world.size > 1 and world.rank == world.size - 1:
        shard = samples[-1:]
    batches = [shard[start : start + 3] for start in range(0, len(shard), 3)]
    if mode.startswith("zero"):
        filler = {**samples[0], "labels": [-100] * len(samples[0]["labels"]), "index": -1}
        batches += [[filler]] * (4 - len(batches))
    return [collate_train(batch, PAD_ID) for batch in batches]


def _measure_under(
    world: World, folder: Path, modes: tuple[str, ...], dtype: str = "float32", checkpointing: bool = False
) -> dict[str, Statistics]:
    llava = family(ModelConfig(path=folder, dtype=dtype))
    results = {}
    for mode in modes:
        model = _wrapped(llava.load(world.device), mode)
        if checkpointing:
            save_memory(model)
        results[mode] = _measured(world, llava, model, mode)
    return results


def _measured(world: World, llava: ModelFamily, model: Any, mode: str, **options: Any) -> Statistics:
    targets = llava.linear_targets(model)
    return measure(
        model,
        _batches(world, mode),
        targets,
        wanted=BOTH,
        owners=_owners(targets, world.size),
        world=world,
        entries=llava.entries(model),
        token_mask=llava.token_mask,
        **options,
    )


def _owners(targets: dict[str, LinearTarget], size: int) -> dict[str, int]:
    """Layers and inputs dealt out as unevenly as they come."""
    names = [*targets, *{target.source for target in targets.values()}]
    return share_out({name: float(len(name)) for name in names}, size)


def _merged(parts: list[Statistics]) -> Statistics:
    """What all owners hold together; each tensor must have one owner only."""
    merged = Statistics(samples=parts[0].samples, skipped=parts[0].skipped)
    for part in parts:
        assert not merged.gradients.keys() & part.gradients.keys()
        assert not merged.second_moments.keys() & part.second_moments.keys()
        merged.gradients.update(part.gradients)
        merged.second_moments.update(part.second_moments)
    return merged


def _check(statistics: Statistics, reference: Reference, bound: float) -> None:
    assert statistics.samples == sum(kind != "n" for kind in KINDS)
    assert statistics.skipped == KINDS.count("n")
    assert statistics.gradients.keys() == reference.gradients.keys()
    for name, gradient in statistics.gradients.items():
        assert gradient.dtype == torch.float32
        assert _error(gradient, reference.gradients[name]) < bound, name
    sources = {"attention_input": "q", "attention_output": "o", "mlp_input": "up", "mlp_hidden": "down"}
    assert len(statistics.second_moments) == 4 * 2
    for source, moment in statistics.second_moments.items():
        block, _, place = source.rpartition(".")
        layer = f"{block}.{'self_attn' if place.startswith('attention') else 'mlp'}.{sources[place]}_proj"
        assert moment.dtype == torch.float32
        assert _error(moment, reference.second_moments[layer]) < bound, source


def _error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.double() - expected).norm() / expected.norm())


@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda size: f"{size}-ranks")
def measured(request: pytest.FixtureRequest, model_folder: Path) -> dict[str, Statistics]:
    parts = run_ranks(_measure_under, request.param, model_folder, MODES, use_deepspeed=True)
    return {mode: _merged([part[mode] for part in parts]) for mode in MODES}


@pytest.mark.parametrize("mode", MODES)
def test_equals_autograd_on_all_samples(measured: dict[str, Statistics], mode: str, reference: Reference) -> None:
    _check(measured[mode], reference, ROUNDING["float32"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_autograd_with_gradient_checkpointing(model_folder: Path, dtype: str, reference: Reference) -> None:
    parts = run_ranks(_measure_under, 2, model_folder, ("plain",), dtype, True)
    _check(_merged([part["plain"] for part in parts]), reference, ROUNDING[dtype])


def _measure_in_places(world: World, folder: Path, columns: int | None) -> dict[SumsPlace, dict[str, torch.Tensor]]:
    llava = family(ModelConfig(path=folder, dtype="float32"))
    model = llava.load(world.device)
    results = {}
    for place in PLACES:
        sketch = Sketch.draw(columns, 40, 40, torch.Generator().manual_seed(1)) if columns else None
        statistics = _measured(world, llava, model, "plain", place=place, sketch=sketch)
        kinds = ("gradient", "range_sketch", "row_sketch", "second_moment")
        results[place] = {f"{kind}:{name}": value for kind in kinds for name, value in statistics.of(kind).items()}
    return results


@pytest.mark.parametrize("columns", [None, 4])
def test_ranks_agree_wherever_the_sums_are_kept(model_folder: Path, columns: int | None) -> None:
    parts = run_ranks(_measure_in_places, 2, model_folder, columns)
    alone = run_ranks(_measure_in_places, 1, model_folder, columns)[0]
    for place in PLACES:
        assert not parts[0][place].keys() & parts[1][place].keys()
        together = {**parts[0][place], **parts[1][place]}
        assert together.keys() == alone[place].keys()
        for key, value in together.items():
            assert torch.equal(value, {**parts[0]["device"], **parts[1]["device"]}[key]), (place, key)
            assert _error(value, alone[place][key].double()) < ROUNDING["float32"], (place, key)
