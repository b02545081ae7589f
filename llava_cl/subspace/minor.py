"""The minor space of past inputs: the input directions that earlier tasks hardly use."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from llava_cl.subspace.linalg import checked_matrix, running_sums, with_fixed_signs

logger = logging.getLogger(__name__)

ASYMMETRY = 1e-4
"""Relative size of the antisymmetric or negative part above which a matrix is no covariance."""


@torch.no_grad()
def minor_basis(covariance: Tensor, tasks_seen: int, alpha: float, *, two_at_least: bool = True) -> Tensor:
    """The directions of least input energy, as many as SplitLoRA's trade-off rule gives.

    With the eigenvalues in descending order, c_j the fraction of their sum in the first j + 1, and d = in,

        r = argmin_j  tasks_seen * (1 - c_j) - alpha * (d - j) / d,    j = 0 .. d - 1:

    the energy of old inputs left in the minor space, weighted by the number of tasks, against its size.
    The minor space begins at direction r + 1, counted from 0, as c_r is the energy of the directions up to r. For r
    = 0 two directions are left out all the same, as in the authors' implementation: the published numbers come from
    this form; without `two_at_least` it is one, as the rule has it. At least one direction is kept, with a warning
    in the log where the rule would leave none.

    Args:
        covariance: `[in, in]`, symmetric: the mean of x x^T over the inputs of all tasks so far.
        tasks_seen: how many tasks that mean covers, from 1.
        alpha: weight of the size of the minor space; larger keeps more directions.
        two_at_least: leave out two directions where the rule leaves out one.

    Returns:
        `[in, m]`, `m >= 1`, float32, orthonormal columns in order of decreasing energy.

    Raises:
        ValueError: not a covariance (shape, symmetry, sign, all zero), NaN or infinite values, or
            `tasks_seen` below 1.
    """
    covariance64 = checked_matrix("covariance", covariance).double()
    size = covariance64.shape[0]
    if covariance64.shape[1] != size:
        raise ValueError(f"covariance must be square, but is {list(covariance64.shape)}")
    if tasks_seen < 1:
        raise ValueError(f"tasks_seen must be at least 1, but is {tasks_seen}")
    scale = float(covariance64.norm())
    if scale == 0:
        raise ValueError(f"covariance {list(covariance64.shape)} is all zero: it has seen no inputs")
    if float((covariance64 - covariance64.T).norm()) > ASYMMETRY * scale:
        raise ValueError(f"covariance {list(covariance64.shape)} is not symmetric")
    eigenvalues, eigenvectors = torch.linalg.eigh((covariance64 + covariance64.T) / 2)
    if float(eigenvalues[0]) < -ASYMMETRY * scale:
        raise ValueError(
            f"covariance {list(covariance64.shape)} has a negative eigenvalue of {float(eigenvalues[0]):.3g}"
        )
    energies = eigenvalues.flip(0).clamp(min=0)
    outside = 1 - running_sums(energies) / float(energies.sum())
    kept_fraction = 1 - torch.arange(size, dtype=torch.float64) / size
    trade_off = int((tasks_seen * outside - alpha * kept_fraction).argmin())
    first = max(trade_off, int(two_at_least)) + 1
    if first >= size:
        left = "no minor direction of %d is left for %d tasks at alpha = %g; the last one is kept"
        logger.warning(left, size, tasks_seen, alpha)
        first = size - 1
    return with_fixed_signs(eigenvectors.flip(1)[:, first:]).float()
