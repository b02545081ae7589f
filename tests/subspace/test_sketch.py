"""Matrices rebuilt from two sketches, against the matrices themselves and the published bound of the error."""

from __future__ import annotations

import pytest
import torch

from llava_cl.subspace import Sketch, sketch_shapes

COLUMNS = 12


def _matrix(rows: int, features: int, values: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    left = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(features, len(values), generator=generator, dtype=torch.float64)).Q
    return (left * values) @ right.T


def _rebuilt(matrix: torch.Tensor, seed: int) -> torch.Tensor:
    """Test matrices are larger than the matrix: it takes their first rows."""
    rows, features = matrix.shape
    sketch = Sketch.draw(COLUMNS, 150, 150, torch.Generator().manual_seed(seed))
    omega, psi = sketch.omega[:features].double(), sketch.psi[:rows].double()
    rebuilt = sketch.rebuild((matrix @ omega).float(), (psi.T @ matrix).float())
    assert rebuilt.dtype == torch.float32
    return rebuilt.double()


@pytest.mark.parametrize("shape", [(60, 140), (140, 60), (100, 100)])
@pytest.mark.parametrize("rank", [0, 1, 5, COLUMNS])
def test_a_matrix_of_low_rank_comes_back(shape: tuple[int, int], rank: int) -> None:
    matrix = _matrix(*shape, torch.logspace(0, -2, rank, dtype=torch.float64))
    assert (_rebuilt(matrix, 0) - matrix).norm() <= 1e-4 * matrix.norm()


@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
def test_the_error_keeps_the_published_bound(decay: float) -> None:
    values = torch.arange(1, 61, dtype=torch.float64) ** -decay
    matrix = _matrix(80, 100, values)
    error = sum(float((_rebuilt(matrix, seed) - matrix).square().sum()) for seed in range(20)) / 20
    bounds = [2 * (1 + j / (COLUMNS - j - 1)) * float(values[j:].square().sum()) for j in range(COLUMNS - 1)]
    best = float(values[COLUMNS:].square().sum())
    assert best < error < min(bounds)


def test_a_sketch_is_made_only_where_it_is_smaller() -> None:
    assert sketch_shapes(100, 100, 32) == ((100, 32), (65, 100))
    assert sketch_shapes(100, 100, 33) is None


def test_values_that_are_not_finite_are_refused() -> None:
    sketch = Sketch.draw(2, 8, 8, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="range sketch of shape"):
        sketch.rebuild(torch.full((8, 2), torch.nan), torch.zeros(5, 8))
