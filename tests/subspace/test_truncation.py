"""`truncate_spectrum` against the stored reference cases and a plain SVD."""

from __future__ import annotations

import pytest
import torch
from subspace_references import golden, with_spectrum

from llava_cl.subspace import truncate_spectrum

CASES = {"0": (0.9, 18), "1": (0.9, 26), "2": (0.5, 4), "3": (0.75, 22)}
"""Number -> ratio and rank of the reference."""


@pytest.mark.parametrize("number", CASES)
def test_golden_truncations(number: str) -> None:
    stored = golden("truncation")
    ratio, rank = CASES[number]
    truncated = truncate_spectrum(stored[f"{number}/in"], ratio)
    assert int(torch.linalg.matrix_rank(truncated.double(), rtol=1e-5)) == rank
    torch.testing.assert_close(truncated, stored[f"{number}/out"].float(), rtol=0, atol=1e-5)


def test_the_sum_is_of_values_and_not_of_squares() -> None:
    weight = with_spectrum(6, 9, [4.0, 3.0, 2.0, 1.0], seed=0)
    for ratio, rank in ((0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.89, 3), (0.91, 4), (1.0, 4)):
        assert int(torch.linalg.matrix_rank(truncate_spectrum(weight, ratio).double(), rtol=1e-5)) == rank
    torch.testing.assert_close(truncate_spectrum(weight, 1.0), weight, rtol=0, atol=1e-5)
