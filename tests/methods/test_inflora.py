"""InfLoRA's promises: A is the new inputs' leading directions outside the old ones, which grow by a share of energy.

The authors' rule is held against DualGPM as their paper and code have it, with its two ways to remember.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_cl.config import MethodConfig
from llava_cl.methods import LayerStatistics, Method, build_method

OUT, IN, RANK = 11, 18, 4


def _method(**options: object) -> Method:
    """That whose energies are the inputs' own and whose share stays, unless the options say otherwise."""
    return build_method(MethodConfig(name="inflora", options={"spectrum": "inputs", "growth": 0.0, **options}))


class DualGPM:
    """What the authors remember of one layer: a basis of what is protected, or, past half, of all that is not."""

    def __init__(self, lamb: float, tasks: int) -> None:
        self.lamb, self.tasks, self.learned = lamb, tasks, 0
        self.basis: np.ndarray | None = None
        self.retain = False

    def update(self, moment: np.ndarray) -> None:
        """Of the second moment of the task's inputs."""
        threshold = self.lamb + (1 - self.lamb) * self.learned / self.tasks
        self.learned += 1
        left, values, _ = np.linalg.svd(moment)
        total = (values**2).sum()
        if self.basis is None:
            self.basis = left[:, : max(1, int((np.cumsum(values**2) / total < threshold).sum()))]
        else:
            inside = self.basis @ (self.basis.T @ moment)
            left, values, _ = np.linalg.svd(inside if self.retain else moment - inside)
            outside, count = (values**2).sum() / total, 0
            while outside > 1 - threshold:
                outside -= values[count] ** 2 / total
                count += 1
            new = left[:, :count]
            if not self.retain:
                self.basis = np.hstack([self.basis, new])
            elif count:
                rest = np.linalg.svd(self.basis - new @ (new.T @ self.basis))[0]
                self.basis = rest[:, : self.basis.shape[1] - count]
        if not self.retain and self.basis.shape[1] > len(moment) / 2:
            self.basis = np.linalg.svd(self.basis)[0][:, self.basis.shape[1] :]
            self.retain = True

    def protected(self) -> np.ndarray:
        """The projector onto what is protected."""
        assert self.basis is not None
        inside = self.basis @ self.basis.T
        return np.eye(len(inside)) - inside if self.retain else inside


OWN = [[0.3, 0.08, 0.06, 0.03]] * 3 + [[0.3, 0.12]] + [[0.3, 0.08, 0.06, 0.03]]


def _chain() -> list[torch.Tensor]:
    """Second moments of five tasks in 96 dimensions: a direction of energy 1 that all share, and a few of their own."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(96, 96, generator=generator, dtype=torch.float64)).Q
    moments = []
    for task, energies in enumerate(OWN):
        own = directions[:, [0, *range(4 * task + 1, 4 * task + 1 + len(energies))]]
        moments.append(own * torch.tensor([1.0, *energies], dtype=torch.float64) @ own.T)
    return moments


@pytest.mark.parametrize(("spectrum", "protected"), [("moment", [1, 2, 3, 4, 5]), ("inputs", [4, 7, 10, 12, 15])])
def test_what_a_chain_of_five_tasks_protects(spectrum: str, protected: list[int]) -> None:
    """By default as the authors' rule; their threshold is of squared eigenvalues of the second moment."""
    method = _method() if spectrum == "inputs" else build_method(MethodConfig(name="inflora"))
    authors, basis, counts = DualGPM(0.95, len(OWN)), None, []
    for task, moment in enumerate(_chain(), start=1):
        statistics = LayerStatistics(tasks=task, stream=len(OWN), second_moment=moment.float())
        basis = method.protect(statistics, basis)
        assert basis is not None
        counts.append(basis.shape[1])
        if spectrum == "moment":
            authors.update(moment.numpy())
            np.testing.assert_allclose((basis @ basis.T).numpy(), authors.protected(), rtol=0, atol=1e-5)
    assert counts == protected


@pytest.mark.parametrize(("lamb", "decay"), [(0.9, 0.6), (0.8, 0.7)])
def test_past_half_of_the_dimensions_what_is_retained_is_what_is_not_protected(lamb: float, decay: float) -> None:
    """A basis whose columns are only ever added to holds what the authors' shrinking complement leaves out."""
    method = build_method(MethodConfig(name="inflora", options={"energy": lamb}))
    authors, tasks = DualGPM(lamb, 8), 8
    basis, modes = None, []
    for task in range(1, tasks + 1):
        before, after = (_statistics(_inputs(20 * task + i, decay=decay), task) for i in range(2))
        if authors.basis is not None:
            start = method.initialise((OUT, IN), RANK, before, basis, torch.Generator())
            assert before.second_moment is not None
            outside = np.eye(IN) - authors.protected()
            leading = np.linalg.svd(outside @ before.second_moment.numpy())[0][:, :RANK]
            np.testing.assert_allclose((start.a.T @ start.a).numpy(), leading @ leading.T / 3, rtol=0, atol=1e-4)
        assert after.second_moment is not None
        authors.update(after.second_moment.double().numpy())
        basis = method.protect(LayerStatistics(task, tasks, second_moment=after.second_moment), basis)
        assert basis is not None
        modes.append(authors.retain)
        np.testing.assert_allclose((basis @ basis.T).numpy(), authors.protected(), rtol=0, atol=1e-4)
    assert basis is not None
    assert modes == sorted(modes)
    assert {*modes} == {False, True}
    assert IN / 2 < basis.shape[1] < IN - RANK


@pytest.mark.parametrize(("stream", "columns"), [(10, 2), (4, 3), (2, 5)])
def test_by_default_the_share_rises_to_all_over_the_number_of_tasks(stream: int, columns: int) -> None:
    """The third task's share is 0.9 + 0.1 * 2 / stream: 0.92, 0.95 and 1 of energies that are 0.91, 0.94, 0.97 ..."""
    moment = torch.diag(torch.tensor([0.91, 0.03, 0.03, 0.02, 0.01, 0.0]).sqrt())
    method, old = build_method(MethodConfig(name="inflora", options={"energy": 0.9})), torch.eye(6)[:, 5:]
    basis = method.protect(LayerStatistics(tasks=3, stream=stream, second_moment=moment), old)
    assert basis is not None
    assert basis.shape == (6, 1 + columns)


def test_by_default_the_rows_of_a_are_one_over_the_root_of_three_long() -> None:
    method = build_method(MethodConfig(name="inflora"))
    a, b = method.initialise((OUT, IN), RANK, _statistics(_inputs(1)), _basis(6), torch.Generator())
    torch.testing.assert_close(a @ a.T, torch.eye(RANK) / 3, rtol=0, atol=1e-5)
    assert not b.any()


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
