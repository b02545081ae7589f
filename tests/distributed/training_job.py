"""One stage's training on a tiny model, as a rank runs it, for the tests of training and resuming."""

from __future__ import annotations

import dataclasses
import functools
import gc
import multiprocessing
import multiprocessing.connection
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from llava_cl.config import MethodConfig, RunConfig, validate_config
from llava_cl.data import collate_train
from llava_cl.distributed import World
from llava_cl.methods import LoraFactors, build_method
from llava_cl.models import LinearTarget, family
from llava_cl.stopping import Stopped, StopRequest
from llava_cl.training.adapters import attach, collect, trained_a
from llava_cl.training.deepspeed_file import deepspeed_config
from llava_cl.training.statistics import saves_memory
from llava_cl.training.trainer import StageTrainer, TrainingPlan, train
from tiny import run_content
from tiny_samples import PAD_ID, SampleDataset, build_samples

DEEPSPEED = Path(__file__).parents[2] / "configs" / "deepspeed"


@dataclasses.dataclass(frozen=True)
class TrainingJob:
    """What is trained and how.

    Attributes:
        run: folder of the tiny run; read only.
        scratch: folder of the resume points.
        kinds: samples, see `tiny_samples.build_samples`. The default leaves 5 for the third global batch of 8.
        zero: ZeRO stage, or None for DDP.
        training: changes to the run's training section.
        train_a: train A as well.
        gradient_b: start B from random values in place of zero.
        penalty: weight of O-LoRA's penalty on the overlap with `earlier_rows`, or None for none.
        dropout: of the adapters' inputs.
        die_at: the optimizer step at whose end every rank dies, as by a kill.
        stop_at: the optimizer step in which the job is asked to stop.
        asked: how: the last rank alone in its own process, all ranks by the file, or every process by a signal of that
            number with the file.
        start_method: how processes that read data are started.
        poison: make the model's weights yield a loss that is not a number.
    """

    run: Path
    scratch: Path
    kinds: str = "itiiittiiitiiinittiii"
    zero: int | None = None
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    train_a: bool = False
    gradient_b: bool = False
    penalty: float | None = None
    dropout: float = 0.0
    dtype: str = "float32"
    die_at: int | None = None
    stop_at: int | None = None
    asked: Literal["rank", "file"] | int = "rank"
    start_method: str = "fork"
    poison: bool = False

    @property
    def stop_file(self) -> Path:
        """What asks the ranks to stop."""
        return self.scratch.with_name(f"{self.scratch.name}-stop")

    def config(self) -> RunConfig:
        """The run's configuration."""
        content = run_content(self.run)
        content["model"]["dtype"] = self.dtype
        content["training"].update({"projector_learning_rate": 2e-3, "warmup_ratio": 0.0, **self.training})
        content["lora"] = {"rank": 3, "alpha": 6, "dropout": self.dropout}
        return validate_config(content, "test")

    def factors(self, targets: dict[str, LinearTarget]) -> dict[str, LoraFactors]:
        """Random factors, as if derived from data: no seed that the Trainer sets gives them again."""
        generator = torch.Generator().manual_seed(1234)
        factors = {}
        for name, target in targets.items():
            a = torch.randn(3, target.module.in_features, generator=generator) / target.module.in_features**0.5
            b = torch.randn(target.module.out_features, 3, generator=generator) * 0.05
            factors[name] = LoraFactors(a, b if self.gradient_b else torch.zeros_like(b))
        return factors

    def earlier_rows(self, factors: dict[str, LoraFactors]) -> dict[str, torch.Tensor]:
        """The rows of A of two earlier tasks as columns, for all layers but the first."""
        generator = torch.Generator().manual_seed(99)
        return {
            name: torch.randn(start.a.shape[1], 6, generator=generator) / start.a.shape[1] ** 0.5
            for name, start in list(factors.items())[1:]
        }


@dataclasses.dataclass
class Trained:
    """What a rank saw: the log's rows, the collected tensors, their start, and steps reported."""

    rows: list[dict[str, float]]
    tensors: dict[str, torch.Tensor]
    projector: dict[str, torch.Tensor]
    factors: dict[str, LoraFactors]
    progress: list[tuple[int, int]]
    whole_afterwards: bool = False
    autocast: bool = False
    buffers: dict[str, torch.dtype] = dataclasses.field(default_factory=dict)
    stopped: bool = False
    frozen_read: set[str] = dataclasses.field(default_factory=set)
    """Operations that read frozen weights while a resume point was written."""


def run_training(world: World, job: TrainingJob) -> Trained:
    """Trains as the pipeline does, which afterwards loads a model in the same process."""
    trained = _train(world, job)
    gc.collect()
    model = family(job.config().model).load(world.device)
    whole = not any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    return dataclasses.replace(trained, whole_afterwards=whole)


def _train(world: World, job: TrainingJob) -> Trained:
    config = job.config()
    llava = family(config.model)
    model = llava.load(world.device)
    if job.poison:
        model.lm_head.weight.fill_(torch.nan)
    factors = job.factors(llava.linear_targets(model))
    connector = llava.projector_prefix()
    assert connector is not None
    start = {name: p.detach().clone() for name, p in model.get_submodule(connector).named_parameters()}
    projector = connector if config.training.projector_learning_rate else None
    deepspeed = deepspeed_config(DEEPSPEED / f"zero{job.zero}.json" if job.zero else None, world.device)
    if job.zero == 3:
        # The factors are so small that they would stay whole on every rank.
        deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    adapted = attach(
        model,
        factors,
        config.lora,
        train_a=job.train_a,
        projector=projector,
        fp32_adapters=deepspeed is None,
    )
    samples = build_samples(job.kinds)
    lengths = [len(s["input_ids"]) if "pixel_values" in s else -len(s["input_ids"]) for s in samples]
    steps: list[tuple[int, int]] = []
    stop = StopRequest()
    autocast: list[bool] = []
    model.lm_head.register_forward_hook(lambda *_: autocast.append(torch.is_autocast_enabled("cpu")))
    if job.asked != "rank":
        stop.listen(job.stop_file, before_end=lambda: None, command=None)
    multiprocessing.set_start_method(job.start_method, force=True)
    frozen_read = _watch_saving(adapted)

    def progress(done: int, total: int) -> None:
        steps.append((done, total))
        if done == job.die_at:
            os._exit(1)
        if done == job.stop_at and job.asked == "rank":
            # What asks may reach ranks at different times.
            stop.asked = world.rank == world.size - 1
        elif done == job.stop_at:
            _ask(job, stop)

    try:
        trained = train(
            adapted,
            SampleDataset(samples),
            lengths,
            functools.partial(collate_train, pad_id=PAD_ID),
            config,
            TrainingPlan.of(
                config,
                1,
                seed=7,
                beside_learning_rate=config.training.projector_learning_rate,
                recompute=config.training.gradient_checkpointing is True,
            ),
            deepspeed=deepspeed,
            world=world,
            folder=job.scratch,
            progress=progress,
            penalty=_penalty(job, adapted, factors),
            stop=stop,
            ids=[f"sample-{index}" for index in range(len(samples))],
        )
    except Stopped:
        return Trained([], {}, start, factors, steps, stopped=True, frozen_read=frozen_read)
    assert saves_memory(adapted) is (config.training.gradient_checkpointing is True)
    buffers = {name: buffer.dtype for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    tensors = collect(adapted, factors, projector, train_a=job.train_a)
    return Trained(trained.rows, tensors, start, factors, steps, autocast=any(autocast), buffers=buffers)


class _Reads(TorchDispatchMode):
    """Collects the operations that read any of some storages, but for those that only look at them in another way."""

    def __init__(self, storages: set[int], found: set[str]) -> None:
        super().__init__()
        self._storages = storages
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        used = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        if used & self._storages and not func.is_view:
            self._found.add(str(func))
        return func(*args, **(kwargs or {}))


def _watch_saving(adapted: PeftModel) -> set[str]:
    """What reads the frozen weights while the trainer writes a resume point; filled as it happens."""
    found: set[str] = set()
    save = StageTrainer._save_checkpoint

    def watched(trainer: StageTrainer, *args: Any) -> None:
        frozen = [getattr(p, "ds_tensor", p) for p in adapted.parameters() if not p.requires_grad]
        assert len(frozen) > 10
        with _Reads({tensor.untyped_storage()._cdata for tensor in frozen}, found):
            save(trainer, *args)

    StageTrainer._save_checkpoint = watched  # type: ignore[method-assign]
    return found


def _ask(job: TrainingJob, stop: StopRequest) -> None:
    """As a cluster does, a process that is none of ours signals this one and those that read data for it."""
    readers = multiprocessing.active_children()
    assert len(readers) == job.config().training.workers
    if isinstance(job.asked, int):
        pids = [os.getpid(), *(reader.pid for reader in readers)]
        subprocess.run(["kill", f"-{job.asked}", *map(str, pids)], check=True)
        died = multiprocessing.connection.wait([reader.sentinel for reader in readers], 0.3)
        assert not died, "a process that reads data has ended by the signal"
    job.stop_file.touch()
    while not stop.asked:
        time.sleep(0.01)


def _penalty(
    job: TrainingJob, adapted: PeftModel, factors: dict[str, LoraFactors]
) -> Callable[[], torch.Tensor] | None:
    if job.penalty is None:
        return None
    method = build_method(MethodConfig(name="olora", options={"penalty": job.penalty}))
    earlier, trained = job.earlier_rows(factors), trained_a(adapted, factors)
    return lambda: torch.stack([method.penalty(a, earlier.get(name)).float() for name, a in trained.items()]).sum()
