"""`measure` on one process: what it refuses, and that it leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from llava_cl.config import ModelConfig
from llava_cl.data import collate_train
from llava_cl.distributed import World
from llava_cl.errors import RunError
from llava_cl.models import LinearTarget, family
from llava_cl.training.statistics import Statistics, measure
from tiny_samples import PAD_ID, build_samples

ALONE = World(0, 1, torch.device("cpu"))
BLOCK_0 = "model.language_model.layers.0"


@pytest.fixture
def model(tiny_run: Path) -> PreTrainedModel:
    return family(ModelConfig(path=tiny_run / "model", dtype="float32")).load(ALONE.device)


def _targets(model: PreTrainedModel) -> dict[str, LinearTarget]:
    return family(ModelConfig(path=Path(str(model.config.name_or_path)))).linear_targets(model)


def _measure(
    model: PreTrainedModel,
    samples: str | list[dict[str, Any]],
    *wanted: str,
    targets: dict[str, LinearTarget] | None = None,
    **options: Any,
) -> Statistics:
    targets = targets or _targets(model)
    owners = dict.fromkeys([*targets, *(target.source for target in targets.values())], 0)
    batch = collate_train(build_samples(samples) if isinstance(samples, str) else samples, PAD_ID)
    return measure(
        model,
        [batch],
        targets,
        wanted=frozenset(wanted),
        owners=owners,
        world=ALONE,
        entries=[model.get_input_embeddings()],
        token_mask=lambda batch, source: batch["attention_mask"].bool() & (batch["index"] >= 0)[:, None],
        **options,
    )


def test_only_what_is_wanted_is_measured(model: PreTrainedModel) -> None:
    gradient = _measure(model, "it", "gradient")
    moment = _measure(model, "it", "second_moment")
    assert gradient.gradients.keys() == _targets(model).keys()
    assert not gradient.second_moments
    assert not moment.gradients
    assert moment.second_moments.keys() == {target.source for target in _targets(model).values()}


def test_a_padding_sample_adds_nothing(model: PreTrainedModel) -> None:
    samples = build_samples("iti")
    filler = {**samples[2], "index": -1, "labels": [-100] * len(samples[2]["labels"])}
    alone = _measure(model, samples[:2], "gradient", "second_moment")
    padded = _measure(model, [*samples[:2], filler], "gradient", "second_moment")
    assert (padded.samples, padded.skipped) == (alone.samples, alone.skipped) == (2, 0)
    for name, gradient in alone.gradients.items():
        torch.testing.assert_close(padded.gradients[name], gradient, rtol=1e-4, atol=1e-7)
    for name, moment in alone.second_moments.items():
        torch.testing.assert_close(padded.second_moments[name], moment, rtol=1e-4, atol=1e-6)


def test_samples_without_labels_are_counted_apart(model: PreTrainedModel) -> None:
    statistics = _measure(model, "innt", "gradient")
    assert (statistics.samples, statistics.skipped) == (2, 2)


def test_no_label_at_all_is_an_error(model: PreTrainedModel) -> None:
    with pytest.raises(RunError, match="no sample of the task has a supervised token"):
        _measure(model, "nn", "gradient")


@pytest.mark.parametrize("wanted", ["gradient", "second_moment"])
def test_a_layer_that_no_batch_reaches_is_named(model: PreTrainedModel, wanted: str) -> None:
    stray = {**_targets(model), "stray.linear": LinearTarget(nn.Linear(3, 2), "stray.linear")}
    with pytest.raises(RunError, match=r"no batch reached 1 targeted layers, first stray\.linear"):
        _measure(model, "it", wanted, targets=stray)


def test_a_gradient_that_is_not_finite_is_named(model: PreTrainedModel) -> None:
    def poison(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        output.register_hook(lambda grad: grad * torch.nan)

    model.get_submodule(f"{BLOCK_0}.self_attn.o_proj").register_forward_hook(poison)
    with pytest.raises(RunError, match=rf"the gradient of {BLOCK_0}\.self_attn\.\w+_proj is not finite"):
        _measure(model, "it", "gradient")


def test_an_input_that_is_not_finite_is_named(model: PreTrainedModel) -> None:
    model.get_parameter(f"{BLOCK_0}.mlp.up_proj.weight")[0, 0] = torch.inf
    with pytest.raises(RunError, match=rf"the second_moment of {BLOCK_0}\.mlp_hidden is not finite"):
        _measure(model, "it", "second_moment")


def test_samples_whose_loss_is_not_finite_are_named(model: PreTrainedModel) -> None:
    samples = build_samples("iti")
    samples[2]["pixel_values"][0, 0, 0, 0] = torch.nan
    with pytest.raises(RunError, match=r"not finite in the batches of samples a, b, c\."):
        _measure(model, samples, "gradient", ids=["a", "b", "c"])


def test_a_gradient_that_is_zero_is_named(model: PreTrainedModel) -> None:
    model.get_parameter(f"{BLOCK_0}.self_attn.o_proj.weight").zero_()
    with pytest.raises(RunError, match=rf"the gradient of {BLOCK_0}\.self_attn\.[qkv]_proj is zero on all 2 samples"):
        _measure(model, "it", "gradient")


@pytest.mark.parametrize("kinds", ["it", "nn"], ids=["success", "failure"])
def test_the_model_is_left_as_it_was(model: PreTrainedModel, kinds: str) -> None:
    def state() -> Any:
        modules = [model.get_input_embeddings(), *(target.module for target in _targets(model).values())]
        hooks = [len(module._forward_hooks) for module in modules]
        return hooks, [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]

    before, weights = state(), [parameter.clone() for parameter in model.parameters()]
    try:
        _measure(model, kinds, "gradient", "second_moment")
    except RunError:
        assert kinds == "nn"
    assert state() == before
    assert all(map(torch.equal, weights, model.parameters()))


def test_progress_counts_samples(model: PreTrainedModel) -> None:
    done: list[int] = []
    report: Callable[[int], None] = done.append
    _measure(model, "itn", "second_moment", progress=report)
    assert done == [3]
