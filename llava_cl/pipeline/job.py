"""What the steps of a stage share: configuration, run directory, process group, samples, loaded models."""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llava_cl.config import RunConfig, validate_config
from llava_cl.distributed import World, gather_objects, share_out, share_tensors
from llava_cl.errors import InputError
from llava_cl.methods import Methods
from llava_cl.models import LinearTarget, ModelFamily, family
from llava_cl.pipeline.memory import peak_memory, reset_peak
from llava_cl.pipeline.progress import ProgressWriter
from llava_cl.pipeline.samples import Samples, chosen_targets, samples_of
from llava_cl.stopping import StopRequest
from llava_cl.store import RunDirectory, StageDirectory
from llava_cl.training.adapters import replay
from llava_cl.training.deepspeed_file import deepspeed_config, zero_stage

_CHANGED = -1
"""In place of a number of stages: the weights are of none."""


def recorded_config(run: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """The configuration that a run directory records.

    Raises:
        InputError: the directory holds no run, or its record is damaged.
    """
    directory = RunDirectory(run, ())
    if not directory.manifest.is_file():
        raise InputError(f"{run}: holds no run.json; give the directory of a run.")
    return validate_config(directory.recorded("config")["config"], str(directory.manifest), overrides)


@dataclass
class Job:
    """One process of a distributed job that works on stages of a run."""

    config: RunConfig
    run: RunDirectory
    world: World
    progress: ProgressWriter
    stop: StopRequest = field(default_factory=StopRequest)
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    """This rank's peak memory in bytes of every part that `seconds` has, where it can be told apart."""
    loads: int = 0
    """How often the checkpoint was read, since `take_cost`."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What else is recorded with the step under way."""

    def __post_init__(self) -> None:
        self.samples: Samples = samples_of(self.config)
        self.family: ModelFamily = self.samples.family
        self.methods = Methods(self.config.method)
        self.deepspeed = deepspeed_config(self.config.distributed.deepspeed, self.world.device)
        self._resident: PreTrainedModel | None = None
        self._dtype: str = self.config.model.dtype
        self._stages = _CHANGED
        self._latest = 0
        self._base: dict[str, torch.Tensor] | None = None
        self._emptied: PreTrainedModel | None = None
        self._peak = 0

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Adds the block's seconds to `seconds[part]` and takes its peak into `memory[part]`; blocks are not nested."""
        self._peak = max(self._peak, peak_memory(self.world.device))
        apart = reset_peak(self.world.device)
        begin = time.monotonic()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - begin
            if apart:
                self.memory[part] = max(self.memory.get(part, 0), peak_memory(self.world.device))

    def take_cost(self) -> dict[str, Any]:
        """Seconds, memory, loads and facts since the last call, and the peak memory so far in bytes.

        Memory is that of the rank that takes the most.
        """
        self._peak = max(self._peak, peak_memory(self.world.device))
        ranks = gather_objects((self._peak, self.memory), self.world)
        memory = largest(of_rank for _, of_rank in ranks)
        cost: dict[str, Any] = {"seconds": dict(self.seconds), "step_memory_bytes": memory, "loads": self.loads}
        cost["peak_memory_bytes"] = max(peak for peak, _ in ranks)
        cost |= self.facts
        self.seconds.clear()
        self.memory.clear()
        self.facts.clear()
        self.loads = 0
        return cost

    def decide(self, decision: bool) -> bool:
        """Rank 0's decision, on every rank; only rank 0 needs to look at the files."""
        return bool(gather_objects(decision, self.world)[0])

    def load_model(self, stages: int) -> PreTrainedModel:
        """The model as it is after `stages` stages, of its own: the base and the stored adapters of stages 1..stages.

        Raises:
            InputError: a checkpoint or adapter that is damaged or does not fit.
        """
        model = self._read(self.config.model.dtype)
        if stages:
            self._replay(model, stages)
        return model

    def model_after(self, stages: int, *, to_learn: bool = False) -> PreTrainedModel:
        """The model after `stages` stages, on the weights that stay with the job: they must not be written to.

        The checkpoint is read once, and again for an earlier stage than before. From one stage to a later one the
        weights that training writes to are put together again from those of the base, of which each rank keeps those
        it owns in host memory where a task is `to_learn`, so that they are the same as in a job that begins there.

        Where `model.merged_dtype` is another one than training has, neither is made from the other: the checkpoint is
        read before training and after it.

        Raises:
            InputError: as `load_model`.
        """
        dtype = self.config.model.dtype_in("evaluate")
        return self._model_after(stages, dtype, to_learn and dtype == self.config.model.dtype)

    def _model_after(self, stages: int, dtype: str, to_learn: bool) -> PreTrainedModel:
        with self.timed("load"):
            if stages < self._latest or dtype != self._dtype:
                self._resident = self._emptied = self._base = None
            self._dtype = dtype
            gc.collect()
            if self._emptied is not None:
                self._resident, self._emptied = self._filled(self._emptied), None
            elif self._resident is None or (self._base is None and (to_learn or self._stages != stages)):
                self._resident = self._base = None
                self._resident = self._read(dtype)
                self._base = self._owned_weights(self._resident) if to_learn else None
                self._stages = 0
            elif self._stages not in (0, stages):
                self._restore(self._resident)
            if self._stages != stages:
                self._stages = _CHANGED
                self._replay(self._resident, stages)
            self._stages = self._latest = stages
            if not to_learn:
                self._base = None
        return _with_weights(self._resident, lambda weight: weight.detach())

    def model_to_train(self, stages: int) -> PreTrainedModel:
        """The model after `stages` stages, whose adapted weights may be written to.

        ZeRO-3 takes its model apart when its engine starts, so it gets the job's own, in host memory until then.
        """
        model = self._model_after(stages, self.config.model.dtype, to_learn=True)
        self._stages = _CHANGED
        if self._taken_apart:
            self._emptied = _with_weights(model, lambda weight: torch.empty_like(weight, device="meta"))
            self._resident = None
            return model.to("cpu")  # type: ignore[arg-type]
        return model

    @property
    def _taken_apart(self) -> bool:
        return zero_stage(self.deepspeed) == 3

    def _read(self, dtype: str) -> PreTrainedModel:
        """The base model, with what the stream's tasks need."""
        self.loads += 1
        settings = self.config.model
        kind = self.family if dtype == settings.dtype else family(settings.model_copy(update={"dtype": dtype}))
        model = kind.load(self.world.device)
        self.samples.prepare(model)
        return model

    def _owned_weights(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Of the weights that training writes to, those that this rank keeps."""
        owners = self._weight_owners(model)
        return {
            name: weight.detach().to("cpu", copy=True)
            for name, weight in model.named_parameters()
            if owners.get(name) == self.world.rank
        }

    def _weight_owners(self, model: PreTrainedModel) -> dict[str, int]:
        """Owner ranks of the adapted weights, with ZeRO-3 of all."""
        owners = self.owners(model)
        adapted = {f"{name}.weight": owners[name] for name in self.targets(model)}
        if not self._taken_apart:
            return adapted
        sizes = {name: float(weight.numel()) for name, weight in model.named_parameters() if name not in adapted}
        return {**share_out(sizes, self.world.size), **adapted}

    def _filled(self, emptied: PreTrainedModel) -> PreTrainedModel:
        """A model without values, with those of the base that the ranks have kept, the adapted weights excepted."""
        model = _with_weights(emptied, lambda weight: torch.empty_like(weight, device=self.world.device))
        self._restore(model)
        adapted = {f"{name}.weight" for name in self.targets(model)}
        others = {name: weight for name, weight in model.named_parameters() if name not in adapted}
        share_tensors(others, self._weight_owners(model), self.world)
        return model

    def _restore(self, model: PreTrainedModel) -> None:
        """Puts the weights of the base back that this rank has kept."""
        assert self._base is not None
        weights = dict(model.named_parameters())
        for name, value in self._base.items():
            weights[name].data.copy_(value)

    def _replay(self, model: PreTrainedModel, stages: int) -> None:
        """Gives a model the adapters; each rank does the sums of its layers, where it needs the base's weights."""
        owners, targets = self.owners(model), self.targets(model)
        mine = {name for name in targets if owners[name] == self.world.rank} if self.world.size > 1 else None
        replay(model, [self.run.stage(number).adapter for number in range(1, stages + 1)], mine)
        share_tensors({name: target.module.weight for name, target in targets.items()}, owners, self.world)

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

    def stage(self, number: int) -> StageDirectory:
        """The directory of a stage."""
        return self.run.stage(number)


def largest(memories: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The largest value of each key."""
    most: dict[str, int] = {}
    for memory in memories:
        for part, value in memory.items():
            most[part] = max(most.get(part, 0), value)
    return most


def _with_weights(model: PreTrainedModel, make: Callable[[nn.Parameter], torch.Tensor]) -> PreTrainedModel:
    """A model whose modules, settings and parameter objects are its own, and whose weights are made from `model`'s.

    What training does to a model, such as hooks, wrapped modules and settings, is gone with it.
    """
    shared: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    shared |= {id(p): nn.Parameter(make(p), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, shared)
