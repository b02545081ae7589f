import logging
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from subspace_references import assert_orthonormal, golden, matrices, projector, random_orthonormal

from llava_cl.subspace import residual_directions

LLAVA = golden("keeplora_llava")
MTIL = golden("keeplora_mtil")
NAMES = [key.removeprefix("W/") for key in LLAVA if key.startswith("W/")]


def mean_gradient(stage: int, name: str) -> torch.Tensor:
    chunks = [v for k, v in LLAVA.items() if k.startswith(f"grad/{stage}/") and k.endswith(name)]
    return torch.stack(chunks).mean(dim=0)


@pytest.mark.parametrize("rank", [4, 8])
@pytest.mark.parametrize("stage", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", NAMES)
def test_rows_span_the_exact_leading_directions(name: str, stage: int, rank: int) -> None:
    before = LLAVA[f"weight_basis/f32/0.6/{name}"]
    if stage > 1:
        before = LLAVA[f"chain/w0.6_0.99/{stage - 1}/{name}"]
    found = residual_directions(mean_gradient(stage, name), before.T, rank)
    room = before.shape[1] - before.shape[0]  # 7 in one case: the reference's 8th row is inside the basis
    exact = LLAVA[f"resid/{stage}/r{rank}/exact64/{name}"][:room]
    assert_orthonormal(found.a[:room].T)
    assert not found.a[room:].any()
    assert (projector(found.a.T) - projector(exact.T)).abs().max() < 2e-5
    assert (found.a.double() @ before.double().T).abs().max() < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_without_a_basis_the_gradient_itself_is_decomposed(name: str) -> None:
    found = residual_directions(mean_gradient(1, name), None, 4)
    exact = LLAVA[f"resid_nospace/r4/exact64/{name}"]
    assert (projector(found.a.T) - projector(exact.T)).abs().max() < 1e-5


@pytest.mark.parametrize("encoder", ["vit", "text"])
@pytest.mark.parametrize("module", "qkvo")
def test_product_agrees_with_the_exact_clip_case(encoder: str, module: str) -> None:
    if module == "o":
        gradient = MTIL[f"init/{encoder}/grad_out_proj"]
    else:
        gradient = MTIL[f"init/{encoder}/grad_in_proj"].chunk(3)["qkv".index(module)]
    basis = MTIL[f"basis/input_side/0/{encoder}_{module}/0"]
    exact = MTIL[f"init/{encoder}/{module}/AB_exact64"]  # stored as A B = (b a) transposed
    found = residual_directions(gradient, basis, 4)
    product = (found.b.double() @ found.a.double()).T
    assert (product - exact).norm() < 2e-6 * exact.norm()


@given(matrices(), st.integers(0, 2**31), st.floats(0, 1), st.integers(1, 6))
@settings(max_examples=150, deadline=None)
def test_best_approximation_outside_the_basis(gradient: torch.Tensor, seed: int, filling: float, rank: int) -> None:
    size = gradient.shape[1]
    rank = min(rank, size)
    basis = random_orthonormal(size, int(filling * (size - rank)), seed)
    found = residual_directions(gradient, basis, rank)
    assert found.a.shape == (rank, size) and found.b.shape == (gradient.shape[0], rank)
    assert {part.dtype for part in found} == {torch.float32}
    assert_orthonormal(found.a.T)
    if basis.shape[1]:
        assert (found.a.double() @ basis.double()).abs().max() < 1e-6
    projected = gradient.double() - gradient.double() @ projector(basis)
    values = torch.linalg.svdvals(projected)
    kept = values[:rank]
    scale = gradient.double().norm() + 1e-300
    error = (projected - found.b.double() @ found.a.double()).norm()
    best = values[rank:].square().sum().sqrt()
    assert error <= best + 1e-6 * scale  # Eckart and Young: no rank-r matrix is nearer
    assert (found.singular_values[: len(kept)].double() - kept).abs().max() < 1e-6 * scale
    assert (found.singular_values[:-1] >= found.singular_values[1:]).all()


def test_missing_directions_are_filled_up_with_rows_that_carry_nothing() -> None:
    basis = random_orthonormal(9, 4, seed=3)
    outside = random_orthonormal(9, 5, seed=4)
    outside = torch.linalg.qr(outside - basis @ (basis.T @ outside))[0][:, :1]
    gradient = torch.randn(6, 1, generator=torch.Generator().manual_seed(0)) @ outside.T + basis.sum(dim=1)
    found = residual_directions(gradient, basis, 5)  # one direction outside, four missing
    assert_orthonormal(found.a.T)
    assert (found.a @ basis).abs().max() < 1e-6
    assert (found.b[:, 0].norm() > 0.1) and not found.b[:, 1:].any()
    assert not found.singular_values[1:].any()
    zero = residual_directions(torch.zeros(6, 9), basis, 5)
    assert_orthonormal(zero.a.T)
    assert (zero.a @ basis).abs().max() < 1e-6
    assert not zero.b.any() and not zero.singular_values.any()


def test_full_rank_outside_an_empty_basis_rebuilds_the_gradient() -> None:
    gradient = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    found = residual_directions(gradient, None, 5)
    torch.testing.assert_close(found.b @ found.a, gradient)


def test_rows_beyond_the_room_outside_the_basis_are_zero(caplog: pytest.LogCaptureFixture) -> None:
    gradient = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    basis = random_orthonormal(5, 3, seed=7)
    with caplog.at_level(logging.WARNING):
        found = residual_directions(gradient, basis, 4)
    assert "a basis of 3 directions leaves 2 of 5: 2 rows of the adapter are zero" in caplog.text
    assert found.a.shape == (4, 5) and found.b.shape == (6, 4)
    assert not found.a[2:].any() and not found.b[:, 2:].any() and not found.singular_values[2:].any()
    projected = gradient.double() - gradient.double() @ projector(basis)
    torch.testing.assert_close(found.b.double() @ found.a.double(), projected, atol=1e-6, rtol=0)
    assert_orthonormal(found.a[:2].T)
    assert not residual_directions(gradient, random_orthonormal(5, 5, seed=8), 2).a.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: residual_directions(torch.ones(3, 4), None, 0), "rank must be at least 1"),
        (lambda: residual_directions(torch.ones(3, 4), torch.eye(3), 1), "in = 4"),
        (lambda: residual_directions(torch.ones(3, 4), torch.ones(4, 2), 1), "not orthonormal"),
        (lambda: residual_directions(torch.full((3, 4), float("inf")), None, 1), "12 NaN or infinite"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
