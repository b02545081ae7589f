"""Statistics of frozen linears over a task's samples: weight gradients, input second moments and mean inputs.

The gradient of a frozen weight is captured as g^T x from the module's input x and the gradient g of its
output, by an identity function that a forward hook puts on the output. It needs no trainable base weight
and no optimizer, works under DDP and every ZeRO stage, and holds nothing extra under gradient checkpointing.
"""

from __future__ import annotations

import functools
import gc
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from llava_cl.distributed import World, all_reduce_sum, gather_objects, out_of_memory, reduce_sums
from llava_cl.errors import RunError
from llava_cl.models import LinearTarget
from llava_cl.subspace import Sketch
from llava_cl.training.collector import Collector
from llava_cl.training.sums import (
    GRADIENT,
    MEAN_INPUT,
    RANGE_SKETCH,
    ROW_SKETCH,
    SECOND_MOMENT,
    DeviceSums,
    HostSums,
    Sum,
    SumsPlace,
    passes,
    planned_sums,
)

logger = logging.getLogger(__name__)

_FP16_SCALE = 2.0**10
"""A float16 model's loss is multiplied by this before backward, and its gradients divided: small ones become zero."""

Batch = dict[str, torch.Tensor]
TokenMask = Callable[[Batch, str], torch.Tensor]
"""Which tokens of a batch count at the input of that name: bool, of the shape of the input without its last axis."""


def without_index(batch: Batch) -> Batch:
    """What the model takes of a batch."""
    return {key: value for key, value in batch.items() if key != "index"}


@dataclass
class Statistics:
    """Means over the samples of all ranks, fp32, each complete on its owner rank only.

    They are on the device, or in host memory where the sums are not all on the device.

    Attributes:
        gradients: layer -> mean over samples of dL/dW `[out, in]`, L = a sample's mean token loss; where it was not
            sketched.
        range_sketches, row_sketches: layer -> the two sketches of that mean, where it was.
        second_moments: input name -> mean over tokens of x x^T `[in, in]`.
        mean_inputs: input name -> sum over batches of the inputs, over the number of tokens, `[in, length * batch]`;
            a column is a place in the batch.
        tokens: input name -> tokens that its second moment is the mean over.
        samples: samples with at least one supervised token, over all ranks.
        skipped: samples without one, over all ranks.
        sketch: the test matrices of the sketches.
    """

    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    range_sketches: dict[str, torch.Tensor] = field(default_factory=dict)
    row_sketches: dict[str, torch.Tensor] = field(default_factory=dict)
    second_moments: dict[str, torch.Tensor] = field(default_factory=dict)
    mean_inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    samples: int = 0
    skipped: int = 0
    sketch: Sketch | None = None

    def gradient(self, layer: str) -> torch.Tensor | None:
        """The mean gradient `[out, in]` of a layer of this rank, rebuilt at every call where it was sketched."""
        if layer not in self.range_sketches:
            return self.gradients.get(layer)
        assert self.sketch is not None
        device = self.sketch.omega.device
        return self.sketch.rebuild(self.range_sketches[layer].to(device), self.row_sketches[layer].to(device))

    def of(self, kind: str) -> dict[str, torch.Tensor]:
        """The means of one kind."""
        return {
            GRADIENT: self.gradients,
            RANGE_SKETCH: self.range_sketches,
            ROW_SKETCH: self.row_sketches,
            SECOND_MOMENT: self.second_moments,
            MEAN_INPUT: self.mean_inputs,
        }[kind]


def measure(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    targets: Mapping[str, LinearTarget],
    *,
    wanted: frozenset[str],
    owners: Mapping[str, int],
    world: World,
    entries: Sequence[nn.Module],
    token_mask: TokenMask,
    place: SumsPlace = "device",
    sketch: Sketch | None = None,
    progress: Callable[[int], None] = lambda done: None,
    ids: Sequence[int | str] | None = None,
) -> Statistics:
    """Measures statistics of the targeted linears over this rank's batches and reduces them to their owners.

    Where a GPU's memory does not hold a batch's activations, the pass begins again with gradient checkpointing, which
    stays on; so the longest batch comes first at best. Ranks may differ in this: it does not change what is measured.

    Args:
        model: the module that holds the targets and runs the forward (under ZeRO the engine's module); its
            parameters stay frozen and unchanged.
        batches: this rank's collated batches: what the model takes, among it `labels` with -100 = ignored, and
            `index`, -1 for a sample that only fills up the batch. Gone through more than once where the sums take
            several passes, or a pass begins again.
        targets: the linears by qualified name, each with the name of its input.
        wanted: any of "gradient", "second_moment" and "mean_input".
        owners: layer or input name -> the rank that needs the result.
        world: the process group.
        entries: modules below all targets, where the gradient ends.
        token_mask: which tokens of a batch count for second moments.
        place: where the sums are kept; it does not change them.
        sketch: measure two random sketches of each gradient in its place, where they are smaller; the same on all
            ranks. Those of `in` x `out` linears keep k and 2 k + 1 vectors, and give a gradient of rank k.
        progress: called with the number of samples done on this rank; where there are several passes, in the mean.
        ids: the samples' ids by index, to name them; default the indices.

    Returns:
        The statistics; tensors of other owners are dropped. Mean inputs are over the batches of the largest size, of
        any rank, that nothing fills up.

    Raises:
        RunError: a targeted layer that no batch reached or whose gradient is zero, no sample with a label, or a value
            that is not finite.
    """
    sketch = sketch.to(world.device) if sketch else None
    result = Statistics(sketch=sketch)
    planned = planned_sums(targets, wanted, sketch.omega.shape[1] if sketch else None)
    groups = passes(planned, place)
    home = torch.device("cpu") if place == "host" or len(groups) > 1 else world.device
    done = 0
    for group in groups:

        def report(now: int, before: int = done) -> None:
            progress((before + now) // len(groups))

        def begin(group: Sequence[Sum] = group) -> Collector:
            sums = HostSums(world.device) if place == "host" else DeviceSums(world.device)
            return Collector(group, sums, entries, sketch)

        collector, counts = _collect(model, batches, begin, token_mask, world.device, report)
        done += counts.done
        _reduce(collector, counts, owners, world, home, ids, result, _scale(model))
    return result


class _Counts(NamedTuple):
    """Samples of this rank with and without a supervised token, all with those that only fill up, and the indices of
    those in batches whose loss is not finite.
    """

    samples: int = 0
    skipped: int = 0
    done: int = 0
    suspects: tuple[int, ...] = ()


def save_memory(model: PreTrainedModel | PeftModel) -> None:
    """Makes the model compute activations again during backward in place of holding them; dropout stays as it is."""
    # The newer name is there from transformers 5.23 on, the older one until 6.
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    for module in model.modules():
        # They do it in training alone; what drops out is below them.
        module.training |= getattr(module, "gradient_checkpointing", False)


def saves_memory(model: PreTrainedModel) -> bool:
    """Whether it does."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _collect(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    begin: Callable[[], Collector],
    token_mask: TokenMask,
    device: torch.device,
    report: Callable[[int], None],
) -> tuple[Collector, _Counts]:
    """One pass over the batches, once more with less memory where it ran out."""
    try:
        return _run(model, batches, begin(), token_mask, device, report)
    except (RuntimeError, OSError, MemoryError) as error:
        if saves_memory(model) or not out_of_memory(error):
            raise
    logger.info("a batch's activations do not fit in the GPU's memory: measuring again with gradient checkpointing")
    gc.collect()
    torch.cuda.empty_cache()
    save_memory(model)
    return _run(model, batches, begin(), token_mask, device, report)


def _run(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    collector: Collector,
    token_mask: TokenMask,
    device: torch.device,
    report: Callable[[int], None],
) -> tuple[Collector, _Counts]:
    # What is asked of a batch is asked on the CPU and of its loss at the end, so that nothing waits for the device.
    counts = _Counts()
    losses: list[torch.Tensor] = []
    members: list[list[int]] = []
    try:
        for batch in batches:
            real = batch["index"] >= 0
            supervised = (batch["labels"] != -100).view(len(real), -1).any(dim=1)
            members.append(batch["index"][real].tolist())
            counts = _Counts(
                counts.samples + int((supervised & real).sum()),
                counts.skipped + int((~supervised & real).sum()),
                counts.done + len(real),
            )
            batch = {key: value.to(device) for key, value in batch.items()}
            collector.mask_of = functools.partial(token_mask, batch)
            collector.full = bool(real.all())
            with torch.set_grad_enabled(collector.needs_gradient):
                loss = model(**without_index(batch), per_sample=True)["loss"]
                # Gradient checkpointing runs layers again during backward; they must not be counted twice.
                collector.mask_of = None
                if collector.needs_gradient:
                    (loss * _scale(model)).backward()
            losses.append(loss.detach())
            report(counts.done)
    finally:
        collector.remove()
    finite = torch.stack(losses).isfinite().tolist() if losses else []
    suspects = [index for fine, batch in zip(finite, members, strict=True) if not fine for index in batch]
    return collector, counts._replace(suspects=tuple(suspects))


def _scale(model: PreTrainedModel) -> float:
    return _FP16_SCALE if next(model.parameters()).dtype == torch.float16 else 1.0


def _reduce(
    collector: Collector,
    counts: _Counts,
    owners: Mapping[str, int],
    world: World,
    home: torch.device,
    ids: Sequence[int | str] | None,
    result: Statistics,
    scale: float,
) -> None:
    """Sums a pass over the ranks and adds the means that this rank owns to the result."""
    unreached = sorted(set.intersection(*gather_objects(collector.unreached(), world)))
    if unreached:
        raise RunError(
            f"no batch reached {len(unreached)} targeted layers, first {unreached[0]}: the model's forward "
            "bypasses them, so they cannot be adapted; exclude them from the targets."
        )
    collector.agree(world)
    suspects = [index for part in gather_objects(counts.suspects, world) for index in part]
    named = ", ".join(str(index if ids is None else ids[index]) for index in suspects)
    batches = f" The loss is not finite in the batches of samples {named}." if suspects else ""
    planned = sorted(collector.planned, key=lambda item: item.key)
    tokens = [collector.tokens.get(item.key, 0) for item in planned]
    totals = torch.tensor([counts.samples, counts.skipped, *tokens], device=world.device)
    result.samples, result.skipped, *tokens = (int(value) for value in all_reduce_sum(totals, world).tolist())
    if result.samples == 0:
        raise RunError("no sample of the task has a supervised token, so no gradient can be measured.")
    for item, seen in zip(planned, tokens, strict=True):
        if item.kind == SECOND_MOMENT:
            result.tokens[item.name] = seen
        total = collector.sums.take(item.key)
        reduce_sums({item.key: total}, {item.key: owners[item.name]}, world)
        if owners[item.name] != world.rank:
            continue
        mean = total.div_(scale * result.samples if item.of_gradient else seen)
        if not torch.isfinite(mean).all():
            kind = GRADIENT if item.of_gradient else item.kind
            raise RunError(
                f"the {kind} of {item.name} is not finite; lower the learning rate or use bfloat16.{batches}"
            )
        if item.of_gradient and not mean.any():
            raise RunError(
                f"the gradient of {item.name} is zero on all {result.samples} samples, so nothing can be learned "
                "there; look for what cuts it off from the loss, or leave it out of lora.targets."
            )
        result.of(item.kind)[item.name] = mean.to(home)
    if suspects:
        raise RunError(batches.strip())
