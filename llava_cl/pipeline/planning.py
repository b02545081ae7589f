"""What a run will need, before it starts: memory of a rank in each step, disk, and time.

Weights, sums, optimizer state and files follow from shapes; activations are those of a batch of the longest
samples (see `llava_cl.pipeline.activations`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil
import torch

from llava_cl.config import AnyTask, ClassTaskConfig, RunConfig
from llava_cl.distributed import World, gather_objects
from llava_cl.methods import Methods
from llava_cl.pipeline.activations import Size, Step, batch_size, task_size, try_batch
from llava_cl.pipeline.duration import predict_seconds
from llava_cl.pipeline.measuring import TIMES, sums_to_measure
from llava_cl.pipeline.samples import Samples, chosen_targets, samples_of
from llava_cl.training.deepspeed_file import deepspeed_config, zero_stage
from llava_cl.training.sums import device_bytes, host_bytes

_SPARE = 1.1
"""A prediction may be too low by a tenth."""


@dataclass(frozen=True)
class Shapes:
    """What memory and files follow from.

    Attributes:
        width: bytes of an element of the base model.
        weights: bytes of the base model.
        merged: bytes of the model in measuring and evaluating.
        targets: `(out, in)` of each adapted linear.
        inputs: features of each distinct input of the adapted linears.
        frozen, adapters, beside: elements of adapters that stay as they are, of those that are trained, and of the
            module that is trained beside them.
        cache: bytes of a token's keys and values; 0 for a model that does not generate.
        sums: bytes of the fp32 sums that a device holds while statistics are measured.
        host_sums: bytes of those that a rank keeps in host memory meanwhile, where that is not the device's.
    """

    width: int
    weights: int
    merged: int
    targets: tuple[tuple[int, int], ...]
    inputs: tuple[int, ...]
    frozen: int
    adapters: int
    beside: int
    cache: int
    sums: int
    host_sums: int

    @classmethod
    def of(cls, config: RunConfig, samples: Samples) -> Shapes:
        """Those of a run; of its model only `config.json` and the tokenizer are read."""
        skeleton: Any = samples.family.skeleton()
        samples.prepare(skeleton)
        named = chosen_targets(config, samples.family, skeleton)
        targets = named.values()
        width, merged = (
            torch.empty((), dtype=getattr(torch, config.model.dtype_in(step))).element_size()
            for step in ("train", "evaluate")
        )
        parameters = sum(parameter.numel() for parameter in skeleton.parameters())
        a, b = (
            config.lora.rank * sum(sizes)
            for sizes in (
                (target.module.in_features for target in targets),
                (target.module.out_features for target in targets),
            )
        )
        place = config.measurement.sums
        if place == "host" and not torch.cuda.is_available():
            place = "device"  # it is the same memory
        train_a = Methods(config.method).train_a
        beside = samples.beside(1)
        cache = 0
        if skeleton.can_generate():
            text = skeleton.config.get_text_config()
            head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
            cache = 2 * text.num_hidden_layers * text.num_key_value_heads * head * merged
        planned = [sums_to_measure(config, named, when) for when in TIMES]
        return cls(
            width=width,
            weights=width * parameters,
            merged=merged * parameters,
            targets=tuple((target.module.out_features, target.module.in_features) for target in targets),
            inputs=tuple({target.source: target.module.in_features for target in targets}.values()),
            frozen=0 if train_a else a,
            adapters=a + b if train_a else b,
            beside=sum(p.numel() for p in skeleton.get_submodule(beside.name).parameters()) if beside else 0,
            cache=cache,
            sums=max(device_bytes(sums, place) for sums in planned),
            host_sums=max(map(host_bytes, planned)) if place == "host" else 0,
        )

    def moments(self) -> int:
        """Bytes of one fp32 second moment for each input."""
        return sum(4 * features**2 for features in self.inputs)


def _wanted(config: RunConfig) -> frozenset[str]:
    methods = Methods(config.method)
    return methods.wanted("before") | methods.wanted("after")


def training_bytes(config: RunConfig, shapes: Shapes, ranks: int, device: torch.device) -> dict[str, int]:
    """What one of `ranks` ranks holds in training beside weights and activations, in bytes, under its ZeRO stage."""
    deepspeed = deepspeed_config(config.distributed.deepspeed, device)
    stage = zero_stage(deepspeed)
    # Adapters are fp32 without DeepSpeed, which keeps fp32 copies of all that is trained.
    width = shapes.width if deepspeed else 4
    trained = width * shapes.adapters + shapes.width * shapes.beside
    copies = 12 * (shapes.adapters + shapes.beside) // (ranks if stage else 1)
    # DDP's buckets hold the gradients once more.
    gradients = trained // ranks if stage >= 2 else trained * (2 if ranks > 1 and not deepspeed else 1)
    return {
        "adapters": (trained + width * shapes.frozen) // (ranks if stage == 3 else 1),
        "gradients": gradients,
        "optimizer": copies if deepspeed else 2 * trained,
    }


def least_memory(config: RunConfig, shapes: Shapes, ranks: int) -> int:
    """Bytes that a rank surely needs: the larger of measuring and training, without activations."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = sum(training_bytes(config, shapes, ranks, device).values())
    return max(shapes.merged + shapes.sums, shapes.weights + trained)


def host_memory_problems(shapes: Shapes, local_ranks: int) -> list[str]:
    """What is wrong where this host's free memory does not hold the sums of its `local_ranks` ranks."""
    need, free = local_ranks * shapes.host_sums, psutil.virtual_memory().available
    if need <= free:
        return []
    return [
        f"measurement.sums: 'host' takes {need / 1e9:.1f} GB of host memory for {local_ranks} ranks, "
        f"{free / 1e9:.1f} GB are free; give how many GB may lie on a GPU instead, or use fewer ranks on the machine."
    ]


def predict_memory(
    config: RunConfig, samples: Samples, size: Size, *, ranks: int, device: torch.device, recompute: bool | None = None
) -> dict[Step, dict[str, int]]:
    """Step -> what a rank holds in it -> bytes, at its largest moment.

    The process takes more: its libraries, and on a GPU the context.

    Args:
        config: the run's configuration.
        samples: its samples.
        size: the longest sample.
        ranks: ranks of the whole job.
        device: where it computes.
        recompute: layers are computed again in backward; default as configured, and not where that says "auto".
    """
    again = config.training.gradient_checkpointing is True if recompute is None else recompute
    shapes = Shapes.of(config, samples)
    weights = {"weights": shapes.merged}
    shards = ranks if zero_stage(deepspeed_config(config.distributed.deepspeed, device)) == 3 else 1
    held: dict[Step, dict[str, int]] = {
        "measure": {**weights, "sums": shapes.sums},
        "train": {"weights": shapes.weights // shards, **training_bytes(config, shapes, ranks, device)},
        "evaluate": dict(weights),
    }
    if not _wanted(config) - {"adapter"}:
        del held["measure"]
    if shapes.cache:
        tokens = size.length + config.evaluation.max_new_tokens
        held["evaluate"]["keys and values"] = shapes.cache * batch_size(config, "evaluate", ranks) * tokens
    for step, parts in held.items():
        cost = try_batch(
            config, samples, step, size, ranks=ranks, device=device, recompute=again and step != "evaluate"
        )
        parts["activations"] = cost.bytes
    return held


def recomputes(config: RunConfig, samples: Samples, task: AnyTask, world: World) -> bool:
    """Whether training computes layers again in backward: as configured, or if any rank's GPU is short of memory.

    Call it on all ranks, when the model has been loaded.
    """
    setting, device = config.training.gradient_checkpointing, world.device
    if setting != "auto" or device.type != "cuda":
        return setting is True
    size, shapes = task_size(config, samples, task).longest, Shapes.of(config, samples)
    need = try_batch(config, samples, "train", size, ranks=world.size, device=device).bytes
    need += sum(training_bytes(config, shapes, world.size, device).values())
    if zero_stage(deepspeed_config(config.distributed.deepspeed, device)) == 3:
        # The model is still in host memory.
        need += shapes.weights // world.size
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _SPARE * need > min(gather_objects(free, world))


def predict_disk(config: RunConfig, shapes: Shapes) -> dict[str, int]:
    """What a run's tensors take on disk at the most, in bytes; its other files are small."""
    stages = len(config.benchmark.tasks)
    # Both factors are stored in fp32, whichever is trained.
    adapter, beside = 4 * (shapes.frozen + shapes.adapters), 4 * shapes.beside
    # Where A is trained, what an adapter started from may be stored with it.
    stored = adapter if shapes.frozen else 2 * adapter
    parts = {
        "adapters": stages * (stored + beside),
        "their start": stages * adapter,
        # Columns that need not be independent can be more than full.
        "bases, if they grew full": sum(
            4 * features * max(features, stages * config.lora.rank) for _, features in shapes.targets
        ),
    }
    if config.training.checkpoint_every:
        # A resume point holds what is trained with its two moments, and the next is written before it goes.
        parts["resume points"] = 6 * (adapter + beside)
    if "past_moment" in Methods(config.method).wanted("after"):
        parts["running moments"] = stages * shapes.moments()
    return parts


@dataclass(frozen=True)
class Needs:
    """What a run will need.

    Attributes:
        ranks: of the whole job.
        size: the longest sample, in tokens.
        memory: step -> part -> bytes of a rank.
        disk: part -> bytes, at the most.
        seconds: step -> seconds of all stages together, an estimate; None if data sizes are not known.
        problems: what this host's memory does not hold, one sentence each.
    """

    ranks: int
    size: Size
    memory: dict[Step, dict[str, int]]
    disk: dict[str, int]
    seconds: dict[Step, float] | None
    problems: list[str]

    @classmethod
    def of(cls, config: RunConfig, ranks: int, local_ranks: int) -> Needs:
        """Those of a run on `ranks` ranks, of which `local_ranks` on this host.

        It needs the model's configuration, not its weights or data.

        Raises:
            InputError: a model whose configuration cannot be read.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = _with_class_names(config)
        samples = samples_of(config)
        sizes = [task_size(config, samples, task) for task in config.benchmark.tasks]
        longest = max(size.longest for size in sizes)
        shapes = Shapes.of(config, samples)
        return cls(
            ranks=ranks,
            size=longest,
            memory=predict_memory(config, samples, longest, ranks=ranks, device=device),
            disk=predict_disk(config, shapes),
            seconds=predict_seconds(config, samples, sizes, ranks=ranks, device=device),
            problems=host_memory_problems(shapes, local_ranks),
        )


def _with_class_names(config: RunConfig) -> RunConfig:
    """The configuration with made-up names for class folders that are not there: only how many counts."""

    def named(task: AnyTask) -> AnyTask:
        if not isinstance(task, ClassTaskConfig):
            return task
        classes = range(task.classes) if isinstance(task.classes, int) else task.classes
        names = tuple(name if isinstance(name, str) else f"{task.name} {name}" for name in classes)
        return task.model_copy(update={"classes": names})

    return config.model_copy(update={"benchmark": config.benchmark.with_each(named)})
