"""Sequential LoRA: plain LoRA that protects nothing."""

from __future__ import annotations

import torch

from llava_cl.config import MethodConfig
from llava_cl.methods import LayerStatistics, LoraFactors, build_method


def test_it_is_plain_lora() -> None:
    method = build_method(MethodConfig(name="sequential"))
    assert method.train_a
    assert method.before == method.after == frozenset()
    assert method.initial_basis(torch.randn(4, 6)) is None
    assert method.protect(LayerStatistics(), None) is None

    def start(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        return method.initialise((4, 6), 2, LayerStatistics(), None, torch.Generator().manual_seed(seed))

    a, b = start(0)
    assert not b.any()
    assert torch.equal(a, start(0)[0])
    assert not torch.equal(a, start(1)[0])


def test_a_carried_adapter_goes_on_where_it_ended() -> None:
    method = build_method(MethodConfig(name="sequential", options={"carry": True}))
    assert method.train_a
    assert (method.before, method.after) == ({"adapter"}, frozenset())
    trained = LoraFactors(torch.randn(2, 6), torch.randn(4, 2))

    def start(adapter: LoraFactors | None) -> LoraFactors:
        statistics = LayerStatistics(tasks=adapter is not None, adapter=adapter)
        return method.initialise((4, 6), 2, statistics, None, torch.Generator().manual_seed(0))

    assert all(map(torch.equal, start(trained), trained))
    assert not start(None).b.any()
    assert start(None).a.abs().max() <= 6**-0.5
