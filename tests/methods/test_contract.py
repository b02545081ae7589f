"""What every method must keep to, and how options are checked."""

from __future__ import annotations

import pytest
import torch

from llava_cl.config import MethodConfig
from llava_cl.errors import InputError
from llava_cl.methods import LayerStatistics, LoraFactors, Method, build_method, known_methods
from llava_cl.methods.contract import kaiming_a

METHODS = {
    **{name: MethodConfig(name=name) for name in known_methods()},
    "keeplora, gradient b": MethodConfig(name="keeplora", options={"b": "gradient"}),
    "keeplora, random a": MethodConfig(name="keeplora", options={"initialise": "random"}),
    "keeplora, features": MethodConfig(name="keeplora", options={"protect": "feature"}),
    "keeplora, unprotected": MethodConfig(name="keeplora", options={"weight_energy": None, "protect": None}),
}
SHAPES = [(12, 20), (20, 12), (7, 7)]
RANK = 3


@pytest.fixture(params=METHODS.values(), ids=list(METHODS))
def method(request: pytest.FixtureRequest) -> Method:
    return build_method(request.param)


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def shape(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


def _statistics(shape: tuple[int, int], wanted: frozenset[str], seed: int) -> LayerStatistics:
    """Random statistics, only those that the method asks for."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(50, shape[1], generator=generator) * torch.linspace(2, 0.1, shape[1])
    errors = torch.randn(50, shape[0], generator=generator)
    return LayerStatistics(
        gradient=errors.T @ inputs / 50 if "gradient" in wanted else None,
        second_moment=inputs.T @ inputs / 50 if "second_moment" in wanted else None,
    )


def _stream(method: Method, shape: tuple[int, int], stages: int) -> list[tuple[LoraFactors, torch.Tensor | None]]:
    """Factors and basis of each stage; the first entry's basis is that of the base weight."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(99))
    basis = method.initial_basis(weight)
    results = [(LoraFactors(torch.empty(0), torch.empty(0)), basis)]
    for stage in range(stages):
        factors = method.initialise(
            shape,
            RANK,
            _statistics(shape, method.before, 2 * stage),
            basis,
            torch.Generator().manual_seed(stage),
        )
        basis = method.protect(_statistics(shape, method.after, 2 * stage + 1), basis)
        results.append((factors, basis))
    return results


def test_factors_are_finite_fp32_of_the_layers_shape(method: Method, shape: tuple[int, int]) -> None:
    for factors, _ in _stream(method, shape, 4)[1:]:
        assert factors.a.shape == (RANK, shape[1])
        assert factors.b.shape == (shape[0], RANK)
        assert factors.a.dtype == factors.b.dtype == torch.float32
        assert factors.a.isfinite().all()
        assert factors.b.isfinite().all()


def test_a_trained_a_starts_with_a_zero_b(method: Method, shape: tuple[int, int]) -> None:
    """What a start adds can be taken off again only while A stays as it is."""
    for factors, _ in _stream(method, shape, 2)[1:]:
        assert not (method.train_a and factors.b.any())


def test_something_can_be_learnt_at_the_first_stage(method: Method, shape: tuple[int, int]) -> None:
    factors, _ = _stream(method, shape, 1)[1]
    assert torch.linalg.matrix_rank(factors.a) == RANK


def test_bases_are_orthonormal_and_keep_their_columns(method: Method, shape: tuple[int, int]) -> None:
    bases = [basis for _, basis in _stream(method, shape, 4)]
    before = torch.zeros(shape[1], 0)
    for basis in bases:
        if basis is None:
            assert not before.numel()
            continue
        assert basis.dtype == torch.float32
        assert torch.equal(basis[:, : before.shape[1]], before)
        assert basis.shape[1] <= shape[1]
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), rtol=0, atol=1e-5)
        before = basis


def test_the_same_input_gives_the_same_bits(method: Method, shape: tuple[int, int]) -> None:
    for (factors, basis), (other_factors, other_basis) in zip(
        _stream(method, shape, 3), _stream(method, shape, 3), strict=True
    ):
        assert all(map(torch.equal, factors, other_factors))
        assert (basis is None) == (other_basis is None)
        assert basis is None or other_basis is None or torch.equal(basis, other_basis)


def test_only_known_statistics_are_asked_for(method: Method) -> None:
    assert method.before | method.after <= {"gradient", "second_moment"}


def test_every_method_is_described() -> None:
    assert {"keeplora", "sequential"} <= known_methods().keys()
    assert all(description.endswith(".") and len(description) > 20 for description in known_methods().values())


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"method\.name: unknown 'keplora'; known: keeplora, .*sequential"):
        build_method(MethodConfig(name="keplora"))


@pytest.mark.parametrize("name", known_methods())
def test_an_unknown_option_is_named(name: str) -> None:
    with pytest.raises(InputError, match=rf"method\.options\.enrgy of {name}: "):
        build_method(MethodConfig(name=name, options={"enrgy": 0.9}))


def test_all_wrong_options_are_named_at_once() -> None:
    with pytest.raises(InputError) as error:
        build_method(MethodConfig(name="keeplora", options={"energy": 1.5, "protect": "both", "more": 1}))
    assert len(error.value.problems) == 3
    for option in ("energy", "protect", "more"):
        assert f"method.options.{option} of keeplora" in str(error.value)


def test_kaiming_a_is_distributed_as_loras() -> None:
    """Like torch's own Kaiming-uniform with a = sqrt(5), which LoRA uses."""
    own = kaiming_a((5, 400), 500, torch.Generator().manual_seed(0))
    reference = torch.empty(500, 400)
    torch.nn.init.kaiming_uniform_(reference, a=5**0.5, generator=torch.Generator().manual_seed(1))
    assert own.abs().max() == pytest.approx(reference.abs().max().item(), rel=1e-3)
    assert own.std() == pytest.approx(reference.std().item(), rel=1e-2)
    assert own.mean().abs() < 1e-3
