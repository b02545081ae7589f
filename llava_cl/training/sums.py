"""Sums over samples, in fp32: which ones a measurement needs, in which passes, and where they are kept."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from llava_cl.models import LinearTarget
from llava_cl.subspace import sketch_shapes

GRADIENT = "gradient"
SECOND_MOMENT = "second_moment"
MEAN_INPUT = "mean_input"
RANGE_SKETCH = "range_sketch"
ROW_SKETCH = "row_sketch"

SumsPlace = Literal["device", "host"] | float
"""Where sums are kept: all on the device, in host memory, or at most so many GB on the device at a time."""


@dataclass(frozen=True)
class Sum:
    """One sum over samples.

    Attributes:
        kind: what is summed: a gradient, one of its two sketches, a second moment, or inputs.
        name: of the layer, or of the input.
        module: the linear where it is seen.
        shape: None where it depends on the batches.
    """

    kind: str
    name: str
    module: nn.Linear
    shape: tuple[int, int] | None

    @property
    def key(self) -> str:
        """Its name among all sums."""
        return f"{self.kind}:{self.name}"

    @property
    def of_gradient(self) -> bool:
        """Whether it needs a backward pass."""
        return self.kind in (GRADIENT, RANGE_SKETCH, ROW_SKETCH)

    @property
    def bytes(self) -> int:
        """Its size; 0 where that depends on the batches."""
        return 4 * math.prod(self.shape) if self.shape else 0


def planned_sums(
    targets: Mapping[str, LinearTarget], wanted: frozenset[str], sketch_columns: int | None = None
) -> list[Sum]:
    """The sums that give the statistics `wanted`, in the order of the layers.

    With `sketch_columns` two sketches take the place of a gradient where they are smaller than it.
    """
    sums: list[Sum] = []
    seen: set[str] = set()
    for name, (module, source, _) in targets.items():
        rows, features = module.out_features, module.in_features
        if GRADIENT in wanted:
            shapes = sketch_shapes(rows, features, sketch_columns) if sketch_columns else None
            if shapes is None:
                sums.append(Sum(GRADIENT, name, module, (rows, features)))
            else:
                kinds = (RANGE_SKETCH, ROW_SKETCH)
                sums += (Sum(kind, name, module, shape) for kind, shape in zip(kinds, shapes, strict=True))
        if source in seen:
            continue
        seen.add(source)
        if SECOND_MOMENT in wanted:
            sums.append(Sum(SECOND_MOMENT, source, module, (features, features)))
        if MEAN_INPUT in wanted:
            sums.append(Sum(MEAN_INPUT, source, module, None))
    return sums


def passes(sums: Sequence[Sum], place: SumsPlace) -> list[list[Sum]]:
    """The sums of each pass over the samples: one pass, or as many as a bound of the device's memory takes.

    A sum that is larger than the bound has a pass to itself.
    """
    if isinstance(place, str):
        return [list(sums)]
    groups: list[list[Sum]] = []
    room = 0.0
    for item in sums:
        if not groups or item.bytes > room:
            groups.append([])
            room = place * 1e9
        groups[-1].append(item)
        room -= item.bytes
    return groups


def device_bytes(sums: Sequence[Sum], place: SumsPlace) -> int:
    """The most bytes of sums that a device holds at a time."""
    if place == "host":
        return 2 * max((item.bytes for item in sums), default=0)
    return max((sum(item.bytes for item in group) for group in passes(sums, place)), default=0)


def host_bytes(sums: Sequence[Sum]) -> int:
    """Bytes of sums in pinned host memory, of which torch gives out powers of two."""
    return sum(1 << (item.bytes - 1).bit_length() for item in sums if item.bytes)


class DeviceSums:
    """fp32 sums by key, in the device's memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, torch.Tensor] = {}

    def start(self, key: str, shape: tuple[int, ...]) -> None:
        """A sum of zeros; one that was there is dropped."""
        self._sums[key] = torch.zeros(shape, device=self._device)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each sum that has started."""
        return {key: tuple(value.shape) for key, value in self._sums.items()}

    def update(self, key: str, change: Callable[[torch.Tensor], object]) -> None:
        """Lets `change` add to a sum in place, on the device."""
        change(self._sums[key])

    def take(self, key: str) -> torch.Tensor:
        """A sum on the device, which is forgotten here."""
        return self._sums.pop(key)


class HostSums(DeviceSums):
    """fp32 sums by key, in pinned host memory; each visits the device when something is added to it.

    There two buffers take turns, each with a stream of its own, so that one sum travels while another is added to and
    the model goes on computing. What is added, and in which order, is the same as in the device's memory.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._visits = (_Visit(device), _Visit(device))
        self._visit_of: dict[str, _Visit] = {}

    def start(self, key: str, shape: tuple[int, ...]) -> None:
        """A sum of zeros; one that was there is dropped."""
        # Always the same buffer for a key, so that its stream keeps the order of what is added.
        visit = self._visit_of.setdefault(key, self._visits[len(self._visit_of) % 2])
        visit.finish()
        self._sums[key] = torch.zeros(shape, pin_memory=self._device.type == "cuda")

    def update(self, key: str, change: Callable[[torch.Tensor], object]) -> None:
        """Lets `change` add to a sum in place, on the device, without waiting for it."""
        self._visit_of[key].pay(self._sums[key], change)

    def take(self, key: str) -> torch.Tensor:
        """A sum on the device, which is forgotten here."""
        self._visit_of.pop(key).finish()
        return self._sums.pop(key).to(self._device)


class _Visit:
    """A buffer on the device for one sum at a time, and on a GPU a stream."""

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.empty(0, device=device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._change: Callable[[torch.Tensor], object] | None = None

    def pay(self, total: torch.Tensor, change: Callable[[torch.Tensor], object]) -> None:
        """Brings a sum in, changes it and takes it back."""
        self.finish()
        with self._running():
            if self._buffer.numel() < total.numel():
                self._buffer = self._buffer.new_empty(total.numel())
            part = self._buffer.narrow(0, 0, total.numel()).view(total.shape)
            part.copy_(total, non_blocking=True)
            change(part)
            total.copy_(part, non_blocking=True)
        # It holds the tensors that the stream still reads, whose memory the model would use again.
        self._change = change

    def finish(self) -> None:
        """Waits until the last sum is back."""
        if self._stream is not None:
            self._stream.synchronize()
        self._change = None

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Adds left^T right to an fp32 sum in place: `total [m, n]`, `left [tokens, m]`, `right [tokens, n]`.

    Every product of two bfloat16 numbers is exact in fp32, so that bfloat16 operands on a GPU are multiplied as they
    are with fp32 results; elsewhere they are widened first. fp32 stays fp32.
    """
    if left.is_cuda and left.dtype == right.dtype == torch.bfloat16:
        total.add_(torch.ops.aten.mm.dtype(left.T, right, torch.float32))
    else:
        total.addmm_(left.float().T, right.float())
