"""What a step of a model would allocate and compute, found on fake tensors: nothing is allocated and nothing computed.

Blocks that repeat are tried in stacks of two and three, from which the whole follows: bytes and operations grow by the
same amount with each further block.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

_FEW = 2
"""Blocks of a stack in a trial; in a shallower one the largest moment can lie elsewhere."""


class Cost(NamedTuple):
    """The largest number of bytes that a step holds at once beside what it was given, and its operations."""

    bytes: int
    flops: int

    def plus(self, other: Cost, times: int = 1) -> Cost:
        """This cost and `times` the other."""
        return Cost(self.bytes + times * other.bytes, self.flops + times * other.flops)


class _LiveBytes(TorchDispatchMode):
    """Adds up the storages of all tensors that live, from the first operation that makes each."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def know(self, tensors: Sequence[torch.Tensor]) -> None:
        """Tensors that were there before."""
        self._known.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _Keep(torch.autograd.Function):
    """Identity on a linear's output that keeps the linear's input for backward."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


def keep_inputs(modules: Iterable[nn.Module]) -> None:
    """Makes linears keep their inputs for backward, as measuring their gradients does."""

    def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return _Keep.apply(output, inputs[0].detach())

    for module in modules:
        module.register_forward_hook(hook)


def start_graph(modules: Iterable[nn.Module]) -> None:
    """Makes the outputs of frozen modules require a gradient, as measuring does."""
    for module in modules:
        module.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_(True))


def try_step(model: nn.Module, step: Callable[[], torch.Tensor], device: torch.device) -> Cost:
    """Cost of a step on a model of the meta device.

    Args:
        model: parameters and buffers on the meta device in the dtype that they will have; it is unusable afterwards.
        step: runs the model on inputs that it makes itself on `device` and returns what is to be summed and
            differentiated, if it has a gradient.
        device: where the step is to run; only kernels and dtypes follow from it, nothing is allocated there.
    """
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and _repeats(module)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        make_fake(model, device)
        with contextlib.ExitStack() as shortened:
            for stack in stacks:
                shortened.enter_context(_first(stack, _FEW))
            few = _cost(model, step)
        cost = few
        for stack in stacks:
            with contextlib.ExitStack() as shortened:
                for other in stacks:
                    shortened.enter_context(_first(other, _FEW + (other is stack)))
                more = _cost(model, step)
            cost = cost.plus(Cost(more.bytes - few.bytes, more.flops - few.flops), len(stack) - _FEW)
    return cost


def _repeats(stack: nn.ModuleList) -> bool:
    shapes = [[(name, parameter.shape) for name, parameter in block.named_parameters()] for block in stack]
    return len(stack) > _FEW and all(other == shapes[0] for other in shapes)


@contextlib.contextmanager
def _first(stack: nn.ModuleList, count: int) -> Iterator[None]:
    """Only the first blocks of a stack."""
    whole = dict(stack._modules)
    for name in list(whole)[count:]:
        del stack._modules[name]
    try:
        yield
    finally:
        stack._modules.clear()
        stack._modules.update(whole)


def make_fake(model: nn.Module, device: torch.device) -> None:
    """Gives a model tensors without memory, as if they were on `device`; inside a `FakeTensorMode`."""
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(fake(parameter), requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)


def _cost(model: nn.Module, step: Callable[[], torch.Tensor]) -> Cost:
    # Apart, because the counter of operations keeps alive what recomputation would let go.
    live, flops = _LiveBytes(), FlopCounterMode(display=False)
    live.know([*model.parameters(), *model.buffers()])
    for mode in (live, flops):
        with mode:
            value = step()
            if value.requires_grad:
                value.sum().backward()
            del value
        for parameter in model.parameters():
            parameter.grad = None
    return Cost(live.most, flops.get_total_flops())
