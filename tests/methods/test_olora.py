"""O-LoRA: the penalty is the sum of the overlaps with earlier tasks' A, as the authors compute it."""

from __future__ import annotations

import pytest
import torch

from llava_cl.config import MethodConfig
from llava_cl.methods import LayerStatistics, LoraFactors, Method, build_method
from llava_cl.methods.contract import kaiming_a

OUT, IN, RANK = 5, 9, 3


def _method(**options: object) -> Method:
    return build_method(MethodConfig(name="olora", options=options))


def _factors(seed: int) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    return LoraFactors(torch.randn(RANK, IN, generator=generator), torch.randn(OUT, RANK, generator=generator))


def _after(tasks: int) -> torch.Tensor:
    """The basis after tasks with the factors 0, 1, ..."""
    basis = None
    for task in range(tasks):
        basis = _method().protect(LayerStatistics(tasks=task + 1, adapter=_factors(task)), basis)
    assert basis is not None
    return basis


def test_the_penalty_by_hand() -> None:
    """The overlaps of two rows with two earlier ones are 2, 0, -1 and 3; their sizes sum to 6."""
    a = torch.tensor([[2.0, 0.0, 0.0], [-1.0, 1.0, 1.0]])
    basis = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 2.0]]).T
    assert float(_method(penalty=0.25).penalty(a, basis)) == pytest.approx(1.5)


@pytest.mark.parametrize("tasks", [1, 3])
def test_the_penalty_sums_over_all_earlier_tasks(tasks: int) -> None:
    a = _factors(50).a
    expected = 0.0
    for task in range(tasks):
        for row in a.double():
            for earlier in _factors(task).a.double():
                expected += abs(float((row * earlier).sum()))
    assert float(_method(penalty=0.5).penalty(a, _after(tasks))) == pytest.approx(0.5 * expected, rel=1e-6)


def test_its_gradient_pulls_every_row_from_the_earlier_ones() -> None:
    a = _factors(50).a.requires_grad_(True)
    basis = _after(2)
    (slope,) = torch.autograd.grad(_method(penalty=0.3).penalty(a, basis), a)
    expected = torch.zeros(RANK, IN)
    for index, row in enumerate(a.detach()):
        for earlier in basis.T:
            expected[index] += 0.3 * torch.sign(row @ earlier) * earlier
    torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-6)
    stepped = a.detach() - 1e-3 * slope
    assert _method(penalty=0.3).penalty(stepped, basis) < _method(penalty=0.3).penalty(a.detach(), basis)


def test_without_earlier_tasks_there_is_no_penalty() -> None:
    a = _factors(0).a
    assert float(_method().penalty(a, None)) == 0
    assert float(_method(penalty=0.0).penalty(a, _after(1))) == 0


def test_the_penalty_is_of_the_precision_of_a() -> None:
    a, basis = _factors(50).a, _after(2)
    half = _method().penalty(a.bfloat16(), basis)
    assert half.dtype == torch.bfloat16
    assert float(half) == pytest.approx(float(_method().penalty(a, basis)), rel=0.05)


def test_the_basis_is_the_rows_of_all_a_so_far() -> None:
    basis = _after(3)
    assert torch.equal(basis.T, torch.cat([_factors(task).a for task in range(3)]))


def test_it_starts_as_plain_lora() -> None:
    method = _method()
    a, b = method.initialise((OUT, IN), RANK, LayerStatistics(tasks=2), _after(2), torch.Generator().manual_seed(1))
    assert torch.equal(a, kaiming_a((OUT, IN), RANK, torch.Generator().manual_seed(1)))
    assert b.shape == (OUT, RANK)
    assert not b.any()
    assert method.train_a
    assert method.penalises
    assert method.before == frozenset()
    assert method.after == {"adapter"}
    assert method.initial_basis(torch.randn(OUT, IN)) is None
