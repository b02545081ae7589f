"""SplitLoRA's promises: a new task's A lies where earlier tasks' inputs are weak, and is as long as the authors'."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llava_cl.config import MethodConfig
from llava_cl.methods import LayerStatistics, LoraFactors, Method, build_method, splitlora
from llava_cl.methods.contract import kaiming_a

GOLDEN = Path(__file__).parents[1] / "golden" / "subspace" / "splitlora_stream.npz"
LAST_STEP = {1: 1, 2: 4, 3: 6}
"""Tasks learned -> the step of the reference's running covariance that ends the last of them."""
ALPHA, RANK, IN, OUT = 2.0, 4, 24, 24


def _golden() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


REFERENCE = _golden()


def _method(**options: object) -> Method:
    return build_method(MethodConfig(name="splitlora", options={"alpha": ALPHA, **options}))


def _past(tasks: int) -> torch.Tensor:
    return REFERENCE[f"cov/C{LAST_STEP[tasks]}"]


def _minor(tasks: int) -> torch.Tensor:
    """The reference's minor space after so many tasks, float64."""
    return REFERENCE[f"cov/M_after_task{tasks - 1}"].double()


def _start(method: Method, statistics: LayerStatistics, seed: int = 3, rank: int = RANK) -> LoraFactors:
    return method.initialise((OUT, IN), rank, statistics, None, torch.Generator().manual_seed(seed))


def _gradient(seed: int = 0) -> torch.Tensor:
    """A matrix whose singular values fall like those of a gradient."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(IN, IN, generator=generator)).Q for _ in range(2))
    return (left * 0.7 ** torch.arange(IN)) @ right.T


def _outside(a: torch.Tensor, minor: torch.Tensor) -> float:
    """Relative size of the part of A's rows that is not in the span of `minor`."""
    return float((a.double() - a.double() @ minor @ minor.T).norm() / a.norm())


@pytest.mark.parametrize("initialise", ["random", "gradient"])
@pytest.mark.parametrize("tasks", [0, 1])
def test_without_past_inputs_a_is_loras_usual_one(initialise: str, tasks: int) -> None:
    a, b = _start(_method(initialise=initialise), LayerStatistics(tasks=tasks, gradient=_gradient()))
    assert torch.equal(a, kaiming_a((OUT, IN), RANK, torch.Generator().manual_seed(3)))
    assert b.shape == (OUT, RANK)
    assert not b.any()


@pytest.mark.parametrize("tasks", LAST_STEP)
def test_a_is_as_long_as_the_references_and_in_its_minor_space(tasks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reference's usual A in place of our own, which other random numbers give."""
    monkeypatch.setattr(splitlora, "kaiming_a", lambda *_: REFERENCE[f"A/{tasks}/random"])
    a, b = _start(_method(), LayerStatistics(tasks=tasks, past_moment=_past(tasks)))
    expected = REFERENCE[f"A/{tasks}/init"]
    assert _outside(expected, _minor(tasks)) < 1e-6
    assert _outside(a, _minor(tasks)) < 1e-5
    assert float(a.norm()) == pytest.approx(float(expected.norm()), rel=1e-6)
    assert torch.linalg.matrix_rank(a) == RANK
    assert b.shape == (OUT, RANK)
    assert not b.any()


@pytest.mark.parametrize("tasks", LAST_STEP)
def test_a_is_a_usual_a_over_the_number_of_the_task(tasks: int) -> None:
    a = _start(_method(), LayerStatistics(tasks=tasks, past_moment=_past(tasks))).a
    usual = kaiming_a((OUT, IN), RANK, torch.Generator().manual_seed(3))
    assert float(a.norm()) == pytest.approx(float(usual.norm()) / (tasks + 1), rel=1e-6)


def test_a_is_drawn_evenly_over_the_minor_space() -> None:
    """Of A = (M Z)^T with Gaussian Z, every direction of M gets the same share on average."""
    minor = _minor(1)
    rows = torch.cat([_start(_method(), LayerStatistics(tasks=1, past_moment=_past(1)), seed).a for seed in range(400)])
    shares = (rows.double() @ minor).square().sum(dim=0)
    shares = shares / shares.mean()
    assert shares.std() < 0.1
    correlation = torch.corrcoef((rows.double() @ minor).T) - torch.eye(minor.shape[1])
    assert correlation.abs().max() < 0.1


@pytest.mark.parametrize("tasks", LAST_STEP)
def test_of_the_gradient_a_is_its_leading_directions_in_the_minor_space(tasks: int) -> None:
    gradient, minor = _gradient(), _minor(tasks)
    statistics = LayerStatistics(tasks=tasks, gradient=gradient, past_moment=_past(tasks))
    a, b = _start(_method(initialise="gradient"), statistics)
    right = torch.linalg.svd(gradient.double() @ minor @ minor.T).Vh[:RANK]
    length = a.norm() / RANK**0.5
    torch.testing.assert_close((a.T @ a / length**2).double(), right.T @ right, rtol=0, atol=1e-4)
    torch.testing.assert_close(a @ a.T / length**2, torch.eye(RANK), rtol=0, atol=1e-5)
    assert _outside(a, minor) < 1e-5
    usual = kaiming_a((OUT, IN), RANK, torch.Generator().manual_seed(3))
    assert float(a.norm()) == pytest.approx(float(usual.norm()), rel=1e-6)
    assert not b.any()


def test_a_layer_without_a_gradient_still_gets_a_start() -> None:
    statistics = LayerStatistics(tasks=1, gradient=torch.zeros(OUT, IN), past_moment=_past(1))
    a = _start(_method(initialise="gradient"), statistics).a
    assert a.isfinite().all()
    assert a.any()
    assert _outside(a, _minor(1)) < 1e-5


@pytest.mark.parametrize("initialise", ["random", "gradient"])
def test_a_minor_space_smaller_than_the_rank_is_used_up(initialise: str) -> None:
    """The inputs' energies 5, 3, 1, 1 leave the last two directions (see tests/subspace/test_minor.py)."""
    moment = torch.diag(torch.tensor([5.0, 3.0, 1.0, 1.0]))
    method = _method(initialise=initialise, alpha=1.0)
    gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    statistics = LayerStatistics(tasks=1, gradient=gradient, past_moment=moment)
    a, _ = method.initialise((6, 4), 3, statistics, None, torch.Generator().manual_seed(0))
    assert a.shape == (3, 4)
    assert a[:, :2].abs().max() < 1e-6
    assert torch.linalg.matrix_rank(a) == 2


def test_alpha_widens_the_space() -> None:
    past = _past(2)
    shares = []
    for alpha in (0.5, 2.0, 20.0):
        rows = torch.cat(
            [_start(_method(alpha=alpha), LayerStatistics(tasks=2, past_moment=past), seed).a for seed in range(12)]
        )
        shares.append(int(torch.linalg.matrix_rank(rows, rtol=1e-4)))
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]


def test_nothing_but_statistics_is_kept() -> None:
    method = _method()
    assert not method.train_a
    assert method.initial_basis(torch.randn(OUT, IN)) is None
    assert method.protect(LayerStatistics(tasks=1, past_moment=_past(1)), None) is None
    assert method.after == {"past_moment"}
    assert method.before == {"past_moment"}
    assert _method(initialise="gradient").before == {"past_moment", "gradient"}


def test_a_depends_on_the_generator_alone() -> None:
    statistics = LayerStatistics(tasks=1, past_moment=_past(1))
    first = _start(_method(), statistics, seed=1).a
    assert torch.equal(first, _start(_method(), replace(statistics, gradient=_gradient()), seed=1).a)
    assert not torch.equal(first, _start(_method(), statistics, seed=2).a)


def test_a_depends_on_the_space_and_not_on_the_axes_that_are_found_in_it() -> None:
    """Of equal energies any axes are right, and rounding decides: another number of ranks must not give another A."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(IN, IN, generator=generator, dtype=torch.float64)).Q
    energies = torch.tensor([9.0, 7.0, 5.0, 3.0] + [0.1] * (IN - 4), dtype=torch.float64)
    moment = directions * energies @ directions.T
    noise = torch.randn(IN, IN, generator=generator, dtype=torch.float64) * 1e-7
    first, second = (
        _start(_method(), LayerStatistics(tasks=1, past_moment=each.float())).a
        for each in (moment, moment + noise + noise.T)
    )
    weak = directions[:, 4:]
    assert max(_outside(first, weak), _outside(second, weak)) < 1e-5
    torch.testing.assert_close(first, second, rtol=0, atol=1e-4)


def test_the_papers_form_leaves_out_what_the_rule_says() -> None:
    """With alpha so large that r = 0, the code's form leaves out two directions, the paper's the first alone."""
    moment = torch.diag(torch.tensor([5.0, 3.0, 1.0, 1.0]))
    gradient = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    statistics = LayerStatistics(tasks=1, past_moment=moment, gradient=gradient)
    for form, strongest in (("gradient", 1), ("random", None)):
        method = build_method(MethodConfig(name="splitlora", options={"alpha": 4.0, "initialise": form}))
        a = method.initialise((4, 4), 1, statistics, None, torch.Generator().manual_seed(0)).a
        assert abs(float(a[0, 0])) < 1e-6
        if strongest is None:
            assert abs(float(a[0, 1])) < 1e-6
        else:
            assert int(a[0].abs().argmax()) == strongest
