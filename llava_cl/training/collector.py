"""Hooks on frozen linears that add to sums what passes through them, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import nn

from llava_cl.distributed import World, gather_objects
from llava_cl.subspace import Sketch
from llava_cl.training.sums import (
    GRADIENT,
    MEAN_INPUT,
    RANGE_SKETCH,
    SECOND_MOMENT,
    DeviceSums,
    Sum,
    add_product,
)


class _SeeWeightGradient(torch.autograd.Function):
    """Identity on a linear's output; its backward shows the output's gradient and the input."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, x: torch.Tensor, see: Callable[..., None]) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.see = see
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (x,) = ctx.saved_tensors
        ctx.see(grads[0], x)
        return grads[0], None, None


class Collector:
    """Fills sums while a model runs.

    Args:
        planned: the sums.
        sums: where they are kept.
        entries: modules below all linears, where the gradient ends.
        sketch: test matrices, on the device, for the sketches among the sums.
    """

    def __init__(
        self, planned: Sequence[Sum], sums: DeviceSums, entries: Sequence[nn.Module], sketch: Sketch | None
    ) -> None:
        self.sums = sums
        self.planned = planned
        self.tokens: dict[str, int] = {}
        """Tokens that went into each sum over inputs."""
        self.mask_of: Callable[[str], torch.Tensor] | None = None
        """Which tokens of the running forward pass count at an input; None outside of one."""
        self.full = True
        """Whether nothing fills up the running batch."""
        self.needs_gradient = any(item.of_gradient for item in planned)
        self._sketch = sketch
        self._reached: set[str] = set()
        self._handles: list[Any] = []
        hooks = {SECOND_MOMENT: self._moment_hook, MEAN_INPUT: self._mean_hook}
        for item in planned:
            if item.shape is not None:
                sums.start(item.key, item.shape)
            hook = hooks.get(item.kind, self._gradient_hook)(item)
            self._handles.append(item.module.register_forward_hook(hook))
        if self.needs_gradient:
            # Nothing below the first targeted layer requires grad, so the graph must be started by hand.
            self._handles += (entry.register_forward_hook(_require_grad) for entry in entries)

    def _gradient_hook(self, item: Sum) -> Callable[..., torch.Tensor]:
        def see(grad: torch.Tensor, x: torch.Tensor) -> None:
            self._reached.add(item.key)
            self.sums.update(item.key, self._addition(item, _tokens(grad), _tokens(x)))

        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            if not torch.is_grad_enabled() or not output.requires_grad:
                return output
            return _SeeWeightGradient.apply(output, inputs[0].detach(), see)

        return hook

    def _addition(self, item: Sum, grad: torch.Tensor, x: torch.Tensor) -> Callable[[torch.Tensor], None]:
        """What a batch adds: g^T x, g^T (x Omega), or (g Psi^T)^T x."""
        if item.kind == GRADIENT:
            return lambda total: add_product(total, grad, x)
        sketch = self._sketch
        assert sketch is not None
        if item.kind == RANGE_SKETCH:
            return lambda total: add_product(total, grad, x.float() @ sketch.omega[: x.shape[1]])
        return lambda total: add_product(total, grad.float() @ sketch.psi[: grad.shape[1]], x)

    def _moment_hook(self, item: Sum) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
            if self.mask_of is None:
                return
            x = _tokens(inputs[0].detach()[self.mask_of(item.name)])
            self._saw(item.key, len(x))
            self.sums.update(item.key, lambda total: add_product(total, x, x))

        return hook

    def _mean_hook(self, item: Sum) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
            if self.mask_of is None or not self.full:
                return
            x = _tokens(inputs[0].detach())
            width = self.sums.shapes().get(item.key, (0, 0))[1]
            if width < len(x):
                self._start_again(item.key, (x.shape[1], x.shape[0]))
            elif width > len(x):
                return
            self._saw(item.key, len(x))
            self.sums.update(item.key, lambda total: total.add_(x.float().T))

        return hook

    def _saw(self, key: str, tokens: int) -> None:
        self._reached.add(key)
        self.tokens[key] = self.tokens.get(key, 0) + tokens

    def _start_again(self, key: str, shape: tuple[int, ...]) -> None:
        self.sums.start(key, shape)
        self.tokens[key] = 0

    def agree(self, world: World) -> None:
        """Sums over batches of the largest size of any rank; ranks that saw only smaller ones have nothing to add."""
        own = self.sums.shapes()
        shapes: dict[str, tuple[int, ...]] = {}
        for part in gather_objects(own, world):
            shapes.update({key: max(shape, shapes.get(key, shape)) for key, shape in part.items()})
        for key, shape in shapes.items():
            if own.get(key) != shape:
                self._start_again(key, shape)

    def unreached(self) -> set[str]:
        """Names of layers and inputs with a sum that no batch has touched."""
        return {item.name for item in self.planned if item.key not in self._reached}

    def remove(self) -> None:
        """Takes all hooks off."""
        for handle in self._handles:
            handle.remove()


def _tokens(x: torch.Tensor) -> torch.Tensor:
    return rearrange(x, "... features -> (...) features")


def _require_grad(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_(True) if torch.is_grad_enabled() else output
