"""One stage's training on a tiny model, as a rank runs it, for the tests of training and resuming."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from llava_cl.config import MethodConfig, RunConfig, validate_config
from llava_cl.data import collate_train
from llava_cl.distributed import World
from llava_cl.methods import LoraFactors, build_method
from llava_cl.models import LinearTarget, family
from llava_cl.stopping import Stopped, StopRequest
from llava_cl.training.adapters import attach, collect, trained_a
from llava_cl.training.deepspeed_file import deepspeed_config
from llava_cl.training.statistics import saves_memory
from llava_cl.training.trainer import TrainingPlan, train
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
        stop_at: the optimizer step in which the last rank alone is asked to stop.
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
    poison: bool = False

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

    def progress(done: int, total: int) -> None:
        steps.append((done, total))
        if done == job.die_at:
            os._exit(1)
        # The signal of a cluster reaches ranks at different times.
        stop.asked |= done == job.stop_at and world.rank == world.size - 1

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tensors = collate_train(batch, PAD_ID)
        del tensors["index"]
        return tensors

    try:
        trained = train(
            adapted,
            SampleDataset(samples),
            lengths,
            collate,
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
        return Trained([], {}, start, factors, steps, stopped=True)
    assert saves_memory(adapted) is (config.training.gradient_checkpointing is True)
    buffers = {name: buffer.dtype for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    tensors = collect(adapted, factors, projector, train_a=job.train_a)
    return Trained(trained.rows, tensors, start, factors, steps, autocast=any(autocast), buffers=buffers)


def _penalty(
    job: TrainingJob, adapted: PeftModel, factors: dict[str, LoraFactors]
) -> Callable[[], torch.Tensor] | None:
    if job.penalty is None:
        return None
    method = build_method(MethodConfig(name="olora", options={"penalty": job.penalty}))
    earlier, trained = job.earlier_rows(factors), trained_a(adapted, factors)
    return lambda: torch.stack([method.penalty(a, earlier.get(name)).float() for name, a in trained.items()]).sum()
