"""Memory, traffic and time of measuring gradients, for every place of the sums and for the sketch.

    python scripts/bench/measurement.py --output runs/measurement.json

Bytes are counted for the 224 matrices of LLaVA-1.5-7B, from its architecture alone. Times are of the playground's
model on one of its tasks, in one process with one thread (CPU seconds, so that other work on the machine counts
little); modes take turns, and medians are given. Beside them stands the plain form: one sample at a time, weights that
require a gradient, and a running mean of `.grad`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig

from llava_cl.config import ModelConfig, RunConfig, load_config
from llava_cl.distributed import World
from llava_cl.models import family
from llava_cl.pipeline.job import Job
from llava_cl.pipeline.measuring import measure_task
from llava_cl.pipeline.progress import ProgressWriter
from llava_cl.store import RunDirectory
from llava_cl.subspace import Sketch, expand_basis, principal_basis, residual_directions
from llava_cl.subspace.sketch import sketch_rows
from llava_cl.training.statistics import without_index
from llava_cl.training.sums import SumsPlace, device_bytes, host_bytes, passes, planned_sums

ROOT = Path(__file__).parents[2]
RUN = ROOT / "configs/runs/playground_ucit_keeplora.yaml"
RANK = 32


def seven_billion(ranks: int, bound: float) -> list[dict[str, Any]]:
    """Bytes of each mode for LLaVA-1.5-7B, decimal GB: what a rank holds, and what it sends.

    A reduction to the owner sends each rank's sum once, but for the owner's own; owners hold even shares.
    """
    with tempfile.TemporaryDirectory() as folder:
        LlavaConfig().save_pretrained(folder)
        llava = family(ModelConfig(path=Path(folder)))
        targets = llava.linear_targets(llava.skeleton())
    rows = []
    columns = 4 * RANK
    modes: list[tuple[str, SumsPlace, int | None]] = [
        ("exact, device", "device", None),
        ("exact, host", "host", None),
        (f"exact, {bound:g} GB", bound, None),
        (f"sketch, {columns} columns, device", "device", columns),
        (f"sketch, {columns} columns, {1} GB", 1.0, columns),
    ]
    for name, place, sketch in modes:
        planned = planned_sums(targets, frozenset({"gradient"}), sketch)
        total = sum(item.bytes for item in planned)
        groups = len(passes(planned, place))
        drawn = 0
        if sketch:
            features = max(target.module.in_features for target in targets.values())
            outputs = max(target.module.out_features for target in targets.values())
            drawn = 4 * (features * sketch + outputs * sketch_rows(sketch))
        rows.append(
            {
                "mode": name,
                "matrices": len(targets),
                "passes": groups,
                "device_gb": (device_bytes(planned, place) + drawn) / 1e9,
                "host_gb": (host_bytes(planned) if place == "host" else total / ranks if groups > 1 else 0) / 1e9,
                "sent_gb": total * (ranks - 1) / ranks / 1e9,
            }
        )
    return rows


def build(overrides: list[str], output: Path) -> Job:
    """A job of one process on the playground, in fp32."""
    config: RunConfig = load_config(RUN, ["model.dtype=float32", *overrides])
    run = RunDirectory(output, [task.name for task in config.benchmark.tasks])
    return Job(config, run, World(0, 1, torch.device("cpu")), ProgressWriter(None))


def plain(job: Job, stage: int, indices: list[int]) -> dict[str, torch.Tensor]:
    """The gradients one sample at a time, from trainable base weights."""
    model = job.load_model(0)
    weights = {name: target.module.weight for name, target in job.targets(model).items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    dataset = job.samples.measured(job.config.task(stage)).dataset
    means = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for count, index in enumerate(indices, start=1):
        batch = job.samples.collate([dataset[index]])
        model(**without_index(batch), per_sample=True)["loss"].backward()
        for name, weight in weights.items():
            assert weight.grad is not None
            means[name] += (weight.grad - means[name]) / count
            weight.grad = None
    return means


@contextmanager
def cpu_seconds(into: list[float]) -> Iterator[None]:
    """Appends the CPU seconds of the block."""
    start = time.process_time()
    yield
    into.append(time.process_time() - start)


def playground(ratio: float, repeats: int, output: Path) -> dict[str, Any]:
    """CPU seconds of each mode, and its largest relative difference from the plain form."""
    from llava_cl.data import measurement_indices

    stage, settings = 1, [f"measurement.ratio={ratio}"]
    modes = {
        "device": [],
        "host": ["measurement.sums=host"],
        "3 MB, in passes": ["measurement.sums=0.003"],
        "sketch, 32 columns": ["measurement.sketch=32"],
    }
    jobs = {name: build([*settings, *own], output) for name, own in modes.items()}
    first = jobs["device"]
    lengths = first.samples.measured(first.config.task(stage)).lengths
    indices = measurement_indices(len(lengths), ratio)
    seconds: dict[str, list[float]] = {name: [] for name in ("plain, one sample at a time", *modes)}
    found: dict[str, dict[str, torch.Tensor]] = {}
    for _ in range(repeats):
        with cpu_seconds(seconds["plain, one sample at a time"]):
            expected = plain(first, stage, indices)
        for name, job in jobs.items():
            with cpu_seconds(seconds[name]):
                model = job.load_model(0)
                measured = measure_task(job, model, stage, "before", job.owners(model))
            found[name] = {layer: _present(measured.gradient, layer) for layer in expected}

    def error(values: dict[str, torch.Tensor]) -> float:
        return max(float((values[k] - v).norm() / v.norm()) for k, v in expected.items())

    base = statistics.median(seconds["device"])
    weights = {name: target.module.weight for name, target in first.targets(first.load_model(0)).items()}
    return {
        "sketches": sketch_quality(found["device"], weights),
        "samples": len(indices),
        "modes": [
            {
                "mode": name,
                "cpu_seconds": statistics.median(values),
                "relative_to_device": statistics.median(values) / base,
                "largest_relative_error": error(found[name]) if name in found else 0.0,
            }
            for name, values in seconds.items()
        ],
    }


def sketch_quality(gradients: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> list[dict[str, float]]:
    """What sketches of exact gradients keep: of the energy of the initial directions, and of what is protected."""
    rank, energy = 8, 0.99
    bases = {name: principal_basis(weight, 0.6) for name, weight in weights.items()}
    rows = []
    for columns in (2 * rank, 4 * rank, 8 * rank):
        kept, held = [], []
        for number, (name, gradient) in enumerate(gradients.items()):
            basis = bases[name]
            sketch = Sketch.draw(columns, *gradient.shape, torch.Generator().manual_seed(number))
            rebuilt = sketch.rebuild(gradient @ sketch.omega, sketch.psi.T @ gradient)
            outside = gradient - (gradient @ basis) @ basis.T
            found, best = (residual_directions(value, basis, rank).a for value in (rebuilt, gradient))
            kept.append(float((outside @ found.T).square().sum() / (outside @ best.T).square().sum()))
            grown = expand_basis(basis, rebuilt.T, energy)
            held.append(float((gradient @ grown).square().sum() / gradient.square().sum()))
        rows.append(
            {
                "columns": columns,
                "kept_least": min(kept),
                "kept_median": statistics.median(kept),
                "protected_least": min(held),
                "protected_median": statistics.median(held),
            }
        )
    return rows


def _present(gradient: Callable[[str], torch.Tensor | None], layer: str) -> torch.Tensor:
    value = gradient(layer)
    assert value is not None
    return value


def main() -> None:
    """Counts, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the result")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--bound", type=float, default=8.0, help="GB of sums on a device, for the mode with passes")
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"ranks": arguments.ranks, "llava_7b": seven_billion(arguments.ranks, arguments.bound)}
    for row in result["llava_7b"]:
        print(
            f"{row['mode']:<34} passes {row['passes']:>2}  device {row['device_gb']:6.2f} GB  "
            f"host {row['host_gb']:6.2f} GB  sent {row['sent_gb']:6.2f} GB"
        )
    with tempfile.TemporaryDirectory() as folder:
        result["playground"] = playground(arguments.ratio, arguments.repeats, Path(folder))
    for row in result["playground"]["modes"]:
        print(
            f"{row['mode']:<34} {row['cpu_seconds']:6.2f} s  x {row['relative_to_device']:.2f}  "
            f"error {row['largest_relative_error']:.1e}"
        )
    for row in result["playground"]["sketches"]:
        print(
            f"sketch of {row['columns']:.0f} columns keeps {row['kept_least']:.4f} (least of a layer), "
            f"{row['kept_median']:.4f} (median); a basis grown to 0.99 by it holds {row['protected_least']:.4f}, "
            f"{row['protected_median']:.4f}"
        )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
