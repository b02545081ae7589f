"""InfLoRA's promises: A is the new inputs' leading directions outside the old ones, which grow by a share of energy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_cl.config import MethodConfig
from llava_cl.methods import LayerStatistics, Method, build_method

OUT, IN, RANK = 11, 18, 4


def _method(**options: object) -> Method:
    return build_method(MethodConfig(name="inflora", options=options))


def _inputs(seed: int, *, rows: int = 60, decay: float = 0.8) -> torch.Tensor:
    """`[tokens, in]` float64, with energies that fall in random directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(IN, IN, generator=generator, dtype=torch.float64)).Q
    tokens = torch.randn(rows, IN, generator=generator, dtype=torch.float64)
    return tokens * decay ** torch.arange(IN) @ directions.T


def _statistics(inputs: torch.Tensor, tasks: int = 0) -> LayerStatistics:
    return LayerStatistics(tasks=tasks, second_moment=(inputs.T @ inputs / len(inputs)).float())


def _basis(columns: int, seed: int = 5) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(IN, columns, generator=torch.Generator().manual_seed(seed))).Q


def _a(inputs: torch.Tensor, basis: torch.Tensor | None, *, seed: int = 0, rank: int = RANK) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    a, b = _method().initialise((OUT, IN), rank, _statistics(inputs), basis, generator)
    assert b.shape == (OUT, rank)
    assert not b.any()
    return a


def _held(inputs: torch.Tensor, basis: torch.Tensor) -> float:
    """Share of the inputs' energy inside the basis."""
    return float((inputs @ basis.double()).square().sum() / inputs.square().sum())


@pytest.mark.parametrize("columns", [0, 1, 6])
def test_a_is_the_leading_directions_of_the_inputs_outside_the_basis(columns: int) -> None:
    inputs, basis = _inputs(1), _basis(columns)
    a = _a(inputs, basis if columns else None)
    outside = (torch.eye(IN, dtype=torch.float64) - basis.double() @ basis.double().T) @ inputs.T
    leading = torch.linalg.svd(outside).U[:, :RANK]
    torch.testing.assert_close((a.T @ a).double(), leading @ leading.T, rtol=0, atol=1e-4)
    torch.testing.assert_close(a @ a.T, torch.eye(RANK), rtol=0, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), columns=st.integers(1, IN), rank=st.integers(1, 6))
def test_nothing_of_the_basis_is_left_in_a(seed: int, columns: int, rank: int) -> None:
    basis = _basis(columns, seed)
    assert (_a(_inputs(seed), basis, rank=rank) @ basis).abs().max() < 1e-5


def test_a_depends_on_the_inputs_alone() -> None:
    assert torch.equal(_a(_inputs(2), _basis(3), seed=1), _a(_inputs(2), _basis(3), seed=2))
    assert not _method().train_a


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("columns", [0, 4])
def test_the_basis_holds_the_share_of_energy_with_no_column_too_many(energy: float, columns: int) -> None:
    inputs, old = _inputs(3), _basis(4)[:, :columns]
    basis = _method(energy=energy).protect(_statistics(inputs, tasks=1), old if columns else None)
    assert basis is not None
    assert torch.equal(basis[:, :columns], old)
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), rtol=0, atol=1e-5)
    assert _held(inputs, basis) >= energy - 1e-6
    assert basis.shape[1] > columns
    assert _held(inputs, basis[:, :-1]) < energy


@pytest.mark.parametrize(("tasks", "energy"), [(1, 0.6), (2, 0.75), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_the_share_rises_with_the_number_of_the_task_up_to_all(tasks: int, energy: float) -> None:
    inputs = _inputs(4, decay=0.9)
    basis = _method(energy=0.6, growth=0.15).protect(_statistics(inputs, tasks=tasks), None)
    assert basis is not None
    assert _held(inputs, basis) >= energy - 1e-6
    assert _held(inputs, basis[:, :-1]) < energy


def test_a_task_that_the_basis_holds_adds_nothing() -> None:
    basis = _method(energy=0.95).protect(_statistics(_inputs(5), tasks=1), None)
    assert basis is not None
    again = _method(energy=0.95).protect(_statistics(_inputs(5), tasks=2), basis)
    assert again is not None
    assert torch.equal(again, basis)


def test_what_one_task_protects_the_next_cannot_change() -> None:
    first = _inputs(6, decay=0.4)
    basis = _method(energy=0.999).protect(_statistics(first, tasks=1), None)
    update = torch.randn(OUT, RANK, dtype=torch.float64) @ _a(_inputs(7), basis).double()
    answered = (first @ update.T).square().sum() / (first.square().sum() * update.square().sum())
    assert answered < 1e-3


def test_statistics_asked_for() -> None:
    method = _method()
    assert method.before == method.after == {"second_moment"}
    assert method.initial_basis(torch.randn(OUT, IN)) is None
