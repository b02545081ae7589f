"""What the steps of a stage share: configuration, run directory, process group, samples, loaded models."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from llava_cl.config import RunConfig, validate_config
from llava_cl.distributed import World, gather_objects, share_out
from llava_cl.errors import InputError
from llava_cl.methods import Methods
from llava_cl.models import LinearTarget, ModelFamily
from llava_cl.pipeline.progress import ProgressWriter
from llava_cl.pipeline.samples import Samples, chosen_targets, samples_of
from llava_cl.store import RunDirectory, StageDirectory, read_json
from llava_cl.training.adapters import replay


def recorded_config(run: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """The configuration that a run directory records.

    Raises:
        InputError: the directory holds no run, or its record is damaged.
    """
    manifest = run / "run.json"
    if not manifest.is_file():
        raise InputError(f"{run}: holds no run.json; give the directory of a run.")
    content = read_json(manifest, "config")["config"]
    if not isinstance(content, dict):
        raise InputError(f"{manifest}: field 'config': must be an object.")
    return validate_config(content, str(manifest), overrides)


@dataclass
class Job:
    """One process of a distributed job that works on stages of a run."""

    config: RunConfig
    run: RunDirectory
    world: World
    progress: ProgressWriter
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.samples: Samples = samples_of(self.config)
        self.family: ModelFamily = self.samples.family
        self.methods = Methods(self.config.method)

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Adds the seconds of the block to `seconds[part]`."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - begin

    def take_cost(self) -> dict[str, Any]:
        """Seconds of each part since the last call, and the largest peak memory of a rank so far, in bytes."""
        if self.world.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.world.device)
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        cost = {"seconds": dict(self.seconds), "peak_memory_bytes": max(gather_objects(memory, self.world))}
        self.seconds.clear()
        return cost

    def decide(self, decision: bool) -> bool:
        """Rank 0's decision, on every rank; only rank 0 needs to look at the files."""
        return bool(gather_objects(decision, self.world)[0])

    def load_model(self, stages: int, *, device: torch.device | None = None) -> PreTrainedModel:
        """The model as it is after `stages` stages: the base and the stored adapters of stages 1..stages.

        Raises:
            InputError: a checkpoint or adapter that is damaged or does not fit.
        """
        with self.timed("load"):
            gc.collect()
            model = self.family.load(device or self.world.device)
            self.samples.prepare(model)
            folders = [self.run.stage(number).adapter for number in range(1, stages + 1)]
            if folders:
                replay(model, folders)
        return model

    def targets(self, model: PreTrainedModel) -> dict[str, LinearTarget]:
        """The linears that the run adapts, by qualified name."""
        return chosen_targets(self.config, self.family, model)

    def owners(self, model: PreTrainedModel) -> dict[str, int]:
        """Owner rank of each targeted layer and of each layer input; layers with one input share the owner."""
        targets = self.targets(model)
        costs: dict[str, float] = {}
        for module, source, _ in targets.values():
            small, large = sorted((module.in_features, module.out_features))
            costs[source] = costs.get(source, 0.0) + float(large) * small * small
        owners = share_out(costs, self.world.size)
        return {**owners, **{name: owners[target.source] for name, target in targets.items()}}

    def seed(self, stage: int, purpose: str) -> int:
        """A seed that depends on the run's seed, the stage and the purpose alone."""
        text = f"{self.config.seed}/{stage}/{purpose}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") >> 1

    def to_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch on this rank's device."""
        return {key: value.to(self.world.device) for key, value in batch.items()}

    def stage(self, number: int) -> StageDirectory:
        """The directory of a stage."""
        return self.run.stage(number)
