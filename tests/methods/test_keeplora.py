"""KeepLoRA's promises: what is protected stays untouched, and what the task needs is learnt and then protected."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_cl.config import MethodConfig
from llava_cl.methods import LayerStatistics, LoraFactors, Method, build_method
from llava_cl.subspace import expand_basis

OUT, IN = 14, 18


def _method(**options: object) -> Method:
    return build_method(MethodConfig(name="keeplora", options=options))


def _decaying(rows: int, columns: int, seed: int, decay: float = 0.7) -> torch.Tensor:
    """A matrix whose singular values fall like those of a gradient."""
    generator = torch.Generator().manual_seed(seed)
    size = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, size, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, size, generator=generator)).Q
    return (left * decay ** torch.arange(size)) @ right.T


def _basis(columns: int, seed: int = 5) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(IN, columns, generator=torch.Generator().manual_seed(seed))).Q


def _start(method: Method, gradient: torch.Tensor, basis: torch.Tensor | None, rank: int = 4) -> LoraFactors:
    return method.initialise((OUT, IN), rank, LayerStatistics(gradient=gradient), basis, torch.Generator())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), columns=st.integers(1, IN), rank=st.integers(1, 6))
def test_no_update_touches_inputs_inside_the_basis(seed: int, columns: int, rank: int) -> None:
    basis = _basis(columns, seed)
    a, _ = _start(_method(), _decaying(OUT, IN, seed), basis, rank)
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(OUT, rank, generator=generator)
    inside = basis @ torch.randn(columns, 20, generator=generator)
    assert (b @ a @ inside).norm() <= 1e-5 * b.norm() * inside.norm()


def test_updates_reach_inputs_outside_the_basis() -> None:
    basis = _basis(5)
    a, _ = _start(_method(), _decaying(OUT, IN, 0), basis)
    assert torch.linalg.matrix_norm(a - (a @ basis) @ basis.T, ord=2) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("columns", [0, 5])
def test_a_is_the_leading_right_singular_space_of_the_projected_gradient(columns: int) -> None:
    gradient, basis = _decaying(OUT, IN, 1), _basis(5)[:, :columns]
    a, b = _start(_method(), gradient, basis if columns else None)
    projected = gradient.double() @ (torch.eye(IN, dtype=torch.float64) - basis.double() @ basis.double().T)
    right = torch.linalg.svd(projected).Vh[:4]
    torch.testing.assert_close((a.T @ a).double(), right.T @ right, rtol=0, atol=1e-5)
    torch.testing.assert_close(a @ a.T, torch.eye(4), rtol=0, atol=1e-5)
    assert b.shape == (OUT, 4)
    assert not b.any()


def test_b_of_the_gradient_gives_its_best_approximation() -> None:
    gradient, basis = _decaying(OUT, IN, 2), _basis(3)
    a, b = _start(_method(b="gradient"), gradient, basis)
    projected = gradient.double() @ (torch.eye(IN, dtype=torch.float64) - basis.double() @ basis.double().T)
    u, s, vh = torch.linalg.svd(projected)
    torch.testing.assert_close((b @ a).double(), (u[:, :4] * s[:4]) @ vh[:4], rtol=0, atol=1e-5)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("columns", [0, 4])
def test_protect_holds_the_gradients_energy_with_no_column_too_many(energy: float, columns: int) -> None:
    gradient, old = _decaying(OUT, IN, 3), _basis(4)[:, :columns]
    basis = _method(energy=energy).protect(LayerStatistics(gradient=gradient), old if columns else None)
    assert basis is not None
    total = gradient.double().square().sum()

    def held(some: torch.Tensor) -> float:
        return float((gradient.double() @ some.double()).square().sum() / total)

    assert torch.equal(basis[:, :columns], old)
    assert held(basis) >= energy - 1e-6
    assert held(basis[:, :-1]) < energy


def test_what_one_task_protects_the_next_cannot_change() -> None:
    method = _method(energy=0.999, weight_energy=None)
    gradient = _decaying(OUT, IN, 4, decay=0.3)
    basis = method.protect(LayerStatistics(gradient=gradient), None)
    a, _ = _start(method, _decaying(OUT, IN, 5), basis)
    used = torch.linalg.svd(gradient).Vh[:2].T
    assert (a @ used).norm() < 1e-4


@pytest.mark.parametrize("columns", [0, 4])
def test_features_are_protected_as_by_the_feature_matrix_itself(columns: int) -> None:
    generator = torch.Generator().manual_seed(6)
    features = torch.randn(200, IN, generator=generator) @ _decaying(IN, IN, 7, decay=0.8)
    old = _basis(4)[:, :columns] if columns else None
    moment = features.T @ features / len(features)
    own = _method(protect="feature", energy=0.95).protect(LayerStatistics(second_moment=moment), old)
    expected = expand_basis(old, features.T, 0.95)
    assert own is not None
    assert own.shape == expected.shape
    assert own.shape[1] > columns
    torch.testing.assert_close(own @ own.T, expected @ expected.T, rtol=0, atol=1e-4)


def test_the_initial_basis_holds_the_principal_directions_of_the_weight() -> None:
    weight = _decaying(OUT, IN, 8, decay=0.9)
    _, values, vh = torch.linalg.svd(weight.double())
    share = values.square().cumsum(0) / values.square().sum()
    count = int((share < 0.6).sum())
    basis = _method().initial_basis(weight)
    assert basis is not None
    assert basis.shape == (IN, count)
    torch.testing.assert_close((basis @ basis.T).double(), vh[:count].T @ vh[:count], rtol=0, atol=1e-5)


def test_of_the_output_side_the_left_singular_vectors_of_the_weight_are_protected() -> None:
    """By hand: W = 3 e1 e2^T + 2 e2 e3^T + e3 e1^T, of whose energy one direction holds 9 / 14 and two 13 / 14."""
    weight = torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 2.0], [1.0, 0.0, 0.0]])
    e1, e2, e3 = torch.eye(3)[:, :, None]
    for side, first, second in (("input", e2, e3), ("output", e1, e2)):
        for energy, columns in ((0.7, [first]), (0.94, [first, second])):
            basis = _method(weight_side=side, weight_energy=energy).initial_basis(weight)
            assert basis is not None
            torch.testing.assert_close(basis, torch.cat(columns, dim=1), rtol=0, atol=1e-6)


def test_output_directions_of_a_weight_that_is_not_square_are_none_of_its_inputs() -> None:
    assert "weight_side" in str(_method(weight_side="output").problem((OUT, IN)))
    fine = (_method(), _method(weight_side="output", weight_energy=None))
    assert [method.problem((OUT, IN)) for method in fine] == [None, None]
    assert _method(weight_side="output").problem((IN, IN)) is None


@pytest.mark.parametrize(("energy", "first", "widened"), [(0.7, 1, 1), (0.85, 1, 2), (0.9, 1, 2), (0.94, 2, 3)])
def test_a_first_basis_of_mean_features_is_without_the_direction_that_crosses_the_share(
    energy: float, first: int, widened: int
) -> None:
    """By hand: energies 0.8, 0.13 and 0.07 along axes. At least one is kept; a basis that is widened keeps it."""
    features = torch.zeros(5, 7)
    for axis, share in enumerate((0.13, 0.8, 0.07)):
        features[axis, 2 * axis] = share**0.5
    order = torch.eye(5)[:, [1, 0, 2]]
    method, statistics = _method(protect="mean_feature", energy=energy), LayerStatistics(mean_input=features)
    assert method.after == {"mean_input"}
    basis = method.protect(statistics, None)
    assert basis is not None
    torch.testing.assert_close(basis, order[:, :first], rtol=0, atol=1e-6)
    old = torch.eye(5)[:, 4:]
    basis = method.protect(statistics, old)
    assert basis is not None
    torch.testing.assert_close(basis, torch.cat([old, order[:, :widened]], dim=1), rtol=0, atol=1e-6)


def test_without_protection_there_is_no_basis() -> None:
    method = _method(weight_energy=None, protect=None)
    assert method.initial_basis(torch.randn(OUT, IN)) is None
    assert method.protect(LayerStatistics(), None) is None
    assert method.after == frozenset()
    old = _basis(3)
    assert method.protect(LayerStatistics(), old) is old


def test_random_a_depends_on_the_generator_alone_and_is_frozen() -> None:
    method = _method(initialise="random")
    assert method.before == frozenset()
    assert not method.train_a

    def start(seed: int) -> LoraFactors:
        return method.initialise((OUT, IN), 4, LayerStatistics(), _basis(3), torch.Generator().manual_seed(seed))

    assert torch.equal(start(1).a, start(1).a)
    assert not torch.equal(start(1).a, start(2).a)
    assert start(1).a.abs().max() <= IN**-0.5
    assert not start(1).b.any()


@pytest.mark.parametrize(
    ("options", "before", "after"),
    [
        ({}, {"gradient"}, {"gradient"}),
        ({"protect": "feature"}, {"gradient"}, {"second_moment"}),
        ({"initialise": "random", "protect": "feature"}, set(), {"second_moment"}),
    ],
)
def test_statistics_asked_for(options: dict[str, object], before: set[str], after: set[str]) -> None:
    method = _method(**options)
    assert (method.before, method.after) == (before, after)
    assert not method.train_a
