from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from subspace_references import (
    assert_orthonormal,
    assert_same_span,
    golden,
    matrices,
    projector,
    random_orthonormal,
    with_spectrum,
)

from llava_cl.subspace import expand_basis, minor_basis, principal_basis, residual_directions

LLAVA = golden("keeplora_llava")
MTIL = golden("keeplora_mtil")
NAMES = [key.removeprefix("W/") for key in LLAVA if key.startswith("W/")]
GOLDEN_TOLERANCE = 1e-5  # the references are float32 decompositions, chained over five stages


def mean_gradient(stage: int, name: str) -> torch.Tensor:
    chunks = [v for k, v in LLAVA.items() if k.startswith(f"grad/{stage}/") and k.endswith(name)]
    assert chunks
    return torch.stack(chunks).mean(dim=0)


@pytest.mark.parametrize("energy", ["0.3", "0.6", "0.9"])
@pytest.mark.parametrize("name", NAMES)
def test_principal_basis_agrees_with_the_reference(name: str, energy: str) -> None:
    basis = principal_basis(LLAVA[f"W/{name}"], float(energy))
    assert_same_span(basis, LLAVA[f"weight_basis/f32/{energy}/{name}"].T, GOLDEN_TOLERANCE)


@pytest.mark.parametrize("chain", ["first_0.9", "first_0.99", "w0.6_0.9", "w0.6_0.99"])
@pytest.mark.parametrize("name", NAMES)
def test_expand_basis_agrees_with_the_reference_over_five_stages(name: str, chain: str) -> None:
    start, energy = chain.split("_")
    basis = principal_basis(LLAVA[f"W/{name}"], 0.6) if start == "w0.6" else None
    for stage in range(1, 6):
        basis = expand_basis(basis, mean_gradient(stage, name).T, float(energy))
        assert_same_span(basis, LLAVA[f"chain/{chain}/{stage}/{name}"].T, GOLDEN_TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_a_threshold_above_one_stops_at_the_reference_rank(name: str) -> None:
    start = principal_basis(LLAVA[f"W/{name}"], 0.6)
    basis = expand_basis(start, mean_gradient(1, name).T, 1.01)
    expected = LLAVA[f"cap/{name}"].T
    assert basis.shape == expected.shape and basis.shape[1] <= basis.shape[0]
    assert_orthonormal(basis)


@pytest.mark.parametrize("config", ["input_side", "no_weight_basis"])
@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("group", [f"{e}_{m}" for e in ("vit", "text") for m in "qkvo"])
def test_feature_bases_agree_with_the_clip_reference(group: str, block: int, config: str) -> None:
    encoder, module = group.split("_")
    basis = None
    if config == "input_side":
        tower = {"vit": "image_encoder", "text": "text_encoder"}[encoder]
        if module == "o":
            weight = MTIL[f"weight/{tower}/{block}/out_proj.weight"]
        else:
            weight = MTIL[f"weight/{tower}/{block}/in_proj_weight"].chunk(3)["qkv".index(module)]
        basis = principal_basis(weight, {"vit": 0.85, "text": 0.2}[encoder])
        assert_same_span(basis, MTIL[f"basis/{config}/0/{group}/{block}"], GOLDEN_TOLERANCE)
    for stage in range(1, 5):
        features = MTIL[f"F/{stage}/{encoder}/{block}/{'o' if module == 'o' else 'qkv'}"]
        basis = principal_basis(features.T, 0.99) if basis is None else expand_basis(basis, features, 0.99)
        assert_same_span(basis, MTIL[f"basis/{config}/{stage}/{group}/{block}"], GOLDEN_TOLERANCE)


def test_the_first_rules_differ_in_the_crossing_direction() -> None:
    directions = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))  # energies 16, 9, 4, 1 of 30
    assert principal_basis(directions, 0.6).shape == (4, 1)
    assert expand_basis(None, directions, 0.6).shape == (4, 2)
    assert principal_basis(directions, 0.1).shape == (4, 1)  # one is always kept


def test_a_threshold_met_exactly_is_reached() -> None:
    for tenths in range(2, 10):
        assert principal_basis(torch.eye(10), tenths / 10).shape[1] == tenths - 1
        assert expand_basis(None, torch.eye(10), tenths / 10).shape[1] == tenths
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    rotation = torch.kron(pair, pair) / 2  # exact, but its products with eigenvectors round
    directions = rotation * torch.tensor([4.0, 3.0, 2.0, 1.0])
    for count, energy in ((2, 25 / 30), (3, 29 / 30)):
        assert principal_basis(directions.T, energy).shape[1] == count - 1
        assert expand_basis(None, directions, energy).shape[1] == count


@given(matrices(), st.floats(0.05, 0.999))
@settings(max_examples=80, deadline=None)
def test_principal_basis_keeps_what_a_float64_svd_says(weight: torch.Tensor, energy: float) -> None:
    assume(weight.any())
    _, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    cumulative = values.square().cumsum(0) / values.square().sum()
    assume((cumulative - energy).abs().min() > 1e-9)
    basis = principal_basis(weight, energy)
    count = max(1, int((cumulative < energy).sum()))
    assert basis.shape == (weight.shape[1], count) and basis.dtype == torch.float32
    assert_orthonormal(basis)
    if count < len(values) and values[count - 1] - values[count] > 1e-3 * values[count - 1]:
        assert_same_span(basis, right[:count].T, 2e-6)


@given(matrices(), st.integers(0, 2**31), st.floats(0, 1), st.floats(0.05, 0.9999))
@settings(max_examples=80, deadline=None)
def test_expand_basis_accounts_for_the_energy_with_no_direction_to_spare(
    directions: torch.Tensor, seed: int, filling: float, energy: float
) -> None:
    size = directions.shape[0]
    old = random_orthonormal(size, int(filling * size), seed)
    basis = expand_basis(old, directions, energy)
    assert torch.equal(basis[:, : old.shape[1]], old)
    assert basis.shape[1] <= size
    assert_orthonormal(basis)
    total = directions.double().square().sum()

    def held(columns: torch.Tensor) -> float:
        return float((projector(columns) @ directions.double()).square().sum() / total) if total > 0 else 1.0

    assert held(basis) > energy - 1e-6
    if basis.shape[1] > old.shape[1]:
        assert held(basis[:, :-1]) < energy + 1e-6  # the last one was needed
        outside = directions.double() - projector(old) @ directions.double()
        best = torch.linalg.svdvals(outside).square()[: basis.shape[1] - old.shape[1]].sum() / total
        assert abs(held(basis) - held(old) - best) < 1e-6  # and no other choice holds more


def test_directions_far_below_the_largest_are_exact() -> None:
    values = [10.0**-j for j in range(6)]
    directions = with_spectrum(60, 90, values, seed=3)
    left, singular, _ = torch.linalg.svd(directions.double(), full_matrices=False)
    energies = singular.square()
    for shape_of in (directions, directions.T):
        left, _, _ = torch.linalg.svd(shape_of.double(), full_matrices=False)
        for count in range(1, 6):
            threshold = float((energies[:count].sum() - energies[count - 1] / 2) / energies.sum())
            basis = expand_basis(None, shape_of, threshold)
            assert_same_span(basis, left[:, :count], 1e-6)
            basis = principal_basis(shape_of.T, threshold)  # the same without the crossing direction
            assert_same_span(basis, left[:, : max(1, count - 1)], 1e-6)


def test_orthonormal_after_many_expansions_and_never_wider_than_the_space() -> None:
    size = 96
    basis = principal_basis(with_spectrum(64, size, [1 / (j + 1) for j in range(64)], seed=0), 0.6)
    for step in range(40):
        values = [(j + 1) ** -1.5 for j in range(24)]
        wider = expand_basis(basis, with_spectrum(size, 48, values, seed=step + 1), 0.95)
        assert torch.equal(wider[:, : basis.shape[1]], basis)
        basis = wider
        assert_orthonormal(basis, 1e-6)
    assert basis.shape[1] > 70
    full = expand_basis(basis, torch.eye(size), 2.0)
    assert full.shape == (size, size)
    assert_orthonormal(full, 1e-6)
    assert expand_basis(full, torch.randn(size, 5), 2.0) is full


def test_nothing_is_added_when_the_energy_is_held_already() -> None:
    old = random_orthonormal(12, 3, seed=1)
    inside = old @ torch.randn(3, 7)
    assert expand_basis(old, inside, 0.99) is old
    assert expand_basis(old, inside, 1.0) is old
    assert expand_basis(old, torch.zeros(12, 4), 0.99) is old
    assert expand_basis(None, torch.zeros(12, 4), 0.99).shape == (12, 0)
    assert expand_basis(torch.zeros(12, 0), torch.eye(12), 0.2).shape == (12, 3)


def test_an_all_zero_weight_keeps_one_direction() -> None:
    basis = principal_basis(torch.zeros(3, 5), 0.6)
    assert basis.shape == (5, 1)
    assert_orthonormal(basis)


def test_rounding_of_the_input_does_not_flip_a_direction() -> None:
    weight = with_spectrum(20, 30, [2.0**-j for j in range(10)], seed=5)
    nudged = weight * (1 + 1e-6 * torch.randn(20, 30, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(principal_basis(nudged, 0.9999), principal_basis(weight, 0.9999), atol=1e-4, rtol=0)
    assert torch.equal(principal_basis(weight, 0.9), principal_basis(weight.clone(), 0.9))


def test_the_largest_entry_of_a_direction_is_positive() -> None:
    weight = with_spectrum(30, 20, [2.0**-j for j in range(20)], seed=6)
    found = residual_directions(weight, principal_basis(weight, 0.6), 8)
    for columns in (
        principal_basis(weight, 0.9999),
        expand_basis(None, weight.T, 0.9999),
        expand_basis(None, weight, 0.9999),
        found.a.T,
        minor_basis(weight.T @ weight, 1, 1.0),
    ):
        assert columns.shape[1] > 5
        assert (columns.gather(0, columns.abs().argmax(dim=0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_come_out_in_float32(dtype: torch.dtype) -> None:
    weight = with_spectrum(8, 6, [3.0, 2.0, 1.0], seed=2).to(dtype)
    assert_same_span(principal_basis(weight, 0.9), principal_basis(weight.float(), 0.9), 1e-6)
    assert expand_basis(None, weight, 0.9).dtype == torch.float32


def test_tf32_and_autocast_settings_do_not_matter() -> None:
    weight = with_spectrum(30, 20, [1 / (j + 1) for j in range(20)], seed=4)
    expected = principal_basis(weight, 0.9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(principal_basis(weight, 0.9), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: principal_basis(torch.tensor([[1.0, float("nan")]]), 0.6), "1 NaN or infinite"),
        (lambda: expand_basis(None, torch.tensor([[float("inf")], [1.0]]), 0.6), "1 NaN or infinite"),
        (lambda: expand_basis(torch.full((2, 1), float("nan")), torch.eye(2), 0.6), "basis .* NaN"),
        (lambda: principal_basis(torch.ones(3), 0.6), "must be a floating point matrix"),
        (lambda: principal_basis(torch.ones(3, 3, dtype=torch.int64), 0.6), "must be a floating point"),
        (lambda: principal_basis(torch.ones(3, 3), 0.0), "energy must be a positive"),
        (lambda: principal_basis(torch.ones(3, 3), float("nan")), "energy must be a positive"),
        (lambda: expand_basis(torch.eye(4)[:, :2], torch.eye(3), 0.9), "in = 3"),
        (lambda: expand_basis(2 * torch.eye(3)[:, :2], torch.eye(3), 0.9), "not orthonormal"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
