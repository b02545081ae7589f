"""Independent references for the subspace tests: plain float64 SVDs, and the stored reference cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden" / "subspace"


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def projector(columns: Tensor) -> Tensor:
    """The orthogonal projector on the span of orthonormal columns, float64."""
    return columns.double() @ columns.double().T


def assert_orthonormal(columns: Tensor, tolerance: float = 1e-6) -> None:
    gram = columns.double().T @ columns.double()
    torch.testing.assert_close(gram, torch.eye(columns.shape[1]).double(), atol=tolerance, rtol=0)


def assert_same_span(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    torch.testing.assert_close(projector(actual), projector(expected), atol=tolerance, rtol=0)


def with_spectrum(rows: int, columns: int, values: list[float], seed: int) -> Tensor:
    """A float32 `[rows, columns]` matrix with the given singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    count = len(values)
    left, _ = torch.linalg.qr(torch.randn(rows, count, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, count, generator=generator, dtype=torch.float64))
    return (left * torch.tensor(values, dtype=torch.float64) @ right.T).float()


def random_orthonormal(size: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    columns, _ = torch.linalg.qr(torch.randn(size, count, generator=generator, dtype=torch.float64))
    return columns.float()


@st.composite
def matrices(draw: st.DrawFn, max_side: int = 24) -> Tensor:
    """Random shapes, ranks (0 included), scales and decays down to single precision."""
    rows, columns = draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
    rank = draw(st.integers(0, min(rows, columns)))
    scale = 10.0 ** draw(st.integers(-12, 6))
    decay = draw(st.floats(0, 3))
    values = [scale * (j + 1) ** -decay for j in range(rank)]
    return with_spectrum(rows, columns, values, draw(st.integers(0, 2**31)))
