"""The exact decompositions that the subspace functions share, their precision and their checks.

A full SVD of a 4096 x 11008 weight is needlessly slow: the eigenvectors of its smaller Gram matrix are the
same directions. A Gram matrix squares the condition number, which costs accuracy for the small directions
only. So directions are taken in levels: those within `LEVEL_RANGE` of the largest are accurate and are
kept; the rest are found again from what remains after these have been projected out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

LARGE = 1024
"""Matrices whose smaller side is longer are decomposed by `krylov` in float32 where that converges."""

LEVEL_RANGE = 1e-3
"""Ratio of the smallest to the largest singular value that one float64 Gram matrix is trusted with."""

LEVEL_RANGE_FLOAT32 = 0.03
"""The same for a float32 one."""

NOISE_FLOOR = torch.finfo(torch.float32).eps
"""Singular values below this fraction of the Frobenius norm are rounding of the float32 input."""

ENERGY_ROUNDING = 1e-12
"""An energy fraction short of the threshold by less than this has reached it: float64 sums round."""

LOST_ORTHONORMALITY = 1e-3
"""A basis that leaves more than this fraction of a matrix behind when it is projected out is refused."""


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Switches TF32, bfloat16 products and autocast off inside, and leaves all settings as they were before.

    Of the old and the new settings of torch, set so that they contradict each other, the new ones are left so. A new
    one that followed the setting of all backends keeps its value, and follows no more.
    """
    backends: Any = torch.backends
    flags = [backends.cuda.matmul, backends.mkldnn.matmul]
    precisions = [flag.fp32_precision for flag in flags]
    legacy = _legacy_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
        for flag, precision in zip(flags, precisions, strict=True):
            flag.fp32_precision = precision


def _legacy_precision() -> str | None:
    """The global setting; None where the backends' flags differ from it, as torch then refuses to tell it."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def checked_matrix(name: str, matrix: Tensor) -> Tensor:
    """`matrix` itself, detached.

    Raises:
        ValueError: it is not a two-dimensional floating tensor, or holds NaN or infinite values.
    """
    if matrix.ndim != 2 or not matrix.is_floating_point():
        raise ValueError(f"{name} must be a floating point matrix, but is {matrix.dtype} of shape {list(matrix.shape)}")
    if not torch.isfinite(matrix.sum()):  # quick; a mask of a large matrix is not
        bad = int((~torch.isfinite(matrix)).sum())
        if bad:
            raise ValueError(f"{name} of shape {list(matrix.shape)} holds {bad} NaN or infinite values")
    return matrix.detach()


def checked_basis(basis: Tensor, features: int, other: str) -> Tensor:
    """`basis` `[in, k]` itself, detached, which must have `features` rows like the matrix called `other`."""
    basis = checked_matrix("basis", basis)
    if basis.shape[0] != features or basis.shape[1] > features:
        raise ValueError(
            f"basis must be [in, k] with in = {features} as in {other} and k <= in, but is {list(basis.shape)}"
        )
    return basis


def checked_energy(energy: float) -> float:
    """The energy threshold, a positive fraction; 1 or more asks for every direction above rounding."""
    if not 0 < energy < float("inf"):
        raise ValueError(f"energy must be a positive fraction, but is {energy}")
    return energy


def is_large(matrix: Tensor) -> bool:
    """Whether an eigendecomposition costs enough to try the few products of `krylov` before."""
    return min(matrix.shape) > LARGE


def squared_norm(matrix: Tensor) -> Tensor:
    """The sum of squares, in float64 without a float64 copy of the matrix."""
    return torch.stack([part.double().square().sum() for part in matrix.split(256)]).sum()


def project_out(matrix: Tensor, basis: Tensor) -> Tensor:
    """`matrix` `[in, n]` without its part in the span of `basis` `[in, k]`, both of one dtype.

    Projecting twice removes what one pass leaves when the columns, rounded to float32, are orthonormal to
    1e-7 only.

    Raises:
        ValueError: the columns of `basis` are not orthonormal.
    """
    residual = torch.addmm(matrix, basis, basis.T @ matrix, alpha=-1)
    left_behind = basis.T @ residual
    if left_behind.norm() > LOST_ORTHONORMALITY * matrix.norm():
        raise ValueError(
            f"the columns of the basis {list(basis.shape)} are not orthonormal: projecting it out leaves "
            f"{float(left_behind.norm() / matrix.norm()):.1e} of the matrix inside its span"
        )
    return residual.addmm_(basis, left_behind, alpha=-1)


def leading_directions(matrix: Tensor, floor: float) -> Iterator[tuple[Tensor, Tensor]]:
    """The left singular vectors of `matrix` `[in, n]` (float64), largest first, in blocks.

    Memory besides `matrix`: its smaller Gram matrix a few times, and one copy of `matrix` for each block but
    the first.

    Args:
        matrix: float64.
        floor: singular values up to this absolute size are treated as zero and end the iteration.

    Yields:
        `(vectors, values)`: `[in, m]` with orthonormal columns, orthogonal to all earlier blocks, and `[m]`.
        Work is done only for the blocks that are asked for.
    """
    while matrix.numel() and matrix.norm() > floor:
        vectors, values = largest_directions(matrix, floor)
        if not len(values):
            return
        yield vectors, values
        matrix = project_out(matrix, vectors)


def largest_directions(matrix: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """The left singular vectors of `matrix` `[in, n]` that one Gram matrix of its dtype is trusted with.

    Returns:
        `(vectors, values)`, both in the dtype of `matrix`: `[in, m]` with orthonormal columns, and `[m]` descending,
        larger than `floor`.
    """
    features, columns = matrix.shape
    wide = features <= columns
    gram = matrix @ matrix.T if wide else matrix.T @ matrix
    eigenvalues, eigenvectors = torch.linalg.eigh(gram)
    values = eigenvalues.flip(0).clamp(min=0).sqrt()
    level = LEVEL_RANGE if matrix.dtype == torch.float64 else LEVEL_RANGE_FLOAT32
    keep = int((values > max(floor, level * float(values[0]))).sum())
    vectors = eigenvectors.flip(1)[:, :keep]
    values = values[:keep]
    if not wide:
        vectors = matrix @ vectors
        values = vectors.norm(dim=0)
        vectors = vectors / values
    if matrix.dtype == torch.float32:
        vectors, _ = torch.linalg.qr(vectors)
    return with_fixed_signs(vectors), values


def running_sums(values: Tensor) -> Tensor:
    """The cumulative sums of `values` `[k]`, on the CPU: a GPU adds them up in no fixed order."""
    return values.cpu().cumsum(0)


def with_fixed_signs(vectors: Tensor) -> Tensor:
    """`vectors` `[in, k]`, each column turned so that its entry of largest magnitude is positive."""
    if not vectors.numel():
        return vectors
    largest = vectors.abs().argmax(dim=0, keepdim=True)
    return vectors * vectors.gather(0, largest).sign()


def completing_directions(basis: Tensor, count: int) -> Tensor:
    """`count` orthonormal columns orthogonal to the orthonormal `basis` `[in, k]`, for `count <= in - k`.

    Each is the unit vector that lies farthest outside the span so far, projected out of it.
    """
    for _ in range(count):
        outside = 1 - basis.square().sum(dim=1)
        unit = torch.zeros(basis.shape[0], 1, dtype=basis.dtype, device=basis.device)
        unit[outside.argmax()] = 1
        direction = project_out(unit, basis)
        basis = torch.cat([basis, direction / direction.norm()], dim=1)
    return basis[:, basis.shape[1] - count :]
