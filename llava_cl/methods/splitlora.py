"""SplitLoRA (ICLR 2026): learn each task in the directions that the inputs of earlier tasks use least.

The covariance C of a layer's inputs is averaged over all tasks so far. Its directions of least energy, as many as a
trade-off between the energy of old inputs and the room for the new task gives, are the minor space M. A new task's A
lies in it and is frozen, so that an update B A answers old inputs only with the little energy that they have there.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from llava_cl.methods.contract import LayerStatistics, LoraFactors, Method, MethodOptions, kaiming_a
from llava_cl.subspace import minor_basis, residual_directions


class SplitLoraOptions(MethodOptions):
    """Options of SplitLoRA; the defaults are those of its class-incremental experiments.

    Attributes:
        alpha: weight of the size of the minor space in the trade-off; larger leaves new tasks more room.
        initialise: "random", the authors' code: A = (M Z)^T with Gaussian Z, of the norm of a usual random A over the
            number of the task, and M without two directions at least; or "gradient", the paper's text: the leading
            directions of the task's mean gradient within M, of the norm of a usual random A.
    """

    alpha: float = Field(20.0, gt=0)
    initialise: Literal["random", "gradient"] = "random"


class SplitLora(Method):
    """SplitLoRA: A drawn in the minor space of earlier tasks' inputs, and frozen."""

    after = frozenset({"past_moment"})

    def __init__(self, options: SplitLoraOptions) -> None:
        self._options = options
        self.before = frozenset({"past_moment"} | ({"gradient"} if options.initialise == "gradient" else set()))

    def initialise(
        self, shape: tuple[int, int], rank: int, statistics: LayerStatistics, basis: Tensor | None, generator: Generator
    ) -> LoraFactors:
        """A in the minor space; the first task's is LoRA's usual random one."""
        usual = kaiming_a(shape, rank, generator)
        b = torch.zeros(shape[0], rank)
        if statistics.past_moment is None:
            return LoraFactors(usual, b)
        random = self._options.initialise == "random"
        minor = minor_basis(statistics.past_moment, statistics.tasks, self._options.alpha, two_at_least=random).cpu()
        if not random:
            assert statistics.gradient is not None
            within = residual_directions(statistics.gradient.cpu() @ minor, None, rank).a @ minor.T
            return LoraFactors(within * (usual.norm() / within.norm()), b)
        # M^T Z of a Gaussian Z is Gaussian, too, and M M^T Z does not depend on the axes that were found for the space.
        drawn = (minor @ (minor.T @ torch.randn(shape[1], rank, generator=generator))).T
        return LoraFactors(drawn * (usual.norm() / drawn.norm() / (statistics.tasks + 1)), b)
