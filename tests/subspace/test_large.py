"""Large matrices: the float32 Krylov way against float64 SVDs, and the exact way where it must be gone.

`LARGE` is lowered, so that matrices of a few hundred rows count as large.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from subspace_references import assert_orthonormal, projector, random_orthonormal, with_spectrum
from torch.utils.flop_counter import FlopCounterMode

from llava_cl.subspace import bases, expand_basis, krylov, linalg, principal_basis, residual, residual_directions

RANK = 12
SPECTRA: dict[str, Callable[[int], float]] = {
    "inverse": lambda j: 1 / (j + 1),
    "slow": lambda j: (j + 1) ** -0.5,
    "geometric": lambda j: 0.8**j,
    "pairs": lambda j: (j // 2 + 1) ** -1.0 * (1 - 1e-6 * (j % 2)),
    "outlier": lambda j: 30.0 if j == 0 else (j + 1) ** -0.7,
}
SHAPES = [(600, 420), (420, 600), (480, 480)]


@pytest.fixture(autouse=True)
def _small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linalg, "LARGE", 300)


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways that were gone: "krylov" where it gave an answer, and the dtype of each Gram matrix decomposed."""
    gone: list[str] = []
    leading, largest = residual.leading_outside, linalg.largest_directions

    def leading_outside(*arguments: object) -> object:
        found = leading(*arguments)  # type: ignore[arg-type]
        if found is not None:
            gone.append("krylov")
        return found

    def largest_directions(matrix: torch.Tensor, floor: float) -> object:
        gone.append(str(matrix.dtype).removeprefix("torch."))
        return largest(matrix, floor)

    for module in (bases, residual):
        monkeypatch.setattr(module, "leading_outside", leading_outside)
    for module in (bases, linalg):
        monkeypatch.setattr(module, "largest_directions", largest_directions)
    return gone


def matrix_of(shape: tuple[int, int], spectrum: str, seed: int = 0) -> torch.Tensor:
    return with_spectrum(*shape, [SPECTRA[spectrum](j) for j in range(min(shape))], seed)


def apart(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference of two projectors, relative to one."""
    return float((projector(actual) - projector(expected)).norm()) / expected.shape[1] ** 0.5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_residual_directions_are_those_of_a_float64_svd(spectrum: str, shape: tuple[int, int], ways: list[str]) -> None:
    gradient, basis = matrix_of(shape, spectrum), random_orthonormal(shape[1], 60, seed=1)
    found = residual_directions(gradient, basis, RANK)
    assert ways == ["krylov"]
    outside = gradient.double() - gradient.double() @ projector(basis)
    _, values, right = torch.linalg.svd(outside, full_matrices=False)
    assert_orthonormal(found.a.T)
    assert (found.a.double() @ basis.double()).abs().max() < 1e-6
    torch.testing.assert_close(found.singular_values.double(), values[:RANK], rtol=1e-5, atol=0)
    torch.testing.assert_close(found.b.norm(dim=0), found.singular_values, rtol=1e-5, atol=0)
    error = (outside - found.b.double() @ found.a.double()).square().sum()
    assert error < values[RANK:].square().sum() + 1e-6 * values.square().sum()
    for count in range(1, RANK + 1):  # wherever there is a gap
        if values[count] < 0.95 * values[count - 1]:
            assert apart(found.a[:count].T, right[:count].T) < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("spectrum", "energy"), [("inverse", 0.97), ("geometric", 0.99), ("outlier", 0.9988)])
def test_a_basis_is_widened_by_the_directions_of_a_float64_svd(
    spectrum: str, energy: float, shape: tuple[int, int], ways: list[str]
) -> None:
    directions, basis = matrix_of(shape, spectrum), random_orthonormal(shape[0], 60, seed=1)
    wider = expand_basis(basis, directions, energy)
    assert ways == ["krylov"]
    assert torch.equal(wider[:, :60], basis)
    assert_orthonormal(wider)
    outside = directions.double() - projector(basis) @ directions.double()
    left, values, _ = torch.linalg.svd(outside, full_matrices=False)
    total = directions.double().square().sum()
    held = 1 - (values.square().sum() - values.square().cumsum(0)) / total
    count = int((held < energy).sum()) + 1
    assert wider.shape[1] == 60 + count > 63
    assert apart(wider[:, 60:], left[:, :count]) < 5e-4


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("spectrum", "energy", "way"),
    [
        ("inverse", 0.9, ["krylov"]),
        ("slow", 0.7, ["float32"]),  # more than a few
        ("inverse", 0.997, ["float32", "float64"]),  # down to where a float32 Gram matrix is not trusted
    ],
)
def test_principal_directions_are_those_of_a_float64_svd(
    spectrum: str, energy: float, way: list[str], shape: tuple[int, int], ways: list[str]
) -> None:
    weight = matrix_of(shape, spectrum)
    basis = principal_basis(weight, energy)
    assert ways == way
    _, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    count = int((values.square().cumsum(0) / values.square().sum() < energy).sum())
    assert basis.shape == (shape[1], count) and basis.dtype == torch.float32
    assert_orthonormal(basis)
    assert apart(basis, right[:count].T) < 1e-4
    assert (basis.gather(0, basis.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_where_it_does_not_converge_the_exact_way_is_gone(monkeypatch: pytest.MonkeyPatch, ways: list[str]) -> None:
    flat = torch.randn(600, 420, generator=torch.Generator().manual_seed(0))
    steep = with_spectrum(600, 420, [0.3**j for j in range(60)], seed=0)  # the 12th is rounding of the first
    low = with_spectrum(600, 420, [1.0] * 5, seed=0)
    shadow = with_spectrum(600, 420, [1.0] + [2e-4 * 0.9**j for j in range(300)], seed=0)
    basis = random_orthonormal(420, 60, seed=1)
    found = [residual_directions(gradient, basis, RANK) for gradient in (flat, steep, low, shadow)]
    slow = matrix_of((420, 600), "slow")
    widened = [expand_basis(basis, slow, energy) for energy in (0.99, 1.0)]
    assert set(ways) == {"float64"}
    monkeypatch.setattr(linalg, "LARGE", 1024)
    for gradient, large in zip((flat, steep, low, shadow), found, strict=True):
        for actual, expected in zip(large, residual_directions(gradient, basis, RANK), strict=True):
            assert torch.equal(actual, expected)
    for energy, large in zip((0.99, 1.0), widened, strict=True):
        assert torch.equal(large, expand_basis(basis, slow, energy))


@pytest.mark.parametrize("copies", [24, 40, 60])
def test_no_copy_of_a_singular_value_is_missed(copies: int) -> None:
    """A block of 16 finds 16 copies of a value and some by rounding; for the others it offers the next values."""
    values = [1.0] * copies + [0.9 * 0.97**j for j in range(300)]
    directions = with_spectrum(900, 900, values, seed=0)
    energy = (copies - 0.5) / sum(value**2 for value in values)
    wider = expand_basis(None, directions, energy)
    assert wider.shape[1] == copies
    held = (projector(wider) @ directions.double()).square().sum()
    assert abs(float(held) - copies) < 1e-4


@pytest.mark.parametrize(("copies", "next_value"), [(20, 0.5), (25, 0.95), (40, 0.9)])
def test_a_space_without_all_copies_of_a_value_is_given_up(copies: int, next_value: float) -> None:
    """A block of 16 has seen 16 copies, and for the 17th direction it would give a smaller one; a probe tells."""
    matrix = with_spectrum(600, 600, [1.0] * copies + [next_value] + [0.1 * 0.6**j for j in range(9)], seed=0)
    found = krylov.leading_outside(matrix, matrix.new_empty(600, 0), 600, 16 + next_value**2 / 2)
    assert found is None or float(found[1].min()) > 0.999


def test_directions_on_both_sides_of_a_threshold_are_told_apart() -> None:
    """Those that float32 has mixed, ten before it with ten behind it."""
    count = 100
    right = random_orthonormal(300, 200, seed=0)
    weight = random_orthonormal(400, 200, seed=1) * torch.linspace(2, 1, 200) @ right.T
    mixed = right.clone()
    for j in range(10):
        kept, left = count - 1 - j, count + j
        mixed[:, kept] = math.cos(0.01) * right[:, kept] + math.sin(0.01) * right[:, left]
        mixed[:, left] = math.cos(0.01) * right[:, left] - math.sin(0.01) * right[:, kept]
    settled = bases._settled(weight, mixed, count)
    assert (projector(settled) - projector(right[:, :count])).norm() < 1e-5


def test_nothing_is_decomposed_where_nothing_is_left(ways: list[str]) -> None:
    basis = random_orthonormal(420, 60, seed=1)
    inside = basis @ torch.randn(60, 600, generator=torch.Generator().manual_seed(0))
    assert expand_basis(basis, inside, 0.99) is basis
    assert expand_basis(basis, torch.zeros(420, 600), 0.99) is basis
    found = residual_directions(torch.zeros(600, 420), basis, RANK)
    assert_orthonormal(found.a.T)
    assert (found.a @ basis).abs().max() < 1e-6
    assert not found.b.any() and not found.singular_values.any()
    assert not ways


def test_the_same_input_gives_the_same_bits_and_leaves_the_settings_alone() -> None:
    weight = matrix_of((600, 420), "inverse")

    def all_three() -> list[torch.Tensor]:
        basis = principal_basis(weight, 0.9)
        return [basis, expand_basis(basis, weight.T, 0.97), *residual_directions(weight, basis, RANK)]

    expected = all_three()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for actual, same in zip(all_three(), expected, strict=True):
                assert torch.equal(actual, same)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_basis_that_is_not_orthonormal_is_refused() -> None:
    gradient = matrix_of((600, 420), "inverse")
    basis = random_orthonormal(420, 60, seed=1)
    basis[:, 3] *= 2
    for call in (
        lambda: residual_directions(gradient, basis, RANK),
        lambda: expand_basis(basis, gradient.T, 0.97),
        lambda: expand_basis(basis, gradient.T, 0.01),  # held already
    ):
        with pytest.raises(ValueError, match="not orthonormal"):
            call()


def flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_products_with_the_matrix_cost_no_more_than_a_sketch_of_four_times_the_columns(ways: list[str]) -> None:
    gradient, basis = matrix_of((900, 900), "inverse"), random_orthonormal(900, 200, seed=1)
    ours = flops(lambda: residual_directions(gradient, basis, RANK))
    sketch = flops(lambda: torch.svd_lowrank(gradient.T - basis @ (basis.T @ gradient.T), q=4 * RANK, niter=2))
    assert ways == ["krylov"] and ours < sketch


def test_a_widening_costs_no_more_than_the_basis_grows(monkeypatch: pytest.MonkeyPatch, ways: list[str]) -> None:
    directions = matrix_of((900, 900), "geometric")
    sizes: list[int] = []
    eigh = torch.linalg.eigh

    def counted(matrix: torch.Tensor) -> object:
        sizes.append(matrix.shape[0])
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    costs = [
        flops(lambda k=k: expand_basis(random_orthonormal(900, k, seed=1), directions, 0.99)) for k in (100, 200, 400)
    ]
    assert set(ways) == {"krylov"} and max(sizes) <= 900 * 3 / 8
    assert costs[1] - costs[0] < 0.6 * (costs[2] - costs[0])  # linear in the size of the basis
    assert costs[2] < 4 * costs[0]
