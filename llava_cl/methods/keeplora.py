"""KeepLoRA (ICLR 2026): learn each task in the residual subspace of what the weights already use.

Before a task the gradient G of every weight is measured. Its part outside the protected basis U,
G (I - U U^T), gives the frozen LoRA A: its r leading right singular vectors. Only B is trained, so the update
B A changes nothing for inputs inside span(U). Afterwards U grows by the directions that carry the new task.
U starts from the principal directions of the pretrained weights themselves.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from llava_cl.methods.contract import LayerStatistics, LoraFactors, Method, MethodOptions, square_root
from llava_cl.subspace import expand_basis, principal_basis, residual_directions

_STATISTIC = {"gradient": "gradient", "feature": "second_moment", "mean_feature": "mean_input"}


class KeepLoraOptions(MethodOptions):
    """Options of KeepLoRA; the defaults are those of its LLaVA experiments.

    Attributes:
        weight_energy: share of a pretrained weight's energy whose directions are protected from the start;
            null protects none.
        weight_side: "input" directions of the weight, or "output" as in the authors' CLIP code, which applies them to
            inputs all the same (square weights only).
        protect: what is protected after a task: directions of the trained model's "gradient" (LLaVA
            experiments), of the second moment of the layer's input "feature"s, of their "mean_feature" over batches
            (the CLIP experiments; it depends on which samples share a batch), or null for nothing.
        energy: share of the new directions' energy that the grown basis must hold.
        initialise: A from the projected "gradient", or "random" (frozen), an ablation.
        b: "zero", or "gradient" for B = S V^T of the projected gradient with the frozen weight compensated.
    """

    weight_energy: float | None = Field(0.6, gt=0, lt=1)
    weight_side: Literal["input", "output"] = "input"
    protect: Literal["gradient", "feature", "mean_feature"] | None = "gradient"
    energy: float = Field(0.99, gt=0, le=1)
    initialise: Literal["gradient", "random"] = "gradient"
    b: Literal["zero", "gradient"] = "zero"


class KeepLora(Method):
    """KeepLoRA: LoRA confined to the residual subspace, A from the projected gradient and frozen."""

    def __init__(self, options: KeepLoraOptions) -> None:
        self._options = options
        self.before = frozenset({"gradient"} if options.initialise == "gradient" else ())
        self.after = frozenset({_STATISTIC[options.protect]} if options.protect else ())

    def problem(self, shape: tuple[int, int]) -> str | None:
        """Directions of outputs are none of inputs where there are not as many."""
        if self._options.weight_energy is None or self._options.weight_side == "input" or shape[0] == shape[1]:
            return None
        return "method.options.weight_side: 'output' is for square weights"

    def initial_basis(self, weight: Tensor) -> Tensor | None:
        """The principal input directions of the pretrained weight (KeepLoRA, general-knowledge subspace)."""
        energy = self._options.weight_energy
        if energy is None:
            return None
        return principal_basis(weight if self._options.weight_side == "input" else weight.T, energy)

    def initialise(
        self, shape: tuple[int, int], rank: int, statistics: LayerStatistics, basis: Tensor | None, generator: Generator
    ) -> LoraFactors:
        """A: the leading right singular vectors of the gradient outside the basis (rows orthonormal)."""
        if self._options.initialise == "random":
            return super().initialise(shape, rank, statistics, basis, generator)
        assert statistics.gradient is not None
        directions = residual_directions(statistics.gradient, basis, rank)
        b = directions.b if self._options.b == "gradient" else torch.zeros_like(directions.b)
        return LoraFactors(directions.a, b)

    def protect(self, statistics: LayerStatistics, basis: Tensor | None) -> Tensor | None:
        """The basis grown by the gradient's input directions, or by the principal input features."""
        kind, energy = self._options.protect, self._options.energy
        if kind is None:
            return basis
        measured = getattr(statistics, _STATISTIC[kind])
        assert measured is not None
        if kind == "mean_feature" and basis is None:
            # The authors' CLIP code leaves the crossing direction out of a first basis.
            return principal_basis(measured.T, energy)
        if kind == "feature":
            measured = square_root(measured)
        return expand_basis(basis, measured.T if kind == "gradient" else measured, energy)
