"""The supervised loss against transformers' own loss on full logits, and batches of text alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from llava_cl.config import ModelConfig
from llava_cl.data import collate_train
from llava_cl.models import family
from tiny_samples import PAD_ID, build_samples

KINDS = ("itin", "tt", "i")


@pytest.fixture(scope="module")
def own(tiny_run: Path) -> PreTrainedModel:
    return family(ModelConfig(path=tiny_run / "model", dtype="float32")).load(torch.device("cpu"))


@pytest.fixture(scope="module")
def plain(tiny_run: Path) -> PreTrainedModel:
    return LlavaForConditionalGeneration.from_pretrained(tiny_run / "model", dtype=torch.float32).eval()


def _batch(kinds: str) -> dict[str, torch.Tensor]:
    batch = collate_train(build_samples(kinds), PAD_ID)
    del batch["index"]
    return batch


@pytest.mark.parametrize("kinds", KINDS)
def test_mean_over_tokens_is_the_loss_of_transformers(own: PreTrainedModel, plain: PreTrainedModel, kinds: str) -> None:
    batch = _batch(kinds)
    torch.testing.assert_close(own(**batch)["loss"], plain(**batch).loss)


@pytest.mark.parametrize("kinds", KINDS)
def test_sum_over_a_given_count_is_the_loss_of_transformers(
    own: PreTrainedModel, plain: PreTrainedModel, kinds: str
) -> None:
    batch = _batch(kinds)
    for count in (37, torch.tensor(37)):
        loss = own(**batch, num_items_in_batch=count)["loss"]
        torch.testing.assert_close(loss, plain(**batch, num_items_in_batch=37).loss)


@pytest.mark.parametrize("kinds", KINDS)
def test_per_sample_is_the_sum_of_each_samples_mean(own: PreTrainedModel, plain: PreTrainedModel, kinds: str) -> None:
    expected = torch.tensor(0.0)
    for sample in build_samples(kinds):
        labels = torch.tensor(sample["labels"])
        if (labels != -100).any():
            pixels = sample.get("pixel_values")
            logits = plain(input_ids=torch.tensor([sample["input_ids"]]), pixel_values=pixels).logits[0]
            losses = [-logits[place - 1].log_softmax(0)[label] for place, label in enumerate(labels) if label != -100]
            expected = expected + torch.stack(losses).mean()
    torch.testing.assert_close(own(**_batch(kinds), per_sample=True)["loss"], expected)


def test_gradients_are_those_of_the_full_logits(own: PreTrainedModel, plain: PreTrainedModel) -> None:
    gradients = []
    for model in (own, plain):
        weight = model.get_parameter("model.language_model.layers.0.mlp.up_proj.weight")
        projector = model.get_parameter("model.multi_modal_projector.linear_1.weight")
        for parameter in (weight, projector):
            parameter.requires_grad_(True)
        loss = model(**_batch("iti"))["loss"]
        gradients.append(torch.autograd.grad(loss, [weight, projector]))
        model.requires_grad_(False)
    for value, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-7)


def test_the_loss_of_bfloat16_weights_is_fp32(tiny_run: Path) -> None:
    model = family(ModelConfig(path=tiny_run / "model", dtype="bfloat16")).load(torch.device("cpu"))
    assert model(**_batch("it"))["loss"].dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kinds", ["tt", "n"], ids=["text", "unlabelled"])
def test_a_batch_without_use_for_the_projector_gives_it_a_zero_gradient(
    own: PreTrainedModel, training: bool, kinds: str
) -> None:
    projector = own.get_submodule("model.multi_modal_projector")
    own.train(training)
    projector.requires_grad_(True)
    try:
        own(**_batch(kinds), num_items_in_batch=3)["loss"].backward()
        for parameter in projector.parameters():
            assert parameter.grad is not None
            assert not parameter.grad.any()
    finally:
        own.eval()
        own.zero_grad()
        own.requires_grad_(False)


def test_text_and_images_run_the_same_modules_in_the_same_order(own: PreTrainedModel) -> None:
    """Under ZeRO-3 every module's forward is a collective call."""
    orders: dict[str, list[nn.Module]] = {"tt": [], "ii": []}
    for kinds, order in orders.items():
        hooks = [
            module.register_forward_pre_hook(lambda m, _, order=order: order.append(m)) for module in own.modules()
        ]
        own(**_batch(kinds))
        for hook in hooks:
            hook.remove()
    assert orders["tt"] == orders["ii"]
    assert own.get_submodule("model.vision_tower") in orders["tt"]


def test_without_labels_it_is_the_models_own_forward(own: PreTrainedModel, plain: PreTrainedModel) -> None:
    for kinds in KINDS:
        batch = _batch(kinds)
        del batch["labels"]
        assert torch.equal(own(**batch).logits, plain(**batch).logits)


def test_the_class_keeps_its_name(own: PreTrainedModel, tmp_path: Path) -> None:
    own.save_pretrained(tmp_path)
    assert '"LlavaForConditionalGeneration"' in (tmp_path / "config.json").read_text()
