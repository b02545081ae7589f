"""Statistics of frozen linears over a task's samples: weight gradients, input second moments and mean inputs.

The gradient of a frozen weight is captured as g^T x from the module's input x and the gradient g of its
output, by an identity function that a forward hook puts on the output. It needs no trainable base weight
and no optimizer, works under DDP and every ZeRO stage, and holds nothing extra under gradient checkpointing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llava_cl.distributed import World, all_reduce_sum, gather_objects, reduce_sums
from llava_cl.errors import RunError
from llava_cl.models import LinearTarget

GRADIENT = "gradient"
SECOND_MOMENT = "second_moment"
MEAN_INPUT = "mean_input"

Batch = dict[str, torch.Tensor]
TokenMask = Callable[[Batch, str], torch.Tensor]
"""Which tokens of a batch count at the input of that name: bool, of the shape of the input without its last axis."""


def without_index(batch: Batch) -> Batch:
    """What the model takes of a batch."""
    return {key: value for key, value in batch.items() if key != "index"}


@dataclass
class Statistics:
    """Means over the samples of all ranks, fp32, each complete on its owner rank only.

    Attributes:
        gradients: layer -> mean over samples of dL/dW `[out, in]`, L = a sample's mean token loss.
        second_moments: input name -> mean over tokens of x x^T `[in, in]`.
        mean_inputs: input name -> sum over batches of the inputs, over the number of tokens, `[in, length * batch]`;
            a column is a place in the batch.
        tokens: input name -> tokens that its second moment is the mean over.
        samples: samples with at least one supervised token, over all ranks.
        skipped: samples without one, over all ranks.
    """

    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    second_moments: dict[str, torch.Tensor] = field(default_factory=dict)
    mean_inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    samples: int = 0
    skipped: int = 0


class _AccumulateWeightGradient(torch.autograd.Function):
    """Identity on a linear's output; its backward adds g^T x to a buffer."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, x: torch.Tensor, add: Callable[..., None]) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.add = add
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (x,) = ctx.saved_tensors
        ctx.add(grads[0], x)
        return grads[0], None, None


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
    progress: Callable[[int], None] = lambda done: None,
    ids: Sequence[int | str] | None = None,
) -> Statistics:
    """Measures statistics of the targeted linears over this rank's batches and reduces them to their owners.

    Args:
        model: the module that holds the targets and runs the forward (under ZeRO the engine's module); its
            parameters stay frozen and unchanged.
        batches: this rank's collated batches: what the model takes, among it `labels` with -100 = ignored, and
            `index`, -1 for a sample that only fills up the batch.
        targets: the linears by qualified name, each with the name of its input.
        wanted: any of "gradient", "second_moment" and "mean_input".
        owners: layer or input name -> the rank that needs the result.
        world: the process group.
        entries: modules below all targets, where the gradient ends.
        token_mask: which tokens of a batch count for second moments.
        progress: called with the number of samples done on this rank.
        ids: the samples' ids by index, to name them; default the indices.

    Returns:
        The statistics; tensors of other owners are dropped. Mean inputs are over the batches of the largest size, of
        any rank, that nothing fills up.

    Raises:
        RunError: a targeted layer that no batch reached or whose gradient is zero, no sample with a label, or a value
            that is not finite.
    """
    collector = _Collector(targets, wanted, entries)
    samples = skipped = done = 0
    suspects: list[str] = []
    try:
        for batch in batches:
            real = batch["index"] >= 0
            supervised = (batch["labels"] != -100).view(len(real), -1).any(dim=1)
            samples += int((supervised & real).sum())
            skipped += int((~supervised & real).sum())
            collector.mask_of = functools.partial(token_mask, batch)
            collector.full = bool(real.all())
            with torch.set_grad_enabled(GRADIENT in wanted):
                loss = model(**without_index(batch), per_sample=True)["loss"]
                # Gradient checkpointing runs layers again during backward; they must not be counted twice.
                collector.mask_of = None
                if GRADIENT in wanted:
                    loss.backward()
            if not torch.isfinite(loss):
                suspects += [str(index if ids is None else ids[index]) for index in batch["index"][real].tolist()]
            done += len(real)
            progress(done)
    finally:
        collector.remove()
    return _reduce(collector, samples, skipped, suspects, owners, world)


def _reduce(
    collector: _Collector,
    samples: int,
    skipped: int,
    suspects: list[str],
    owners: Mapping[str, int],
    world: World,
) -> Statistics:
    unreached = sorted(set.intersection(*(set(names) for names in gather_objects(collector.unreached(), world))))
    if unreached:
        raise RunError(
            f"no batch reached {len(unreached)} targeted layers, first {unreached[0]}: the model's forward "
            "bypasses them, so they cannot be adapted; exclude them from the targets."
        )
    collector.agree(world)
    suspects = [name for part in gather_objects(suspects, world) for name in part]
    batches = f" The loss is not finite in the batches of samples {', '.join(suspects)}." if suspects else ""
    keys = sorted(collector.keys)
    device = collector.device
    totals = torch.tensor([samples, skipped, *(collector.tokens.get(key, 0) for key in keys)], device=device)
    total_samples, total_skipped, *counted = (int(value) for value in all_reduce_sum(totals, world).tolist())
    if total_samples == 0:
        raise RunError("no sample of the task has a supervised token, so no gradient can be measured.")
    tokens = dict(zip(keys, counted, strict=True))
    reduce_sums(collector.sums, {key: owners[name] for key, (_, name) in collector.keys.items()}, world)
    result = Statistics(samples=total_samples, skipped=total_skipped)
    means = {GRADIENT: result.gradients, SECOND_MOMENT: result.second_moments, MEAN_INPUT: result.mean_inputs}
    for key, (kind, name) in collector.keys.items():
        if kind == SECOND_MOMENT:
            result.tokens[name] = tokens[key]
        if owners[name] != world.rank:
            continue
        mean = collector.sums.pop(key).div_(total_samples if kind == GRADIENT else tokens[key])
        if not torch.isfinite(mean).all():
            raise RunError(f"the {kind} of {name} is not finite; lower the learning rate or use bfloat16.{batches}")
        if kind == GRADIENT and not mean.any():
            raise RunError(
                f"the gradient of {name} is zero on all {total_samples} samples, so nothing can be learned there; "
                "look for what cuts it off from the loss, or leave it out of lora.targets."
            )
        means[kind][name] = mean
    if suspects:
        raise RunError(batches.strip())
    return result


class _Collector:
    """Hooks on the targeted linears, and the fp32 sums that they fill."""

    def __init__(
        self, targets: Mapping[str, LinearTarget], wanted: frozenset[str], entries: Sequence[nn.Module]
    ) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.keys: dict[str, tuple[str, str]] = {}
        self.tokens: dict[str, int] = {}
        """Tokens that went into each sum over inputs."""
        self.mask_of: Callable[[str], torch.Tensor] | None = None
        """Which tokens of the running forward pass count at an input; None outside of one."""
        self.full = True
        """Whether nothing fills up the running batch."""
        self.device = next(iter(targets.values())).module.weight.device
        self._reached: set[str] = set()
        self._handles: list[Any] = []
        for name, (module, *_) in targets.items():
            if GRADIENT in wanted:
                key = self._key(GRADIENT, name)
                self._allocate(key, (module.out_features, module.in_features))
                self._handles.append(module.register_forward_hook(self._gradient_hook(key)))
        inputs: dict[str, nn.Linear] = {}
        for module, source, _ in targets.values():
            inputs.setdefault(source, module)
        for source, module in inputs.items():
            if SECOND_MOMENT in wanted:
                key = self._key(SECOND_MOMENT, source)
                self._allocate(key, (module.in_features, module.in_features))
                self._handles.append(module.register_forward_hook(self._moment_hook(key)))
            if MEAN_INPUT in wanted:
                self._handles.append(module.register_forward_hook(self._mean_hook(self._key(MEAN_INPUT, source))))
        if GRADIENT in wanted:
            # Nothing below the first targeted layer requires grad, so the graph must be started by hand.
            self._handles += (entry.register_forward_hook(_require_grad) for entry in entries)

    def _key(self, kind: str, name: str) -> str:
        key = f"{kind}:{name}"
        self.keys[key] = (kind, name)
        return key

    def _allocate(self, key: str, shape: tuple[int, ...]) -> None:
        self.sums[key] = torch.zeros(shape, dtype=torch.float32, device=self.device)

    def _gradient_hook(self, key: str) -> Callable[..., torch.Tensor]:
        def add(grad: torch.Tensor, x: torch.Tensor) -> None:
            self._reached.add(key)
            self.sums[key].addmm_(grad.flatten(0, -2).float().T, x.flatten(0, -2).float())

        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            if not torch.is_grad_enabled() or not output.requires_grad:
                return output
            return _AccumulateWeightGradient.apply(output, inputs[0].detach(), add)

        return hook

    def _moment_hook(self, key: str) -> Callable[..., None]:
        source = self.keys[key][1]

        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
            if self.mask_of is None:
                return
            x = inputs[0].detach()[self.mask_of(source)].flatten(0, -2).float()
            self._reached.add(key)
            self.sums[key].addmm_(x.T, x)
            self.tokens[key] = self.tokens.get(key, 0) + len(x)

        return hook

    def _mean_hook(self, key: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
            if self.mask_of is None or not self.full:
                return
            x = inputs[0].detach().flatten(0, -2).float()
            if key not in self.sums or self.sums[key].shape[1] < x.shape[0]:
                self._start_again(key, (x.shape[1], x.shape[0]))
            if self.sums[key].shape[1] > x.shape[0]:
                return
            self._reached.add(key)
            self.sums[key].add_(x.T)
            self.tokens[key] = self.tokens.get(key, 0) + len(x)

        return hook

    def _start_again(self, key: str, shape: tuple[int, ...]) -> None:
        self._allocate(key, shape)
        self.tokens[key] = 0

    def agree(self, world: World) -> None:
        """Gives sums over places in a batch the largest shape of all ranks; a rank with another has nothing to add."""
        own = {key: tuple(tensor.shape) for key, tensor in self.sums.items()}
        shapes: dict[str, tuple[int, ...]] = {}
        for part in gather_objects(own, world):
            shapes.update({key: max(shape, shapes.get(key, shape)) for key, shape in part.items()})
        for key, shape in shapes.items():
            if own.get(key) != shape:
                self._start_again(key, shape)

    def unreached(self) -> list[str]:
        """Names of sums that no batch has touched."""
        return sorted(name for key, (_, name) in self.keys.items() if key not in self._reached)

    def remove(self) -> None:
        """Takes all hooks off."""
        for handle in self._handles:
            handle.remove()


def _require_grad(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_(True) if torch.is_grad_enabled() else output
