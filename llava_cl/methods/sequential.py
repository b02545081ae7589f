"""Sequential LoRA: train A and B on each task in turn, merge, protect nothing. The baseline of everything."""

from __future__ import annotations

import torch

from llava_cl.methods.contract import LayerStatistics, LoraFactors, MethodOptions, kaiming_a


class SequentialOptions(MethodOptions):
    """Sequential LoRA has no options."""


class Sequential:
    """Plain LoRA fine-tuning on one task after another (LoRA-FT).

    A is Kaiming-uniform and B zero (LoRA, ICLR 2022, section 4.1); both are trained.
    """

    train_a = True
    before: frozenset[str] = frozenset()
    after: frozenset[str] = frozenset()

    def __init__(self, options: SequentialOptions) -> None:
        del options

    def initial_basis(self, weight: torch.Tensor) -> None:
        """Nothing is protected."""

    def initialise(
        self,
        shape: tuple[int, int],
        rank: int,
        statistics: LayerStatistics,
        basis: torch.Tensor | None,
        generator: torch.Generator,
    ) -> LoraFactors:
        """Random A, zero B."""
        return LoraFactors(kaiming_a(shape, rank, generator), torch.zeros(shape[0], rank))

    def protect(self, statistics: LayerStatistics, basis: torch.Tensor | None) -> None:
        """Nothing is protected."""
