"""What one batch of a run's steps holds and computes, tried on fake tensors (see `llava_cl.training.trial`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from llava_cl.config import AnyTask, ClassTaskConfig, RunConfig
from llava_cl.methods import Methods
from llava_cl.pipeline.samples import Samples, chosen_targets
from llava_cl.training.adapters import wrap
from llava_cl.training.statistics import save_memory
from llava_cl.training.trial import Cost, keep_inputs, make_fake, start_graph, try_step

Step = Literal["measure", "train", "evaluate"]
TEXT_TOKENS, ANSWER_TOKENS = 60, 8
"""Of a sample, beside its image, where its data are not there."""


class Size(NamedTuple):
    """A sample's tokens and how many of them are supervised; of a picture to be classified both are 1."""

    length: int
    supervised: int


class TaskSize(NamedTuple):
    """Training samples of a task (None if that is not known), the longest one, and one of middle length."""

    samples: int | None
    longest: Size
    middle: Size


def task_size(config: RunConfig, samples: Samples, task: AnyTask) -> TaskSize:
    """How large a task's samples are; of data that are not there, what the benchmark says and a short question."""
    there = all((config.data_root / path).exists() for key, path in task.paths().items() if key in ("train", "images"))
    if isinstance(task, ClassTaskConfig):
        size = Size(1, 1)
        return TaskSize(len(samples.measured(task).lengths) if there else task.records.get("train"), size, size)
    if not there:
        spec: Any = samples.family.image_spec()
        size = Size(spec.tokens + TEXT_TOKENS, ANSWER_TOKENS)
        return TaskSize(task.records.get("train"), size, size)
    dataset, lengths, *_ = samples.measured(task)
    order = sorted(range(len(lengths)), key=lambda index: (abs(lengths[index]), index))
    labels = [dataset[order[place]]["labels"] for place in (-1, len(order) // 2)]
    sizes = [Size(len(each), sum(label != -100 for label in each)) for each in labels]
    return TaskSize(len(lengths), *sizes)


def batch_size(config: RunConfig, step: Step, ranks: int) -> int:
    """Samples that a rank takes at once in a step."""
    if step == "train":
        return config.training.micro_batch_for(ranks)
    return config.measurement.batch_size if step == "measure" else config.evaluation.batch_size


def try_model(config: RunConfig, samples: Samples) -> None:
    """Computes one batch on fake tensors; what the parts of a model that do not fit raise is not caught."""
    model: Any = samples.family.skeleton()
    samples.prepare(model)
    samples.choose(model, 1)
    classes = isinstance(config.benchmark.tasks[0], ClassTaskConfig)
    size, device = Size(ANSWER_TOKENS, 1), torch.device("cpu")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        make_fake(model, device)
        (_classify(model, 1, samples, device) if classes else _read(model, 1, size, "evaluate", device))()


def try_batch(
    config: RunConfig,
    samples: Samples,
    step: Step,
    size: Size,
    *,
    ranks: int,
    device: torch.device,
    recompute: bool = False,
) -> Cost:
    """Activations and operations of one batch of samples of one size.

    Args:
        config: the run's configuration.
        samples: its samples.
        step: measuring holds the adapted linears' inputs, training what adapters need, evaluating no graph.
        size: of every sample of the batch.
        ranks: ranks of the whole job.
        device: where the run computes.
        recompute: layers are computed again in backward.
    """
    model: Any = samples.family.skeleton().to(getattr(torch, config.model.dtype_in(step)))
    if config.model.attention == "eager":
        model.set_attn_implementation("eager")
    samples.prepare(model)
    samples.choose(model, 1)
    model.requires_grad_(False).eval()
    whole = model
    if recompute:
        save_memory(model)
    targets = chosen_targets(config, samples.family, model)
    if step == "train":
        beside = samples.beside(1)
        whole = wrap(
            model,
            targets,
            config.lora,
            train_a=Methods(config.method).train_a,
            projector=beside.name if beside else None,
            fp32_adapters=config.distributed.deepspeed is None,
        ).train()
    elif step == "measure":
        keep_inputs(target.module for target in targets.values())
        start_graph(samples.family.entries(model))
    count = batch_size(config, step, ranks)
    classes = isinstance(config.benchmark.tasks[0], ClassTaskConfig)
    forward = _classify(model, count, samples, device) if classes else _read(model, count, size, step, device)

    def run() -> torch.Tensor:
        with torch.set_grad_enabled(step != "evaluate"):
            return forward()

    return try_step(whole, run, device)


def _read(model: Any, count: int, size: Size, step: Step, device: torch.device) -> Callable[[], torch.Tensor]:
    """The loss of a language model, whose embeddings take the place of images and text; or a prompt's last logits."""
    embeddings = model.get_input_embeddings()
    supervised = size.supervised if step != "evaluate" else 1

    def forward() -> torch.Tensor:
        hidden = torch.zeros(count, size.length, embeddings.embedding_dim, dtype=model.dtype, device=device)
        hidden.requires_grad_(torch.is_grad_enabled())
        hidden = model.model(inputs_embeds=hidden, attention_mask=None, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, -supervised:].reshape(-1, hidden.shape[-1])).float()
        return functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=device))

    return forward


def _classify(model: Any, count: int, samples: Samples, device: torch.device) -> Callable[[], torch.Tensor]:
    """The loss of a batch of pictures."""
    side = samples.family.image_spec().size

    def forward() -> torch.Tensor:
        pixels = torch.zeros(count, 3, side, side, device=device)
        return model(pixel_values=pixels, labels=torch.zeros(count, dtype=torch.long, device=device))["loss"]

    return forward
