"""The leading directions of a large matrix outside a basis, from a block Krylov space in float32.

A few products with the matrix give its leading singular vectors, where an eigendecomposition of its Gram matrix costs
as much for one as for all. The space grows by a block at a time from a fixed Gaussian sketch (block Lanczos; Golub,
Luk and Overton, 1981; Musco and Musco, 2015). Nothing is taken on trust: a direction counts once its residual, which
the next block gives, is small; a second sketch looks for directions that were missed; and where either fails, or the
spectrum is too flat, the answer is None and the exact way must be gone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_cl.subspace.linalg import LEVEL_RANGE, LOST_ORTHONORMALITY, NOISE_FLOOR, running_sums

SMALLEST_BLOCK, LARGEST_BLOCK = 16, 64
"""Columns by which the space grows, where the number of directions is not known before: 1/64 of the smaller side,
within these bounds. Fewer columns need fewer products, more are faster each."""

RESIDUAL_TOLERANCE = 1e-5
"""Largest residual of a direction v of energy e = s^2: ||M v - e v|| / e, with M the Gram operator. Energies are then
exact to this fraction at the worst, and to its square over the relative gap to the next energy otherwise. A residual
within the rounding of float32, eps * s * (norm of the matrix), is accepted as well."""

PROBES = 8
"""Columns of the sketch that looks for missed directions: copies of one singular value beyond those in a block."""

CHECK_GROWTH = 1.2
"""The space is looked at each time it has grown by this factor: a look is an eigendecomposition of its size."""

FEW = 1 / 8
"""Share of a matrix's smaller side up to which directions are few. More are cheaper by an eigendecomposition."""

LARGEST = 3 / 8
"""Share of a matrix's smaller side at which a space has not converged, and is given up."""


def leading_outside(
    matrix: Tensor, basis: Tensor, count: int, energy: float = float("inf")
) -> tuple[Tensor, Tensor] | None:
    """The left singular vectors of `matrix` outside `basis`, largest first, until they are enough.

    Besides `matrix` and `basis` the memory is at most `in * (k + LARGEST * side) + n * LARGEST * side` float32 numbers,
    with side = min(in, n): less than one copy of `matrix` for a small basis.

    Args:
        matrix: `[in, n]` float32.
        basis: `[in, k]` float32, orthonormal columns.
        count: as many directions are enough.
        energy: so are those whose squared singular values sum up to this.

    Returns:
        `(vectors, energies)`: `[in, j]` float32, orthonormal and orthogonal to `basis`, and `[j]` float64, the squared
        singular values. None where more than `FEW` directions of the smaller side are needed, they do not converge, or
        the last one is below LEVEL_RANGE of the norm of `matrix`, where float32 products round too much.

    Raises:
        ValueError: the columns of `basis` are not orthonormal.
    """
    size, width = matrix.shape
    side = min(size, width)
    few, limit = int(FEW * side), int(LARGEST * side)
    block = count + count // 2
    if energy < float("inf"):
        block = min(max(side // 64, SMALLEST_BLOCK), LARGEST_BLOCK)
    elif count > few:
        return None
    start, norm = basis.shape[1], float(matrix.norm())
    columns = torch.cat([basis, matrix.new_empty(size, limit + block)], dim=1)
    images = matrix.new_empty(width, limit)
    gram = matrix.new_zeros(limit, limit, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    following = _orthonormal_outside(matrix @ torch.randn(width, block, generator=generator).to(matrix), basis)
    grown, seen = 0, block
    while following is not None and grown + block <= limit:
        before, grown = grown, grown + block
        columns[:, start + before : start + grown] = following[0]
        images[:, before:grown] = matrix.T @ following[0]
        for part in images[:, :grown].split(1024):
            gram[:grown, before:grown] += part.double().T @ part[:, before:].double()
        gram[before:grown, :grown] = gram[:grown, before:grown].T
        following = _orthonormal_outside(matrix @ images[:, before:grown], columns[:, : start + grown])
        if following is None or grown < CHECK_GROWTH * seen:
            continue
        seen = grown
        values, rotation = torch.linalg.eigh(gram[:grown, :grown])
        values, rotation = values.flip(0), rotation.flip(1)
        residuals = (following[1].double() @ rotation[before:]).norm(dim=0)
        rounding = NOISE_FLOOR * norm * values.clamp(min=0).sqrt()
        converged = int((residuals <= torch.maximum(RESIDUAL_TOLERANCE * values, rounding)).long().cumprod(0).sum())
        sums = running_sums(values)
        wanted = min(count, int((sums < energy).sum()) + 1)
        if wanted <= converged:
            vectors = columns[:, start : start + grown] @ rotation[:, :wanted].float()
            probe = torch.randn(width, PROBES, generator=generator).to(matrix)
            largest_missed = _largest_outside(matrix, torch.cat([basis, vectors], dim=1), probe)
            smallest = float(values[wanted - 1])
            if smallest < (LEVEL_RANGE * norm) ** 2 or largest_missed > smallest * (1 + RESIDUAL_TOLERANCE):
                return None
            return vectors, values[:wanted]
        if converged and min(count, _fewest(sums, values, converged, energy)) > few:
            return None
    return None


def _fewest(sums: Tensor, values: Tensor, converged: int, energy: float) -> float:
    """How many directions `energy` takes at least, as none after the converged ones is larger than the last of them."""
    return converged + (energy - float(sums[converged - 1])) / float(values[converged - 1])


def _largest_outside(matrix: Tensor, columns: Tensor, probe: Tensor) -> float:
    """A lower bound on the largest energy of `matrix` outside `columns`, from one power iteration of `probe`.

    Infinite where hardly anything is left there, so that rounding would be looked at.
    """
    for _ in range(2):
        found = _orthonormal_outside(matrix @ probe, columns)
        if found is None:
            return float("inf")
        probe = matrix.T @ found[0]
    return float(torch.linalg.matrix_norm(probe.double(), 2)) ** 2


def _orthonormal_outside(block: Tensor, columns: Tensor) -> tuple[Tensor, Tensor] | None:
    """`(q, r)` with q orthonormal outside `columns` and q r the part of `block` there; None where that is rounding.

    Raises:
        ValueError: the columns are not orthonormal.
    """
    first, upper = torch.linalg.qr(torch.addmm(block, columns, columns.T @ block, alpha=-1))
    left_behind = columns.T @ first
    if (left_behind @ upper).norm() > LOST_ORTHONORMALITY * block.norm():
        raise ValueError(f"the columns of the basis {list(columns.shape)} are not orthonormal")
    second, correction = torch.linalg.qr(torch.addmm(first, columns, left_behind, alpha=-1))
    if bool((correction.diagonal().abs() < 0.5).any()):
        return None
    return second, correction @ upper
