"""Bases of protected input directions, from a weight at first, then widened; and a weight without its smallest ones."""

from __future__ import annotations

import torch
from torch import Tensor

from llava_cl.subspace.krylov import leading_outside
from llava_cl.subspace.linalg import (
    ENERGY_ROUNDING,
    LOST_ORTHONORMALITY,
    NOISE_FLOOR,
    checked_basis,
    checked_energy,
    checked_matrix,
    completing_directions,
    full_precision,
    is_large,
    largest_directions,
    leading_directions,
    project_out,
    running_sums,
    squared_norm,
    with_fixed_signs,
)

WINDOW = 64
"""Directions on either side of a threshold that are told apart in float64."""


@torch.no_grad()
@full_precision()
def principal_basis(weight: Tensor, energy: float) -> Tensor:
    """The principal input directions of a weight (KeepLoRA, ICLR 2026: knowledge of the pretrained model).

    The directions are the right singular vectors of the weight. They are kept, largest first, while their
    summed squared singular values stay below `energy` of the total. The direction that crosses the threshold
    is left out, but one is always kept (for an all-zero weight, an arbitrary one).

    KeepLoRA for CLIP builds its first feature basis by the same rule: pass the transposed features `[n, in]`.

    Memory for a large weight: less than one float32 copy, and its smaller Gram matrix a few times; where float32 does
    not resolve the directions, two float64 copies at most.

    Args:
        weight: `[out, in]`, any floating dtype.
        energy: fraction of the squared Frobenius norm; 1 or more keeps every direction above rounding.

    Returns:
        `[in, k]`, `1 <= k <= min(out, in)`, float32, orthonormal columns in order of decreasing energy.

    Raises:
        ValueError: wrong shape or dtype, NaN or infinite values, or `energy` not positive.
    """
    weight = checked_matrix("weight", weight)
    energy = checked_energy(energy)
    total = float(squared_norm(weight))
    floor = NOISE_FLOOR * total**0.5
    if is_large(weight) and energy < 1 - NOISE_FLOOR:
        found = _principal_float32(weight.float(), (energy - ENERGY_ROUNDING) * total, floor)
        if found is not None:
            return found
    kept: list[Tensor] = []
    fraction = 0.0
    for vectors, values in leading_directions(weight.double().T, floor):
        cumulative = fraction + running_sums(values.square()) / total
        count = int((cumulative < energy - ENERGY_ROUNDING).sum())
        kept.append(vectors[:, : max(count, 0 if kept else 1)])
        if count < len(values):
            break
        fraction = float(cumulative[-1])
    if not kept:
        kept.append(completing_directions(weight.new_zeros(weight.shape[1], 0, dtype=torch.float64), 1))
    return torch.cat(kept, dim=1).float()


def _principal_float32(weight: Tensor, needed: float, floor: float) -> Tensor | None:
    """The principal basis where few directions hold the energy `needed`, or one float32 Gram matrix resolves them."""
    found = leading_outside(weight.T, weight.new_empty(weight.shape[1], 0), min(weight.shape), needed)
    if found is None:
        vectors, values = largest_directions(weight.T, floor)
        found = vectors, values.double().square()
    vectors, energies = found
    count = int((running_sums(energies) < needed).sum())
    if count == len(energies):
        return None
    return with_fixed_signs(_settled(weight, vectors, max(count, 1)))


def _settled(weight: Tensor, vectors: Tensor, count: int) -> Tensor:
    """The first `count` of the vectors, after those around the last are told apart in float64 (Rayleigh-Ritz).

    There the energies are within 1 / count of each other, and float32 mixes directions on both sides of the threshold.
    """
    first = max(count - WINDOW, 0)
    around = vectors[:, first : count + WINDOW].double()
    images = torch.cat([part.double() @ around for part in weight.split(256)])
    rotation = torch.linalg.eigh(images.T @ images).eigenvectors.flip(1)
    return torch.cat([vectors[:, :first], (around @ rotation[:, : count - first]).float()], dim=1)


@torch.no_grad()
@full_precision()
def expand_basis(basis: Tensor | None, directions: Tensor, energy: float) -> Tensor:
    """The basis, widened until it holds `energy` of `directions` (KeepLoRA, ICLR 2026).

    The part of `directions` outside the basis is decomposed, and its left singular vectors are appended,
    largest first, until the basis accounts for the fraction `energy` of the squared Frobenius norm of
    `directions`. The direction that crosses the threshold is kept, for the first basis (`None`) as well.

    The time grows with the number of columns that the basis has and gets, and with nothing else that earlier tasks
    left. Memory for large directions: less than one float32 copy where few columns are added; otherwise three float64
    ones at most, and the smaller Gram matrix a few times.

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
    directions = checked_matrix("directions", directions)
    energy = checked_energy(energy)
    features = directions.shape[0]
    old = directions.new_zeros(features, 0, dtype=torch.float32) if basis is None else basis.float()
    room = features - checked_basis(old, features, "directions").shape[1]
    total = float(squared_norm(directions))
    if total == 0:
        return old
    if is_large(directions) and energy < 1 - NOISE_FLOOR:
        found = _few_directions(old, directions.float(), (energy - ENERGY_ROUNDING) * total)
        if found is not None:
            return torch.cat([old, found], dim=1) if found.shape[1] else old
    residual = directions.double()
    fraction = 0.0
    if old.shape[1]:
        residual = project_out(residual, old.double())
        fraction = 1 - float(residual.square().sum()) / total
    columns = [old]
    blocks = leading_directions(residual, floor=NOISE_FLOOR * total**0.5)
    while room > 0 and fraction < energy - ENERGY_ROUNDING:
        vectors, values = next(blocks, (None, None))
        if vectors is None or values is None:
            break
        cumulative = fraction + running_sums(values.square()) / total
        count = min(int((cumulative < energy - ENERGY_ROUNDING).sum()) + 1, len(values), room)
        columns.append(vectors[:, :count].float())
        fraction = float(cumulative[count - 1])
        room -= count
    return torch.cat(columns, dim=1) if len(columns) > 1 else old


@torch.no_grad()
@full_precision()
def orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal columns with the span of any columns; the same ones where they are orthonormal.

    Args:
        columns: `[in, k]`, any floating dtype.

    Returns:
        `[in, rank]` float32.

    Raises:
        ValueError: wrong shape or dtype, NaN or infinite values.
    """
    columns = checked_matrix("columns", columns).float()
    if columns.shape[1] <= columns.shape[0]:
        overlaps = columns.T @ columns
        overlaps.diagonal().sub_(1)
        # In the root of the mean over the columns, so that rounding adds up to nothing in a large basis.
        if overlaps.norm() <= LOST_ORTHONORMALITY * columns.shape[1] ** 0.5:
            return columns
    left, values, _ = torch.linalg.svd(columns.double(), full_matrices=False)
    return left[:, values > NOISE_FLOOR * float(values.norm())].float()


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


def _few_directions(basis: Tensor, directions: Tensor, needed: float) -> Tensor | None:
    """The columns that expand a basis to the energy `needed`, where they are few; none where it holds that already.

    The energy that the basis holds is a sum over blocks of `directions`: no projected copy is made.
    """
    project_out(directions.sum(dim=1, keepdim=True), basis)  # refuses a basis that is not orthonormal
    held = sum(float(squared_norm(basis.T @ part)) for part in directions.split(1024, dim=1))
    if held >= needed:
        return basis[:, :0]
    found = leading_outside(directions, basis, basis.shape[0] - basis.shape[1], needed - held)
    return None if found is None else with_fixed_signs(found[0])
