"""Bases of protected input directions: from a weight at first, then widened after every task."""

from __future__ import annotations

import torch
from torch import Tensor

from llava_cl.subspace.linalg import (
    ENERGY_ROUNDING,
    NOISE_FLOOR,
    checked_basis,
    checked_energy,
    checked_matrix,
    completing_directions,
    leading_directions,
    project_out,
)


@torch.no_grad()
def principal_basis(weight: Tensor, energy: float) -> Tensor:
    """The principal input directions of a weight (KeepLoRA, ICLR 2026: knowledge of the pretrained model).

    The directions are the right singular vectors of the weight. They are kept, largest first, while their
    summed squared singular values stay below `energy` of the total. The direction that crosses the threshold
    is left out, but one is always kept (for an all-zero weight, an arbitrary one).

    KeepLoRA for CLIP builds its first feature basis by the same rule: pass the transposed features `[n, in]`.

    Args:
        weight: `[out, in]`, any floating dtype.
        energy: fraction of the squared Frobenius norm; 1 or more keeps every direction above rounding.

    Returns:
        `[in, k]`, `1 <= k <= min(out, in)`, float32, orthonormal columns in order of decreasing energy.

    Raises:
        ValueError: wrong shape or dtype, NaN or infinite values, or `energy` not positive.
    """
    weight64 = checked_matrix("weight", weight)
    energy = checked_energy(energy)
    total = float(weight64.square().sum())
    kept: list[Tensor] = []
    fraction = 0.0
    for vectors, values in leading_directions(weight64.T, floor=NOISE_FLOOR * total**0.5):
        cumulative = fraction + values.square().cumsum(0) / total
        count = int((cumulative < energy - ENERGY_ROUNDING).sum())
        kept.append(vectors[:, : max(count, 0 if kept else 1)])
        if count < len(values):
            break
        fraction = float(cumulative[-1])
    if not kept:
        kept.append(completing_directions(weight64.new_zeros(weight64.shape[1], 0), 1))
    return torch.cat(kept, dim=1).float()


@torch.no_grad()
def expand_basis(basis: Tensor | None, directions: Tensor, energy: float) -> Tensor:
    """The basis, widened until it holds `energy` of `directions` (KeepLoRA, ICLR 2026).

    The part of `directions` outside the basis is decomposed, and its left singular vectors are appended,
    largest first, until the basis accounts for the fraction `energy` of the squared Frobenius norm of
    `directions`. The direction that crosses the threshold is kept, for the first basis (`None`) as well.

    Args:
        basis: `[in, k]` with orthonormal columns, or `None` for the first one.
        directions: `[in, n]`: the transposed gradient `[in, out]` of a weight, or its input features.
        energy: fraction of the squared Frobenius norm; 1 or more appends every direction above rounding.

    Returns:
        `[in, k + j]`, float32. The first k columns are those of `basis`, bit for bit, and the others are
        orthonormal and orthogonal to them. `basis` itself where it holds enough already (so for all-zero
        directions too; `[in, 0]` where there was none). Never more than `in` columns.

    Raises:
        ValueError: shapes that do not agree, a basis that is not orthonormal, NaN or infinite values, or
            `energy` not positive.
    """
    residual = checked_matrix("directions", directions)
    energy = checked_energy(energy)
    features = residual.shape[0]
    old = residual.new_zeros(features, 0, dtype=torch.float32) if basis is None else basis.float()
    old64 = checked_basis(old, features, "directions")
    total = float(residual.square().sum())
    if total == 0:
        return old
    fraction = 0.0
    if old64.shape[1]:
        residual = project_out(residual, old64)
        fraction = 1 - float(residual.square().sum()) / total
    columns = [old]
    room = features - old64.shape[1]
    blocks = leading_directions(residual, floor=NOISE_FLOOR * total**0.5)
    while room > 0 and fraction < energy - ENERGY_ROUNDING:
        vectors, values = next(blocks, (None, None))
        if vectors is None or values is None:
            break
        cumulative = fraction + values.square().cumsum(0) / total
        count = min(int((cumulative < energy - ENERGY_ROUNDING).sum()) + 1, len(values), room)
        columns.append(vectors[:, :count].float())
        fraction = float(cumulative[count - 1])
        room -= count
    return torch.cat(columns, dim=1) if len(columns) > 1 else old
