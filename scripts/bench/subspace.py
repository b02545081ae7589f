"""Time and accuracy of the subspace steps at the sizes of LLaMA-7B, beside the published algorithm.

    OMP_NUM_THREADS=1 python scripts/bench/subspace.py --output runs/subspace

For each size of a layer's seven matrices, on the same matrix: the principal basis of a weight (energy 0.6), the basis
widened by a gradient (0.99) and the directions that initialise an adapter (rank 32), by `llava_cl.subspace` and by the
published algorithm written plainly: float32 SVDs, one of a weight, two for each widening (one of them for a norm), and
`svd_lowrank` of the projected gradient for the adapter. Energies and projectors are compared with those of the SVDs.

The matrices are synthetic. A weight is Gaussian plus 256 stronger directions of sizes j^-1/2 with 30 % of the energy. A
gradient is a sum of 1024 random outer products of sizes j^-decay plus Gaussian noise with 0.5 % of the energy, so that
its rank is full and its tail flat. A decay of 1 needs some 65 new directions, one of 0.5 far more than are few.

Seconds are of processor time on a CPU, which on one thread and an idle machine is what a clock shows, and of the clock
on a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_cl.subspace import expand_basis, principal_basis, residual_directions

LAYER = {"q, k, v, o": (4096, 4096, 4), "gate, up": (11008, 4096, 2), "down": (4096, 11008, 1)}
TINY = {"q, k, v, o": (1152, 1152, 4), "gate, up": (1536, 1152, 2), "down": (1152, 1536, 1)}
"""Name -> out, in, number in a layer."""

WEIGHT_ENERGY, ENERGY, RANK = 0.6, 0.99, 32


def spiked(shape: tuple[int, int], count: int, decay: float, noise: float, seed: int, device: str) -> Tensor:
    """`count` random outer products of sizes j^-decay, and Gaussian noise with the share `noise` of the energy."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.arange(1, count + 1) ** -decay
    left, right = (torch.randn(side, count, generator=generator) / side**0.5 for side in shape)
    signal = (left.to(device) * sizes.to(device)) @ right.to(device).T
    grain = torch.randn(shape, generator=generator).to(device)
    return signal / signal.norm() * (1 - noise) ** 0.5 + grain / grain.norm() * noise**0.5


def principal_by_svd(weight: Tensor) -> Tensor:
    """The published principal basis."""
    left, values, _ = torch.linalg.svd(weight.T, full_matrices=False)
    shares = (values**2).cumsum(0) / (values**2).sum()
    return left[:, : max(int((shares < WEIGHT_ENERGY).sum()), 1)]


def new_by_svd(basis: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The published new columns, and all left singular vectors of the projected gradient."""
    total = (torch.linalg.svd(gradient.T, full_matrices=False)[1] ** 2).sum()
    left, values, _ = torch.linalg.svd(projected(gradient, basis), full_matrices=False)
    shares = ((values**2).cumsum(0) + total - (values**2).sum()) / total
    return left[:, : int((shares < ENERGY).sum()) + 1], left


def projected(gradient: Tensor, basis: Tensor) -> Tensor:
    """The transposed gradient outside the basis."""
    return gradient.T - basis @ (basis.T @ gradient.T)


def timed(call: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
    """Median seconds, and the last result."""
    clock = time.perf_counter if torch.cuda.is_initialized() else time.process_time
    seconds = []
    for _ in range(repeats):
        result = None
        start = clock()
        result = call()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    return statistics.median(seconds), result


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Frobenius norm of the difference of two projectors, over that of one."""
    apart = [(a - b @ (b.T @ a)).square().sum() for a, b in ((ours, theirs), (theirs, ours))]
    return float(sum(apart).sqrt()) / theirs.shape[1] ** 0.5


def energy_ratio(ours: Tensor, theirs: Tensor, matrix: Tensor) -> float:
    """Energy of `matrix` `[out, in]` in the columns of ours, over that in the other's."""
    ours, theirs = ((matrix.double() @ columns).square().sum() for columns in (ours, theirs))
    return float(ours / theirs)


def exactly_orthonormal(columns: Tensor) -> Tensor:
    """The same span in float64: lengths and angles off by the rounding of float32 would count as energy."""
    return torch.linalg.qr(columns.double())[0]


def compare(name: str, seconds: tuple[float, float], ours: Tensor, theirs: Tensor, matrix: Tensor) -> dict[str, Any]:
    """One row of the table."""
    ours, theirs = exactly_orthonormal(ours), exactly_orthonormal(theirs)
    return {
        "step": name,
        "seconds": round(seconds[0], 3),
        "published_seconds": round(seconds[1], 3),
        "times_faster": round(seconds[1] / seconds[0], 2),
        "rank": ours.shape[1],
        "svd_rank": theirs.shape[1],
        "projector_difference": difference(ours, theirs),
        "energy_ratio": energy_ratio(ours, theirs, matrix),
    }


def measure(shape: tuple[int, int], decays: list[float], repeats: int, device: str) -> list[dict[str, Any]]:
    """The rows of one size."""
    weight = spiked(shape, 256, 0.5, 0.7, 0, device)
    ours, basis = timed(lambda: principal_basis(weight, WEIGHT_ENERGY), repeats)
    published, theirs = timed(lambda: principal_by_svd(weight))
    rows = [compare("principal basis", (ours, published), basis, theirs, weight)]
    held = basis.shape[1]
    for decay in decays:
        gradient = spiked(shape, 1024, decay, 0.005, 1, device)
        ours, wider = timed(lambda g=gradient: expand_basis(basis, g.T, ENERGY), repeats)
        published, (theirs, left) = timed(lambda g=gradient: new_by_svd(basis, g))
        rows.append(compare(f"widened basis, {decay:g}", (ours, published), wider[:, held:], theirs, gradient))
        ours, found = timed(lambda g=gradient: residual_directions(g, basis, RANK), repeats)
        for columns in (RANK, 4 * RANK):
            published, sketch = timed(
                lambda g=gradient, q=columns: torch.svd_lowrank(projected(g, basis), q=q)[0][:, :RANK], repeats
            )
            row = compare(
                f"adapter, {decay:g}, lowrank {columns}", (ours, published), found.a.T, left[:, :RANK], gradient
            )
            outside = projected(gradient, basis)
            row["lowrank_alone_seconds"] = round(
                timed(lambda o=outside, q=columns: torch.svd_lowrank(o, q=q), repeats)[0], 3
            )
            row["lowrank_energy_ratio"] = energy_ratio(*map(exactly_orthonormal, (sketch, left[:, :RANK])), gradient)
            rows.append(row)
            del outside
    return rows


def growth(shape: tuple[int, int], repeats: int, device: str) -> list[dict[str, float]]:
    """Seconds of a widening, by the size of the basis that is there before."""
    rows = []
    gradient = spiked(shape, 1024, 1.0, 0.005, 1, device)
    for divisor in (32, 8, 4, 2):
        start = torch.randn(shape[1], shape[1] // divisor, generator=torch.Generator().manual_seed(2)).to(device)
        basis = torch.linalg.qr(start)[0]
        seconds, wider = timed(lambda b=basis: expand_basis(b, gradient.T, ENERGY), repeats)
        rows.append({"basis": basis.shape[1], "added": wider.shape[1] - basis.shape[1], "seconds": round(seconds, 3)})
    return rows


def batched(repeats: int, device: str) -> list[dict[str, Any]]:
    """Seconds of the steps' operations on eight matrices of one shape, one after another and as one batch."""
    rows = []
    for side in (64, 256, 1024):
        square, narrow = torch.randn(8, side, side), torch.randn(8, side, side // 8)
        square, narrow, gram = square.to(device), narrow.to(device), (square @ square.mT).double().to(device)
        operations: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
            "eigh": lambda gram, square, narrow: torch.linalg.eigh(gram),
            "product": lambda gram, square, narrow: square @ narrow,
            "qr": lambda gram, square, narrow: torch.linalg.qr(narrow),
        }
        for name, call in operations.items():
            each = timed(lambda c=call, m=(gram, square, narrow): [c(*one) for one in zip(*m, strict=True)], repeats)[0]
            whole = timed(lambda c=call, m=(gram, square, narrow): c(*m), repeats)[0]
            rows.append({"operation": name, "side": side, "one_by_one": each, "batched": whole})
    return rows


def main() -> None:
    """Measures all sizes, prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the result")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--decays", type=float, nargs="+", default=[1.0], help="of the gradients' spectra")
    parser.add_argument("--repeats", type=int, default=3, help="of all but the SVDs; the median counts")
    parser.add_argument("--tiny", action="store_true", help="small matrices, to try the script")
    arguments = parser.parse_args()
    layer = TINY if arguments.tiny else LAYER
    result: dict[str, Any] = {
        "device": arguments.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if arguments.device != "cpu":
        result["device"] = torch.cuda.get_device_name(arguments.device)
    totals: dict[str, list[float]] = {}
    print(f"{'size':>14} {'step':28} {'ours':>8} {'published':>9} {'faster':>7} {'rank':>5} {'SVD':>5} "
          f"{'projector':>9} {'energy':>9} {'lowrank: energy':>15} {'s alone':>8}")  # fmt: skip
    for name, (out, features, number) in layer.items():
        result[name] = measure((out, features), arguments.decays, arguments.repeats, arguments.device)
        for row in result[name]:
            total = totals.setdefault(row["step"], [0.0, 0.0])
            total[0] += number * row["seconds"]
            total[1] += number * row["published_seconds"]
            lowrank = (
                f"{row['lowrank_energy_ratio']:15.6f} {row['lowrank_alone_seconds']:8.2f}"
                if "lowrank_energy_ratio" in row
                else ""
            )
            print(
                f"{out:>6} x {features:>5} {row['step']:28} {row['seconds']:8.2f} {row['published_seconds']:9.2f} "
                f"{row['times_faster']:7.1f} {row['rank']:5} {row['svd_rank']:5} {row['projector_difference']:9.1e} "
                f"{row['energy_ratio']:9.6f} {lowrank}",
                flush=True,
            )
    print("\nA layer's seven matrices, seconds:")
    for step, (ours, published) in totals.items():
        print(f"  {step:28} {ours:8.1f} {published:9.1f} {published / ours:7.1f} times faster")
    result["layer"] = {step: {"seconds": a, "published_seconds": b} for step, (a, b) in totals.items()}
    out, features, _ = layer["q, k, v, o"]
    result["growth"] = growth((out, features), arguments.repeats, arguments.device)
    print(f"\nWidening at {out} x {features} by the size of the basis before:")
    for row in result["growth"]:
        print(f"  {row['basis']:5} columns, {row['added']:4} added: {row['seconds']:6.2f} s")
    result["batched"] = batched(max(arguments.repeats, 5), arguments.device)
    print("\nEight matrices of one shape, milliseconds:")
    for row in result["batched"]:
        each, whole = 1000 * row["one_by_one"], 1000 * row["batched"]
        print(f"  {row['operation']:8} {row['side']:5}: {each:8.2f} one by one, {whole:8.2f} as a batch")
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "subspace.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
