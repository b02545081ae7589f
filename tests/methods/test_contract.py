"""What every method must keep to, and how options are checked."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from llava_cl.config import MethodConfig
from llava_cl.errors import InputError
from llava_cl.methods import LayerStatistics, LoraFactors, Method, build_method, known_methods
from llava_cl.methods.contract import kaiming_a, square_root

METHODS = {
    **{name: MethodConfig(name=name) for name in known_methods()},
    "inflora, growing": MethodConfig(name="inflora", options={"energy": 0.5, "growth": 0.2}),
    "inflora, inputs": MethodConfig(name="inflora", options={"spectrum": "inputs"}),
    "keeplora, gradient b": MethodConfig(name="keeplora", options={"b": "gradient"}),
    "keeplora, random a": MethodConfig(name="keeplora", options={"initialise": "random"}),
    "keeplora, features": MethodConfig(name="keeplora", options={"protect": "feature"}),
    "keeplora, unprotected": MethodConfig(name="keeplora", options={"weight_energy": None, "protect": None}),
    "sequential, carry": MethodConfig(name="sequential", options={"carry": True}),
    "splitlora, gradient": MethodConfig(name="splitlora", options={"initialise": "gradient"}),
}
SHAPES = [(12, 20), (20, 12), (7, 7)]
RANK = 3
NOT_ORTHONORMAL = {"olora"}
"""Methods whose basis only lists directions."""


@pytest.fixture(params=METHODS)
def config(request: pytest.FixtureRequest) -> MethodConfig:
    return METHODS[request.param]


@pytest.fixture
def method(config: MethodConfig) -> Method:
    return build_method(config)


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def shape(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


def _measured(shape: tuple[int, int], seed: int) -> LayerStatistics:
    """Random statistics of one task."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(50, shape[1], generator=generator) * torch.linspace(2, 0.1, shape[1])
    errors = torch.randn(50, shape[0], generator=generator)
    return LayerStatistics(
        gradient=errors.T @ inputs / 50,
        second_moment=inputs.T @ inputs / 50,
        mean_input=inputs[:30].T / 50,
    )


def _wanted(statistics: LayerStatistics, names: frozenset[str]) -> LayerStatistics:
    """The statistics without what the method does not ask for."""
    others = {field.name: None for field in fields(statistics) if field.name not in {"tasks", "stream", *names}}
    return replace(statistics, **others)


def _trained(method: Method, start: LoraFactors, seed: int) -> LoraFactors:
    """The factors after some training."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (factor + 0.1 * torch.randn(factor.shape, generator=generator) for factor in start)
    return LoraFactors(a if method.train_a else start.a, b)


def _stream(method: Method, shape: tuple[int, int], stages: int) -> list[tuple[LoraFactors, torch.Tensor | None]]:
    """Factors and basis of each stage; the first entry's basis is that of the base weight."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(99))
    basis = method.initial_basis(weight)
    results = [(LoraFactors(torch.empty(0), torch.empty(0)), basis)]
    past: torch.Tensor | None = None
    trained: LoraFactors | None = None
    for stage in range(1, stages + 1):
        before = replace(_measured(shape, 2 * stage), tasks=stage - 1, stream=stages, past_moment=past, adapter=trained)
        generator = torch.Generator().manual_seed(stage)
        factors = method.initialise(shape, RANK, _wanted(before, method.before), basis, generator)
        trained = _trained(method, factors, stage)
        after = _measured(shape, 2 * stage + 1)
        assert after.second_moment is not None
        past = after.second_moment if past is None else past + (after.second_moment - past) / stage
        after = replace(after, tasks=stage, stream=stages, past_moment=past, adapter=trained)
        basis = method.protect(_wanted(after, method.after), basis)
        results.append((factors, basis))
    return results


def test_factors_are_finite_fp32_of_the_layers_shape(method: Method, shape: tuple[int, int]) -> None:
    for factors, _ in _stream(method, shape, 4)[1:]:
        assert factors.a.shape == (RANK, shape[1])
        assert factors.b.shape == (shape[0], RANK)
        assert factors.a.dtype == factors.b.dtype == torch.float32
        assert factors.a.isfinite().all()
        assert factors.b.isfinite().all()


@pytest.mark.parametrize("name", [name for name, config in METHODS.items() if build_method(config).train_a])
def test_a_trained_a_starts_with_a_zero_b_or_where_the_last_task_ended(name: str, shape: tuple[int, int]) -> None:
    """What any other start adds could not be told from what the task adds."""
    method = build_method(METHODS[name])
    start, *later = [factors for factors, _ in _stream(method, shape, 3)[1:]]
    assert not start.b.any()
    if "adapter" not in method.before:
        assert not any(factors.b.any() for factors in later)
        return
    for stage, factors in enumerate(later, start=1):
        start = _trained(method, start, stage)
        assert all(map(torch.equal, factors, start))


def test_something_can_be_learnt_at_the_first_stage(method: Method, shape: tuple[int, int]) -> None:
    factors, _ = _stream(method, shape, 1)[1]
    assert torch.linalg.matrix_rank(factors.a) == RANK


def test_bases_keep_their_columns(method: Method, config: MethodConfig, shape: tuple[int, int]) -> None:
    before = torch.zeros(shape[1], 0)
    for _, basis in _stream(method, shape, 4):
        if basis is None:
            assert not before.numel()
            continue
        assert basis.dtype == torch.float32
        assert basis.shape[0] == shape[1]
        assert torch.equal(basis[:, : before.shape[1]], before)
        if config.name not in NOT_ORTHONORMAL:
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


def test_what_a_method_is_given_stays_as_it_was(method: Method) -> None:
    shape = SHAPES[0]
    trained = LoraFactors(torch.randn(RANK, shape[1]), torch.randn(shape[0], RANK))
    statistics = replace(_measured(shape, 0), tasks=1, adapter=trained)
    statistics = replace(statistics, past_moment=statistics.second_moment)
    basis = torch.linalg.qr(torch.randn(shape[1], 4)).Q
    given = [basis, *trained]
    given += [value for value in vars(statistics).values() if isinstance(value, torch.Tensor)]
    before = [value.clone() for value in given]
    method.initialise(shape, RANK, statistics, basis, torch.Generator())
    method.penalty(trained.a, basis)
    method.protect(statistics, basis)
    assert all(map(torch.equal, given, before))


def test_a_penalty_reaches_a_where_there_is_one(method: Method, shape: tuple[int, int]) -> None:
    for stage, (_, basis) in enumerate(_stream(method, shape, 2)):
        a = torch.randn(RANK, shape[1], generator=torch.Generator().manual_seed(7)).requires_grad_(True)
        penalty = method.penalty(a, basis)
        assert penalty.shape == ()
        assert penalty.isfinite()
        assert bool(penalty) == (method.penalises and stage > 0)
        if penalty.requires_grad:
            (slope,) = torch.autograd.grad(penalty, a)
            assert slope.isfinite().all()
        assert penalty.requires_grad == (method.penalises and stage > 0)


def test_only_known_statistics_are_asked_for(method: Method) -> None:
    known = {field.name for field in fields(LayerStatistics)} - {"tasks", "stream"}
    assert method.before | method.after <= known
    assert not method.penalises or method.train_a


def test_the_second_moments_root_is_the_inputs_energy() -> None:
    inputs = torch.randn(9, 14, generator=torch.Generator().manual_seed(0))
    moment = inputs.T @ inputs / 9
    root = square_root(moment)
    assert root.dtype == torch.float32
    torch.testing.assert_close(root @ root.T, moment, rtol=0, atol=1e-6)


def test_every_method_is_described() -> None:
    assert {"inflora", "keeplora", "olora", "sequential", "splitlora"} <= known_methods().keys()
    assert all(description.endswith(".") and len(description) > 20 for description in known_methods().values())


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    known = ", ".join(sorted(known_methods()))
    with pytest.raises(InputError, match=rf"method\.name: unknown 'keplora'; known: {known}\."):
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
