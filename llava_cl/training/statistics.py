"""Statistics of frozen linears over a task's samples: weight gradients and input second moments.

The gradient of a frozen weight is captured as g^T x from the module's input x and the gradient g of its
output, by an identity function that a forward hook puts on the output. It needs no trainable base weight
and no optimizer, works under DDP and every ZeRO stage, and holds nothing extra under gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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


@dataclass
class Statistics:
    """Means over the samples of all ranks, fp32, each complete on its owner rank only.

    Attributes:
        gradients: layer -> mean over samples of dL/dW `[out, in]`, L = a sample's mean token loss.
        second_moments: input name -> mean over tokens of x x^T `[in, in]`.
        samples: samples with at least one supervised token, over all ranks.
        skipped: samples without one, over all ranks.
    """

    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    second_moments: dict[str, torch.Tensor] = field(default_factory=dict)
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
    batches: Iterable[dict[str, torch.Tensor]],
    targets: Mapping[str, LinearTarget],
    *,
    wanted: frozenset[str],
    owners: Mapping[str, int],
    world: World,
    progress: Callable[[int], None] = lambda done: None,
) -> Statistics:
    """Measures statistics of the targeted linears over this rank's batches and reduces them to their owners.

    Args:
        model: the module that holds the targets and runs the forward (under ZeRO the engine's module); its
            parameters stay frozen and unchanged.
        batches: this rank's collated batches (`input_ids`, `attention_mask`, `labels`, `pixel_values` and
            `index`, -1 for a sample that only fills up the batch).
        targets: the linears by qualified name, each with the name of its input.
        wanted: any of "gradient" and "second_moment".
        owners: layer or input name -> the rank that needs the result.
        world: the process group.
        progress: called with the number of samples done on this rank.

    Returns:
        The statistics; tensors of other owners are dropped.

    Raises:
        RunError: a targeted layer that no batch reached, no sample with a label, or a value that is not finite.
    """
    collector = _Collector(model, targets, wanted)
    try:
        samples = skipped = tokens = done = 0
        for batch in batches:
            real = batch["index"] >= 0
            supervised = (batch["labels"][:, 1:] != -100).any(dim=1)
            token_mask = batch["attention_mask"].bool() & real[:, None]
            samples += int((supervised & real).sum())
            skipped += int((~supervised & real).sum())
            tokens += int(token_mask.sum())
            collector.token_mask = token_mask
            inputs = {key: value for key, value in batch.items() if key != "index"}
            with torch.set_grad_enabled(GRADIENT in wanted):
                loss = model(**inputs, per_sample=True)["loss"]
                # Gradient checkpointing runs layers again during backward; they must not be counted twice.
                collector.token_mask = None
                if GRADIENT in wanted:
                    loss.backward()
            done += len(real)
            progress(done)
    finally:
        collector.remove()
    return _reduce(collector, (samples, skipped, tokens), owners, world)


def _reduce(collector: _Collector, counts: tuple[int, int, int], owners: Mapping[str, int], world: World) -> Statistics:
    unreached = sorted(set.intersection(*(set(names) for names in gather_objects(collector.unreached(), world))))
    if unreached:
        raise RunError(
            f"no batch reached {len(unreached)} targeted layers, first {unreached[0]}: the model's forward "
            "bypasses them, so they cannot be adapted; exclude them from the targets."
        )
    device = next(iter(collector.sums.values())).device
    totals = all_reduce_sum(torch.tensor(counts, dtype=torch.int64, device=device), world)
    total_samples, total_skipped, total_tokens = (int(value) for value in totals.tolist())
    if total_samples == 0:
        raise RunError("no sample of the task has a supervised token, so no gradient can be measured.")
    reduce_sums(collector.sums, {key: owners[name] for key, (_, name) in collector.keys.items()}, world)
    result = Statistics(samples=total_samples, skipped=total_skipped)
    for key, (kind, name) in collector.keys.items():
        if owners[name] != world.rank:
            continue
        mean = collector.sums.pop(key).div_(total_samples if kind == GRADIENT else total_tokens)
        if not torch.isfinite(mean).all():
            raise RunError(f"the {kind} of {name} is not finite; lower the learning rate or use bfloat16.")
        (result.gradients if kind == GRADIENT else result.second_moments)[name] = mean
    return result


class _Collector:
    """Hooks on the targeted linears, and the fp32 sums that they fill."""

    def __init__(self, model: PreTrainedModel, targets: Mapping[str, LinearTarget], wanted: frozenset[str]) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.keys: dict[str, tuple[str, str]] = {}
        self.token_mask: torch.Tensor | None = None
        """Tokens of the running forward pass that count, `[batch, length]`; None outside of one."""
        self._reached: set[str] = set()
        self._handles: list[Any] = []
        sources_seen: set[str] = set()
        for name, (module, source) in targets.items():
            if GRADIENT in wanted:
                key = self._allocate(GRADIENT, name, module, (module.out_features, module.in_features))
                self._handles.append(module.register_forward_hook(self._gradient_hook(key)))
            if SECOND_MOMENT in wanted and source not in sources_seen:
                sources_seen.add(source)
                key = self._allocate(SECOND_MOMENT, source, module, (module.in_features, module.in_features))
                self._handles.append(module.register_forward_hook(self._moment_hook(key)))
        if GRADIENT in wanted:
            # Nothing below the first targeted layer requires grad, so the graph must be started by hand.
            self._handles.append(model.get_input_embeddings().register_forward_hook(_require_grad))

    def _allocate(self, kind: str, name: str, module: nn.Linear, shape: tuple[int, int]) -> str:
        key = f"{kind}:{name}"
        self.keys[key] = (kind, name)
        self.sums[key] = torch.zeros(shape, dtype=torch.float32, device=module.weight.device)
        return key

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
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
            if self.token_mask is None:
                return
            x = inputs[0].detach()[self.token_mask].float()
            self._reached.add(key)
            self.sums[key].addmm_(x.T, x)

        return hook

    def unreached(self) -> list[str]:
        """Keys of sums that no batch has touched."""
        return sorted(self.keys[key][1] for key in self.sums if key not in self._reached)

    def remove(self) -> None:
        """Takes all hooks off."""
        for handle in self._handles:
            handle.remove()


def _require_grad(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_(True) if torch.is_grad_enabled() else output
