"""The strongest gradient directions outside a basis: where the next adapter may learn."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from llava_cl.subspace.krylov import leading_outside
from llava_cl.subspace.linalg import (
    NOISE_FLOOR,
    checked_basis,
    checked_matrix,
    completing_directions,
    full_precision,
    is_large,
    leading_directions,
    project_out,
    with_fixed_signs,
)

logger = logging.getLogger(__name__)


class ResidualDirections(NamedTuple):
    """A rank-r factorisation `b @ a` of a projected gradient, float32.

    Attributes:
        a: `[rank, in]`, orthonormal rows, orthogonal to the basis, largest singular value first.
        b: `[out, rank]`, orthogonal columns, each as long as its singular value.
        singular_values: `[rank]`, descending.
    """

    a: Tensor
    b: Tensor
    singular_values: Tensor


@torch.no_grad()
@full_precision()
def residual_directions(gradient: Tensor, basis: Tensor | None, rank: int) -> ResidualDirections:
    """The best rank-`rank` approximation of the gradient's part outside a basis (KeepLoRA, ICLR 2026).

    With U the basis, it is the truncated singular value decomposition of `gradient (I - U U^T)`. That of a large
    gradient comes from a Krylov space with checked residuals: energies exact to `krylov.RESIDUAL_TOLERANCE`, directions
    to that over the relative gap to the next energy, or to the rounding of float32. Where the gradient has fewer than
    `rank` directions, as if it is all zero, `a` is filled up with other orthonormal rows orthogonal to the basis, and
    `b` and `singular_values` are zero there.

    Where the basis leaves fewer than `rank` dimensions, the rows of `a` beyond them are zero, with a warning
    in the log: as the frozen half of an adapter they learn nothing and disturb nothing that the basis
    protects, so that a long stream goes on at a smaller effective rank.

    Memory for a large gradient: less than one float32 copy of it, or three float64 ones where the Krylov space does not
    converge.

    Args:
        gradient: `[out, in]`, any floating dtype.
        basis: `[in, k]` with orthonormal columns, or `None` for an empty one.
        rank: number of directions, from 1.

    Raises:
        ValueError: `rank` below 1, shapes that do not agree, a basis that is not orthonormal, or NaN or
            infinite values.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, but is {rank}")
    gradient = checked_matrix("gradient", gradient)
    features = gradient.shape[1]
    old = gradient.new_zeros(features, 0) if basis is None else checked_basis(basis, features, "gradient")
    room = features - old.shape[1]
    if room < rank:
        left = "a basis of %d directions leaves %d of %d: %d rows of the adapter are zero"
        logger.warning(left, old.shape[1], room, features, rank - room)
    elif is_large(gradient):
        gradient32 = gradient.float()
        leading = leading_outside(gradient32.T, old.float(), rank)
        if leading is not None:
            vectors = with_fixed_signs(leading[0])
            return ResidualDirections(vectors.T.contiguous(), gradient32 @ vectors, leading[1].sqrt().float())
    old, gradient = old.double(), gradient.double()
    residual = project_out(gradient.T, old)
    floor = NOISE_FLOOR * float(gradient.norm())
    found = old.new_zeros(features, 0)
    for vectors, _ in leading_directions(residual, floor):
        found = torch.cat([found, vectors[:, : min(rank, room) - found.shape[1]]], dim=1)
        if found.shape[1] == min(rank, room):
            break
    b = pad(residual.T @ found, (0, rank - found.shape[1]))
    filling = completing_directions(torch.cat([old, found], dim=1), min(rank, room) - found.shape[1])
    a = pad(torch.cat([found, filling], dim=1), (0, max(rank - room, 0))).T.contiguous()
    return ResidualDirections(a=a.float(), b=b.float(), singular_values=b.norm(dim=0).float())
