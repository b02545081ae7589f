"""O-LoRA (Findings of EMNLP 2023): keep the subspaces of the tasks' adapters orthogonal by a penalty.

Each task trains its own A and B. To the loss comes lambda * sum over earlier tasks i of |A_i A^T| (the absolute values
of all entries, as the authors compute it; equations 6 to 8), which drives the rows of A away from those of earlier
tasks. Not to be confused with the initialisation of that name in PEFT.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from llava_cl.methods.contract import LayerStatistics, Method, MethodOptions


class OLoraOptions(MethodOptions):
    """Options of O-LoRA.

    Attributes:
        penalty: lambda, the weight of the overlap of A with those of earlier tasks.
    """

    penalty: float = Field(0.5, ge=0)


class OLora(Method):
    """O-LoRA: A and B trained under a penalty on the overlap of A with those of earlier tasks."""

    train_a = True
    penalises = True
    after = frozenset({"adapter"})

    def __init__(self, options: OLoraOptions) -> None:
        self._options = options

    def penalty(self, a: Tensor, basis: Tensor | None) -> Tensor:
        """lambda * the sum of the absolute inner products of rows of A with those of earlier tasks."""
        if basis is None:
            return a.new_zeros(())
        return self._options.penalty * (a @ basis.to(a.dtype)).abs().sum()

    def protect(self, statistics: LayerStatistics, basis: Tensor | None) -> Tensor:
        """The rows of all A so far, as columns; they are not orthonormal."""
        assert statistics.adapter is not None
        rows = statistics.adapter.a.T
        return rows if basis is None else torch.cat([basis.to(rows.device), rows], dim=1)
