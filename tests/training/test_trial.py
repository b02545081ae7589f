"""What a step is predicted to hold and compute, against steps that are really run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

from llava_cl.config import LoraConfig
from llava_cl.methods import LoraFactors
from llava_cl.training import trial
from llava_cl.training.adapters import attach, wrap
from llava_cl.training.statistics import save_memory
from llava_cl.training.trial import keep_inputs, start_graph, try_step

CPU = torch.device("cpu")
BATCH, LENGTH, WIDTH, HIDDEN, BLOCKS, RANK = 4, 96, 64, 160, 5, 4
LORA = LoraConfig(rank=RANK, alpha=8)


@pytest.fixture(autouse=True)
def _plain_attention() -> Iterator[None]:
    """Which kernel torch takes otherwise depends on switches that are global."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        yield


def _model(device: str) -> Any:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).requires_grad_(False)


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name
    }


def _adapted(model: Any, *, train_a: bool = False, dropout: float = 0.0) -> PeftModel:
    factors = {
        name: LoraFactors(torch.randn(RANK, module.in_features), torch.zeros(module.out_features, RANK))
        for name, module in _linears(model).items()
    }
    lora = LORA.model_copy(update={"dropout": dropout})
    return attach(model, factors, lora, train_a=train_a, projector=None, fp32_adapters=True).train()


def _loss(model: Any) -> Callable[[], torch.Tensor]:
    def step() -> torch.Tensor:
        hidden = torch.zeros(BATCH, LENGTH, WIDTH).requires_grad_(torch.is_grad_enabled())
        return model.model(inputs_embeds=hidden, attention_mask=None, use_cache=False).last_hidden_state

    return step


def _saved(model: nn.Module, step: Callable[[], torch.Tensor]) -> int:
    """Bytes of all storages that autograd keeps after forward, but the parameters'."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = step()
    del value
    return sum(kept.values())


def test_a_step_holds_what_autograd_saves_and_little_more() -> None:
    fake, real = _model("meta"), _model("cpu")
    whole = wrap(fake, _linears(fake), LORA, train_a=False, projector=None, fp32_adapters=True).train()
    predicted = try_step(whole, _loss(fake), CPU).bytes
    saved = _saved(_adapted(real), _loss(real))
    # The rest is what single operations hold for a moment: at the most a few tensors of the widest layer.
    assert saved <= predicted <= saved + 8 * 4 * BATCH * LENGTH * HIDDEN


def test_few_blocks_tell_what_all_blocks_need(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = []
    for few in (2, BLOCKS):
        monkeypatch.setattr(trial, "_FEW", few)
        model = _model("meta")
        keep_inputs(_linears(model).values())
        start_graph([model.get_input_embeddings()])
        costs.append(try_step(model, _loss(model), CPU))
    assert costs[0].flops == costs[1].flops
    assert costs[0].bytes == pytest.approx(costs[1].bytes, rel=0.01)


def test_operations_are_those_of_the_products() -> None:
    model = _model("meta")
    with torch.no_grad():
        forward = try_step(model, _loss(model), CPU).flops
    linears = BLOCKS * (4 * WIDTH * WIDTH + 3 * WIDTH * HIDDEN)
    attention = BLOCKS * 2 * LENGTH * WIDTH
    # Not every torch counts the fused attention of a CPU, and some transformers make rotary angles by a small product.
    both = (2 * BATCH * LENGTH * linears, 2 * BATCH * LENGTH * (linears + attention))
    assert any(forward == pytest.approx(expected, rel=1e-5) for expected in both)


def test_recomputation_keeps_the_inputs_of_blocks_and_one_block() -> None:
    def bytes_of(*, again: bool) -> int:
        model = _model("meta")
        if again:
            save_memory(model)
        start_graph([model.get_input_embeddings()])
        return try_step(model, _loss(model), CPU).bytes

    whole, less = bytes_of(again=False), bytes_of(again=True)
    assert less < whole / 2
    assert less > BLOCKS * 4 * BATCH * LENGTH * WIDTH


def test_a_frozen_a_keeps_its_rank_alone_of_each_input() -> None:
    """With A frozen only A x is needed for B's gradient; the base weight, frozen too, needs no x either."""
    torch.manual_seed(0)
    saved = {}
    for train_a in (False, True):
        model = _model("cpu")
        saved[train_a] = _saved(_adapted(model, train_a=train_a), _loss(model))
    base = _model("cpu")
    start_graph([base.get_input_embeddings()])
    tokens = 4 * BATCH * LENGTH
    linears = 7 * BLOCKS
    assert saved[False] - _saved(base, _loss(base)) == tokens * linears * RANK
    # Query, key and value read one tensor, and so do gate and up; attention keeps its own output in any case.
    assert saved[True] - saved[False] == tokens * BLOCKS * (2 * WIDTH + HIDDEN)


def test_no_dropout_keeps_nothing() -> None:
    torch.manual_seed(0)
    models = [_model("cpu") for _ in range(2)]
    without, with_some = (
        _saved(_adapted(model, dropout=share), _loss(model)) for model, share in zip(models, (0.0, 0.5), strict=True)
    )
    inputs = BLOCKS * (6 * WIDTH + HIDDEN)
    assert with_some - without == 4 * BATCH * LENGTH * inputs
