import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from subspace_references import assert_orthonormal, assert_same_span, golden, random_orthonormal

from llava_cl.subspace import minor_basis

SPLITLORA = golden("splitlora")
CASES = [key for key in SPLITLORA if key.startswith("M/")]


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_reference(case: str, caplog: pytest.LogCaptureFixture) -> None:
    _, index, alpha, task = case.split("/")
    expected = SPLITLORA[case]
    with caplog.at_level(logging.WARNING):
        basis = minor_basis(SPLITLORA[f"C/{index}"], int(task[1:]) + 1, float(alpha[1:]))
    if expected.shape[1]:
        assert_same_span(basis, expected, 1e-5)
        assert not caplog.records
    else:  # the reference goes on with an empty space, and its next adapter is NaN
        assert basis.shape == (expected.shape[0], 1)
        assert "no minor direction" in caplog.text


def covariance_of(energies: list[float], seed: int = 0) -> torch.Tensor:
    columns = random_orthonormal(len(energies), len(energies), seed).double()
    return (columns * torch.tensor(energies, dtype=torch.float64) @ columns.T).float()


def test_trade_off_by_hand() -> None:
    # energies .5 .3 .1 .1: with one task and alpha = 1 the objective for j = 0..3 is
    # .5 - 1, .2 - .75, .1 - .5, 0 - .25, so r = 1 and the space begins at direction 2.
    covariance = torch.diag(torch.tensor([5.0, 3.0, 1.0, 1.0]))
    basis = minor_basis(covariance, 1, 1.0)
    assert_same_span(basis, torch.eye(4)[:, 2:], 1e-6)
    # at alpha = 4 the objective is -3.5, -2.8, -1.9, -1: r = 0 leaves out two directions all the same.
    assert minor_basis(covariance, 1, 4.0).shape == (4, 2)
    # The rule itself leaves out one.
    assert_same_span(minor_basis(covariance, 1, 4.0, two_at_least=False), torch.eye(4)[:, 1:], 1e-6)
    assert_same_span(minor_basis(covariance, 1, 1.0, two_at_least=False), torch.eye(4)[:, 2:], 1e-6)
    # more tasks weigh the energy more: three of them at alpha = 1 give .5, -.15, -.2, -.25, so r = 3.
    assert minor_basis(covariance, 3, 1.0).shape == (4, 1)


def test_keeps_the_directions_of_least_energy() -> None:
    energies = [2.0**-j for j in range(16)]
    covariance = covariance_of(energies)
    basis = minor_basis(covariance, 2, 1.0)
    held = (basis.double().T @ covariance.double() @ basis.double()).diagonal()
    torch.testing.assert_close(held, torch.tensor(energies[-basis.shape[1] :]).double(), atol=1e-6, rtol=1e-3)
    assert_orthonormal(basis)


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=20).filter(lambda values: max(values) > 1e-6),
    st.integers(1, 12),
    st.floats(0, 30),
)
@settings(max_examples=100, deadline=None)
def test_never_empty_and_always_orthonormal(energies: list[float], tasks: int, alpha: float) -> None:
    basis = minor_basis(covariance_of(sorted(energies, reverse=True)), tasks, alpha)
    assert 1 <= basis.shape[1] <= max(1, len(energies) - 2)
    assert basis.dtype == torch.float32
    assert_orthonormal(basis)


@pytest.mark.parametrize(
    ("covariance", "tasks", "message"),
    [
        (torch.ones(2, 3), 1, "must be square"),
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), 1, "not symmetric"),
        (torch.tensor([[1.0, 0.0], [0.0, -1.0]]), 1, "negative eigenvalue of -1"),
        (torch.zeros(3, 3), 1, "all zero"),
        (torch.tensor([[float("nan")]]), 1, "1 NaN"),
        (torch.eye(3), 0, "tasks_seen must be at least 1"),
    ],
)
def test_bad_input_is_refused(covariance: torch.Tensor, tasks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        minor_basis(covariance, tasks, 1.0)
