"""How much of a weight its basis holds."""

from __future__ import annotations

import pytest
import torch

from llava_cl.pipeline.bases import energy_within
from llava_cl.subspace import principal_basis


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
