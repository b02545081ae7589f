"""How much of a weight its basis holds."""

from __future__ import annotations

import pytest
import torch

from llava_cl.pipeline.bases import energy_within
from llava_cl.subspace import orthonormal, principal_basis


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_energy_within_is_the_sum_of_the_squared_singular_values(dtype: torch.dtype) -> None:
    weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    basis = principal_basis(weight, 0.7)
    squares = torch.linalg.svdvals(weight.double()).square()
    expected = float(squares[: basis.shape[1]].sum() / squares.sum())
    assert energy_within(weight, basis) == pytest.approx(expected, rel=1e-5)
    assert energy_within(weight, torch.eye(12)) == pytest.approx(1.0)
    assert energy_within(weight, torch.eye(12)[:, :0]) == 0
    assert energy_within(torch.zeros(3, 12), torch.eye(12)) == 0


def _columns(kind: str) -> torch.Tensor:
    """`[12, k]` that are not orthonormal."""
    columns = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
    return {
        "oblique": columns,
        "of other lengths": torch.eye(12)[:, :3] * torch.tensor([0.1, 1.0, 30.0]),
        "dependent": torch.cat([columns, columns[:, :2] + columns[:, 2:4]], dim=1),
        "as good as orthonormal, and one of them again": torch.eye(12)[:, [0, 1, 2, 2]],
        "more than dimensions": torch.cat([columns, 3 * columns, columns @ columns.T], dim=1),
        "zero": torch.zeros(12, 2),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "rank"),
    [
        ("oblique", 5),
        ("of other lengths", 3),
        ("dependent", 5),
        ("as good as orthonormal, and one of them again", 3),
        ("more than dimensions", 5),
        ("zero", 0),
    ],
)
def test_energy_and_rank_are_of_what_any_columns_span(kind: str, rank: int) -> None:
    """As the pseudo-inverse projects onto it; O-LoRA's columns are rows of A."""
    weight, columns = torch.randn(20, 12, generator=torch.Generator().manual_seed(0)), _columns(kind)
    projector = columns.double() @ torch.linalg.pinv(columns.double(), rtol=1e-6)
    expected = float((weight.double() @ projector).square().sum() / weight.double().square().sum())
    assert energy_within(weight, columns) == pytest.approx(expected, rel=1e-5)
    own = orthonormal(columns)
    assert own.shape == (12, rank)
    torch.testing.assert_close((own @ own.T).double(), projector, rtol=0, atol=1e-5)


def test_orthonormal_columns_stay_as_they_are() -> None:
    basis = principal_basis(torch.randn(20, 12, generator=torch.Generator().manual_seed(0)), 0.7)
    assert torch.equal(orthonormal(basis), basis)
    assert orthonormal(basis[:, :0]).shape == (12, 0)
