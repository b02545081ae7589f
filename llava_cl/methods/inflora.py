"""InfLoRA (CVPR 2024): learn each task within its own inputs' directions outside those of earlier tasks.

With M the directions that the inputs of earlier tasks use (gradient projection memory) and C the second moment of the
new task's, A is the leading directions of (I - M M^T) C, and frozen (section 3.2). Afterwards M grows until it holds a
share of the energy of the new task's C, a share that rises with the number of the task (section 3.3, DualGPM).

Once M has more than half of all dimensions, the authors keep a basis of its complement and shrink that. What is
protected is the same subspace, so M just grows on here.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from llava_cl.methods.contract import LayerStatistics, LoraFactors, Method, MethodOptions, square_root
from llava_cl.subspace import expand_basis, principal_basis, residual_directions


class InfLoraOptions(MethodOptions):
    """Options of InfLoRA; the defaults are those of the authors' code on CIFAR-100 and DomainNet.

    Attributes:
        energy: share of the first task's energy that is protected; the authors' lamb, 0.98 on ImageNet-R.
        growth: by how much the share rises with every task, up to 1; null = by what is missing to 1 over the number of
            the stream's tasks, as the authors have it.
        spectrum: "moment", the authors' code: the energies are the squared singular values of C, the first basis
            is without the direction that crosses the share, and A's rows are 1 / sqrt(3) long. Or "inputs": the
            energies are those of the inputs, which are the singular values of C themselves, so that far more
            directions are protected; the crossing direction is always kept, and A's rows have length one.
    """

    energy: float = Field(0.95, gt=0, le=1)
    growth: float | None = Field(None, ge=0)
    spectrum: Literal["moment", "inputs"] = "moment"


class InfLora(Method):
    """InfLoRA: A from the new task's inputs outside those of earlier tasks, and frozen."""

    before = frozenset({"second_moment"})
    after = frozenset({"second_moment"})

    def __init__(self, options: InfLoraOptions) -> None:
        self._options = options
        self._of_moment = options.spectrum == "moment"

    def initialise(
        self, shape: tuple[int, int], rank: int, statistics: LayerStatistics, basis: Tensor | None, generator: Generator
    ) -> LoraFactors:
        """A: the leading directions of the inputs outside the basis (orthogonal rows of one length)."""
        a = residual_directions(self._directions(statistics).T, basis, rank).a
        return LoraFactors(a / math.sqrt(3) if self._of_moment else a, torch.zeros(shape[0], rank))

    def protect(self, statistics: LayerStatistics, basis: Tensor | None) -> Tensor | None:
        """The basis grown by the principal inputs of the task."""
        energy, growth = self._options.energy, self._options.growth
        rise = (1 - energy) / statistics.stream if growth is None else growth
        share = min(energy + rise * (statistics.tasks - 1), 1.0)
        directions = self._directions(statistics)
        if basis is None and self._of_moment:
            return principal_basis(directions.T, share)
        return expand_basis(basis, directions, share)

    def _directions(self, statistics: LayerStatistics) -> Tensor:
        """A matrix `[in, in]` whose left singular vectors are those of the inputs, with the energies that count."""
        assert statistics.second_moment is not None
        return statistics.second_moment if self._of_moment else square_root(statistics.second_moment)
