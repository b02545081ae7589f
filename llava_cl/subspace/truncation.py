"""A weight without its smallest singular directions."""

from __future__ import annotations

import torch
from torch import Tensor

from llava_cl.subspace.linalg import ENERGY_ROUNDING, checked_energy, checked_matrix, running_sums


@torch.no_grad()
def truncate_spectrum(weight: Tensor, ratio: float) -> Tensor:
    """The best approximation of a weight of the smallest rank that holds a share of its singular values' sum.

    The sum is of the values themselves and not of their squares, as in KeepLoRA's experiment on what the principal
    directions of a pretrained CLIP hold (ICLR 2026, figure 1).

    Args:
        weight: `[out, in]`, any floating dtype.
        ratio: share of the sum of the singular values; 1 or more keeps the weight.

    Returns:
        `[out, in]` float32.

    Raises:
        ValueError: wrong shape or dtype, NaN or infinite values, or `ratio` not positive.
    """
    left, values, right = torch.linalg.svd(checked_matrix("weight", weight).double(), full_matrices=False)
    shares = running_sums(values) / float(values.sum())
    rank = min(int((shares < checked_energy(ratio) - ENERGY_ROUNDING).sum()) + 1, len(values))
    return (left[:, :rank] * values[:rank] @ right[:rank]).float()
