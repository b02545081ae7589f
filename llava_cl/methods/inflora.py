"""InfLoRA (CVPR 2024): learn each task within its own inputs' directions outside those of earlier tasks.

With M the directions that the inputs of earlier tasks use (gradient projection memory) and H those of the new task, A
is the leading directions of (I - M M^T) H, and frozen (section 3.2). Afterwards M grows until it holds a share of the
energy of the new task's inputs, a share that rises with the number of the task (section 3.3, DualGPM's threshold).
"""

from __future__ import annotations

import torch
from pydantic import Field

from llava_cl.methods.contract import LayerStatistics, LoraFactors, LoraMethod, MethodOptions, square_root
from llava_cl.subspace import expand_basis, residual_directions


class InfLoraOptions(MethodOptions):
    """Options of InfLoRA.

    Attributes:
        energy: share of the first task's input energy that is protected.
        growth: by how much the share rises with every task, up to 1.
    """

    energy: float = Field(0.95, gt=0, le=1)
    growth: float = Field(0.0, ge=0)


class InfLora(LoraMethod):
    """InfLoRA: A from the new task's inputs outside those of earlier tasks, and frozen."""

    before = frozenset({"second_moment"})
    after = frozenset({"second_moment"})

    def __init__(self, options: InfLoraOptions) -> None:
        self._options = options

    def initialise(
        self,
        shape: tuple[int, int],
        rank: int,
        statistics: LayerStatistics,
        basis: torch.Tensor | None,
        generator: torch.Generator,
    ) -> LoraFactors:
        """A: the leading directions of the inputs outside the basis (rows orthonormal)."""
        assert statistics.second_moment is not None
        inputs = square_root(statistics.second_moment).T
        return LoraFactors(residual_directions(inputs, basis, rank).a, torch.zeros(shape[0], rank))

    def protect(self, statistics: LayerStatistics, basis: torch.Tensor | None) -> torch.Tensor | None:
        """The basis grown by the principal inputs of the task."""
        assert statistics.second_moment is not None
        energy = min(self._options.energy + self._options.growth * (statistics.tasks - 1), 1.0)
        return expand_basis(basis, square_root(statistics.second_moment), energy)
