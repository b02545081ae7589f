"""Plans of sums over samples: passes and bytes, against what is counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llava_cl.models import LinearTarget
from llava_cl.training.sums import DeviceSums, HostSums, SumsPlace, device_bytes, passes, planned_sums

CPU = torch.device("cpu")
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
