"""Counts of one playground stage that do not depend on the machine, against a committed baseline.

    python scripts/bench/operation_counts.py             # compare; exit code 1 if one grew by more than 5 percent
    python scripts/bench/operation_counts.py --update    # write the baseline, when a count was changed on purpose

Two ranks under ZeRO-2 run stages 0 and 1 on a few samples of the first task. Counted over both ranks: floating point
operations of matrix products by step (other kernels depend on the version of torch), decompositions, bytes given to
collectives by kind, loads of the model, calls of torch's operators by step, which on a GPU are kernel launches (views
launch none and are left out); and bytes of the tensors stored. Calls are compared under the baseline's version of torch
alone, because versions take one operation apart in different ways.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[2]
BASELINE = ROOT / "tests" / "golden" / "operation_counts.json"
TOLERANCE = 1.05
_RANKS = 2
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution")
_COLLECTIVES = {
    # name -> place of the tensor that is sent
    "reduce": 0,
    "all_reduce": 0,
    "broadcast": 0,
    "all_gather_into_tensor": 1,
    "reduce_scatter_tensor": 1,
}
_DECOMPOSITIONS = ("eigh", "svd", "qr")
_CALLS = "calls."
_TORCH = "torch"


def build_run(folder: Path) -> None:
    """Writes a run directory: 16 training samples and 8 questions of the playground's first task."""
    from llava_cl.config import load_config
    from llava_cl.store import RunDirectory

    source = load_config(ROOT / "configs" / "runs" / "playground_ucit_keeplora.yaml")
    task = source.benchmark.tasks[0]
    folder.mkdir(parents=True, exist_ok=True)
    for name, path, count in (("train", task.train, 16), ("test", task.test, 8)):
        records = json.loads((source.data_root / str(path)).read_text())[:count]
        (folder / f"{name}.json").write_text(json.dumps(records))
    (folder / "images").symlink_to(source.data_root / task.images)
    few = task.model_copy(update={"train": "train.json", "test": "test.json", "images": "images", "validation": None})
    config = source.model_copy(
        update={
            "data_root": folder,
            "benchmark": source.benchmark.model_copy(update={"tasks": (few,), "probes": ()}),
            "training": source.training.model_copy(update={"epochs": 1}),
            "measurement": source.measurement.model_copy(update={"ratio": 1.0, "batch_size": 8}),
            "evaluation": source.evaluation.model_copy(update={"max_new_tokens": 1}),
        }
    )
    content = {"config": config.model_dump(mode="json"), "identity": {}, "base": {"sha256": ""}, "data": {}}
    RunDirectory(folder / "run", [task.name]).record(content)


def count_on_rank(folder: Path) -> None:
    """One rank: runs both stages with everything counted; rank 0 writes `counts.json`."""
    counts: collections.Counter[str] = collections.Counter()
    # DeepSpeed takes hold of the collectives when it starts.
    for name, place in _COLLECTIVES.items():
        setattr(dist, name, _counted(getattr(dist, name), lambda *args, p=place, n=name: _sent(counts, n, args[p])))
    for name in _DECOMPOSITIONS:
        original = getattr(torch.linalg, name)
        setattr(torch.linalg, name, _counted(original, lambda *_, n=name: counts.update({f"decompositions.{n}": 1})))

    from llava_cl.distributed import gather_objects, init_world, shutdown
    from llava_cl.models.vision_language import VisionLanguageFamily
    from llava_cl.pipeline import stage as stages
    from llava_cl.pipeline.job import Job, recorded_config
    from llava_cl.pipeline.progress import ProgressWriter
    from llava_cl.store import RunDirectory

    VisionLanguageFamily.load = _counted(  # type: ignore[method-assign]
        VisionLanguageFamily.load, lambda *_: counts.update({"model_loads": 1})
    )
    for steps in (stages._LEARNING, stages._EVALUATION):
        for name, step in steps.items():
            steps[name] = _flops(counts, name, step)
    config = recorded_config(folder / "run")
    world = init_world(use_deepspeed=True)
    run = RunDirectory(folder / "run", [task.name for task in config.benchmark.tasks])
    job = Job(config, run, world, ProgressWriter(None))
    for number in (0, 1):
        stages.run_stage(job, number)
    total: collections.Counter[str] = collections.Counter()
    for part in gather_objects(dict(counts), world):
        total.update(part)
    if world.is_main:
        for number in (0, 1):
            files = run.stage(number).path.rglob("*.safetensors")
            total[f"stored_bytes.stage_{number}"] = sum(file.stat().st_size for file in files)
        (folder / "counts.json").write_text(json.dumps(dict(total)))
    shutdown()


def _counted(function: Callable[..., Any], count: Callable[..., None]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        count(*args, *kwargs.values())
        return function(*args, **kwargs)

    return call


def _sent(counts: collections.Counter[str], name: str, tensor: torch.Tensor) -> None:
    counts[f"bytes_sent.{name}"] += tensor.numel() * tensor.element_size()


def _flops(counts: collections.Counter[str], name: str, step: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        counter = FlopCounterMode(display=False)
        with counter, _Calls(counts, name):
            made = step(*args)
        for operation, flops in counter.get_flop_counts().get("Global", {}).items():
            if str(operation).rpartition(".")[2] in _PRODUCTS:
                counts[f"flops.{name}"] += flops
        return made

    return call


class _Calls(TorchDispatchMode):
    """Counts the operators that a step calls."""

    def __init__(self, counts: collections.Counter[str], step: str) -> None:
        super().__init__()
        self._counts, self._name = counts, f"{_CALLS}{step}"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self._counts[self._name] += 1
        return func(*args, **(kwargs or {}))


def measure_counts(folder: Path) -> dict[str, int]:
    """Runs the ranks in an empty folder and returns what they counted.

    Raises:
        RuntimeError: a rank failed; the message ends with what it printed.
    """
    build_run(folder)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(_RANKS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launcher, __file__, "--rank", str(folder)], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the ranks failed:\n{done.stderr[-8000:]}")
    return dict(sorted(json.loads((folder / "counts.json").read_text()).items()))


def comparable(counts: dict[str, int], baseline: dict[str, Any]) -> dict[str, int]:
    """The counts that the baseline can be compared with under this version of torch."""
    alike = baseline[_TORCH] == torch.__version__.partition("+")[0]
    return {name: value for name, value in counts.items() if alike or not name.startswith(_CALLS)}


def grown(counts: dict[str, int], baseline: dict[str, Any]) -> list[str]:
    """One sentence for each comparable count that is more than 5 percent above the baseline's, or that it lacks."""
    return [
        f"{name}: {value:,}, the baseline has {baseline.get(name, 0):,}"
        for name, value in comparable(counts, baseline).items()
        if value > TOLERANCE * baseline.get(name, 0)
    ]


def main() -> int:
    """Compares with the baseline, or writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the baseline")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        count_on_rank(arguments.rank)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        counts = measure_counts(Path(folder) / "counts")
    if arguments.update:
        content = {_TORCH: torch.__version__.partition("+")[0], **counts}
        BASELINE.write_text(json.dumps(content, indent=1) + "\n")
        return 0
    baseline = json.loads(BASELINE.read_text())
    for name, value in comparable(counts, baseline).items():
        print(f"{name:<40} {value:>16,} {value / max(baseline.get(name, 0), 1) - 1:+8.1%}")
    problems = grown(counts, baseline)
    print("\n".join(problems) or "nothing grew")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
