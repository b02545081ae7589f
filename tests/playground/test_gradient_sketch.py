"""The sketch of real gradients gives the subspace in which the exact ones would start a stage."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch

from llava_cl.config import load_config
from llava_cl.distributed import World
from llava_cl.pipeline.job import Job
from llava_cl.pipeline.measuring import measure_task
from llava_cl.pipeline.progress import ProgressWriter
from llava_cl.store import RunDirectory
from llava_cl.subspace import principal_basis

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "runs" / "playground_ucit_keeplora.yaml"


def _job(output: Path, *overrides: str) -> Job:
    config = load_config(CONFIG, ["model.dtype=float32", "measurement.ratio=0.08", *overrides])
    run = RunDirectory(output, [task.name for task in config.benchmark.tasks])
    return Job(config, run, World(0, 1, torch.device("cpu")), ProgressWriter(None))


@pytest.mark.parametrize("stage", [1, 3])
def test_the_sketch_keeps_the_energy_of_the_exact_form(tmp_path: Path, stage: int) -> None:
    """Columns of four times the rank, after the weights' own directions have been projected out."""
    exact_job = _job(tmp_path)
    rank = exact_job.config.lora.rank
    sketch_job = _job(tmp_path, f"measurement.sketch={4 * rank}")
    model = exact_job.load_model(0)
    targets, owners = exact_job.targets(model), exact_job.owners(model)
    exact = measure_task(exact_job, model, stage, "before", owners)
    sketched = measure_task(sketch_job, model, stage, "before", owners)
    assert sketched.range_sketches.keys() == targets.keys()
    shares = []
    for name, target in targets.items():
        basis = principal_basis(target.module.weight, 0.6).double()
        true, rebuilt = (measured.gradient(name) for measured in (exact, sketched))
        assert true is not None and rebuilt is not None
        outside = true.double() - true.double() @ basis @ basis.T
        seen = rebuilt.double() - rebuilt.double() @ basis @ basis.T
        directions = torch.linalg.svd(seen).Vh[:rank].T
        best = torch.linalg.svdvals(outside)[:rank].square().sum()
        shares.append(float((outside @ directions).square().sum() / best))
    assert min(shares) >= 0.95
    assert statistics.median(shares) >= 0.99
