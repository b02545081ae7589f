"""Plans of sums over samples: passes and bytes, against what is counted by hand."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from llava_cl.models import LinearTarget
from llava_cl.training.sums import (
    DeviceSums,
    HostSums,
    SumsPlace,
    add_product,
    device_bytes,
    passes,
    planned_sums,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TARGETS = {
    "q": LinearTarget(nn.Linear(300, 200), "x"),
    "k": LinearTarget(nn.Linear(300, 200), "x"),
    "up": LinearTarget(nn.Linear(300, 1000), "y"),
}
"""Gradients of 240, 240 and 1200 kB, second moments of two inputs of 360 kB each."""


def _names(place: SumsPlace) -> list[list[str]]:
    planned = planned_sums(TARGETS, frozenset({"gradient", "second_moment"}))
    return [[item.key for item in group] for group in passes(planned, place)]


@pytest.mark.parametrize("place", ["device", "host", 1.0])
def test_one_pass_where_all_fits(place: SumsPlace) -> None:
    assert _names(place) == [["gradient:q", "second_moment:x", "gradient:k", "gradient:up", "second_moment:y"]]


def test_no_pass_holds_more_than_the_bound() -> None:
    assert _names(0.0012) == [["gradient:q", "second_moment:x", "gradient:k"], ["gradient:up"], ["second_moment:y"]]
    assert _names(1e-9) == [[name] for name in _names("device")[0]]


@pytest.mark.parametrize(("place", "kilobytes"), [("device", 2400), ("host", 2 * 1200), (0.0013, 1200), (0.0016, 1560)])
def test_bytes_on_the_device(place: SumsPlace, kilobytes: int) -> None:
    assert device_bytes(planned_sums(TARGETS, frozenset({"gradient", "second_moment"})), place) == kilobytes * 1000


@pytest.mark.parametrize("place", ["device", "host", 0.5])
def test_a_method_that_measures_nothing_takes_no_bytes(place: SumsPlace) -> None:
    assert device_bytes([], place) == 0


def test_bytes_of_sketches() -> None:
    planned = planned_sums(TARGETS, frozenset({"gradient"}), sketch_columns=10)
    columns, rows = 10, 21
    assert device_bytes(planned, "device") == 4 * (columns * (200 + 200 + 1000) + rows * 3 * 300)


def test_sums_of_a_host_are_those_of_a_device() -> None:
    generator = torch.Generator().manual_seed(0)
    places = (DeviceSums(CPU), HostSums(CPU))
    for sums in places:
        sums.start("a", (3, 4))
        sums.start("b", (5, 6))
        sums.start("c", (2, 2))
    for key, shape in (("a", (3, 4)), ("b", (5, 6)), ("c", (2, 2)), ("a", (3, 4)), ("c", (2, 2))):
        part = torch.randn(shape, generator=generator)
        for sums in places:
            sums.update(key, lambda total, part=part: total.add_(part))
    for sums in places:
        sums.start("b", (1, 2))
    assert places[0].shapes() == places[1].shapes() == {"a": (3, 4), "b": (1, 2), "c": (2, 2)}
    for key in "abc":
        assert torch.equal(places[0].take(key), places[1].take(key))
    assert not places[1].shapes()


class _Streams:
    """Streams of a GPU that is not there: what waits for what, and which operations run on which."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.running = ["model"]
        self.made = 0
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: _Stream(self))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "model")
        monkeypatch.setattr(torch.cuda, "stream", self.on)

    @contextlib.contextmanager
    def on(self, stream: _Stream) -> Iterator[None]:
        self.running.append(stream.name)
        yield
        self.running.pop()

    def note(self, what: str) -> None:
        self.log.append(f"{self.running[-1]}: {what}")


class _Stream:
    device = GPU

    def __init__(self, streams: _Streams) -> None:
        self._streams = streams
        streams.made += 1
        self.name = f"stream {streams.made}"

    def wait_stream(self, other: str) -> None:
        self._streams.log.append(f"{self.name} waits for {other}")

    def synchronize(self) -> None:
        self._streams.log.append(f"all wait for {self.name}")


def test_sums_of_a_host_travel_on_two_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake tensors of a GPU: where each sum is, and in which order it is brought, changed and taken back."""
    streams = _Streams(monkeypatch)
    zeros, pinned = torch.zeros, []

    def copied(self: torch.Tensor, other: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if "meta" not in (other.device.type, self.device.type):  # as fake tensors are inside
            streams.note(f"{other.device.type} to {self.device.type}{'' if non_blocking else ', blocking'}")
        # Not the method of the tensor, which a torch without CUDA refuses.
        return torch.ops.aten.copy_.default(self, other, non_blocking)

    def made(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        pinned.append(pin_memory)
        return zeros(*shape, **options)

    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    monkeypatch.setattr(torch, "zeros", made)
    with FakeTensorMode():
        sums = HostSums(GPU)
        for key, shape in (("a", (3, 4)), ("b", (5, 6)), ("c", (2, 2))):
            sums.start(key, shape)
        assert pinned == [True] * 3 and sums._sums["a"].device.type == "cpu"
        streams.log.clear()
        left, right = torch.empty(7, 3, device=GPU), torch.empty(7, 4, device=GPU)
        held = weakref.ref(left)

        def change(total: torch.Tensor, left: torch.Tensor = left) -> None:
            assert total.device == GPU and total.shape == (3, 4)
            streams.note("adds")
            add_product(total, left, right)

        sums.update("a", change)
        del left, change
        gc.collect()
        assert held() is not None, "the stream may still read it"
        sums.update("b", lambda total: streams.note("adds"))
        sums.update("c", lambda total: streams.note("adds"))
        gc.collect()
        assert held() is None
        travel = ("cpu to cuda", "adds", "cuda to cpu")
        expected = []
        for number in (1, 2, 1):
            name = f"stream {number}"
            expected += [f"all wait for {name}", f"{name} waits for model", *(f"{name}: {each}" for each in travel)]
        assert streams.log == expected
        streams.log.clear()
        assert sums.take("b").device == GPU
        assert streams.log[0] == "all wait for stream 2"


@pytest.mark.parametrize(
    ("dtypes", "kernel"),
    [
        ((torch.bfloat16, torch.bfloat16), "aten.mm.dtype"),
        ((torch.float32, torch.float32), "aten.addmm_.default"),
        ((torch.bfloat16, torch.float32), "aten.addmm_.default"),
    ],
)
def test_products_on_a_gpu(dtypes: tuple[torch.dtype, torch.dtype], kernel: str) -> None:
    """Those of two bfloat16 matrices are not widened first, and their results are not rounded to bfloat16."""
    with FakeTensorMode():
        left, right = (torch.empty(7, size, device=GPU, dtype=own) for size, own in zip((3, 4), dtypes, strict=True))
        total = torch.zeros(3, 4, device=GPU)
        with _Kernels() as seen:
            add_product(total, left, right)
    products = [(name, result) for name, result in seen.results if "mm" in name]
    assert products == [(kernel, torch.float32)]


class _Kernels(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.results: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.results += [(str(func), made.dtype)] if isinstance(made, torch.Tensor) else []
        return made


def test_sums_on_a_gpu_stay_there() -> None:
    with FakeTensorMode():
        sums = DeviceSums(GPU)
        sums.start("a", (3, 4))
        sums.update("a", lambda total: add_product(total, *(torch.empty(7, n, device=GPU) for n in (3, 4))))
        assert sums.take("a").device == GPU
