"""The few collectives of the package, and how work is dealt out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_cl.distributed import (
    World,
    all_reduce_sum,
    collect_tensors,
    gather_objects,
    local_share,
    reduce_sums,
    share_out,
)
from ranks import TIMEOUT_MINUTES, run_ranks

ALONE = World(0, 1, torch.device("cpu"))
OWNERS = {"a": 0, "b": 1, "c": 2, "d": 1}


def _tensor(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(ord(name))
    shape = {"a": (2, 3), "b": (4,), "c": (5, 0), "d": (3, 2)}[name]
    return torch.randn(shape, generator=generator, dtype=torch.float64 if name == "b" else torch.float32)


def _collectives(world: World) -> dict[str, Any]:
    sums = {name: torch.full((2,), float(world.rank + number)) for number, name in enumerate("xyz")}
    owners = {"x": 2, "y": 0, "z": 2}
    reduce_sums(sums, owners, world)
    owned = {name: _tensor(name).T if name == "d" else _tensor(name) for name, o in OWNERS.items() if o == world.rank}
    return {
        "collected": collect_tensors(owned, {**OWNERS, "nobody's": 0}, world),
        "summed": all_reduce_sum(torch.tensor(world.rank + 1), world).item(),
        "reduced": {name: tensor for name, tensor in sums.items() if owners[name] == world.rank},
        "gathered": gather_objects({"rank": world.rank}, world),
        "share": local_share(list(range(10)), world),
        "main": world.is_main,
    }


@pytest.mark.distributed
def test_collectives_on_three_ranks() -> None:
    results = run_ranks(_collectives, 3)
    for result in results:
        assert result["collected"].keys() == (OWNERS.keys() if result["main"] else set())
        for name, tensor in result["collected"].items():
            expected = _tensor(name).T if name == "d" else _tensor(name)
            assert tensor.dtype == expected.dtype
            assert torch.equal(tensor, expected)
        assert result["summed"] == 6
        assert result["gathered"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert [result["main"] for result in results] == [True, False, False]
    assert sorted(item for result in results for item in result["share"]) == list(range(10))
    reduced = [{name: tensor.tolist() for name, tensor in result["reduced"].items()} for result in results]
    assert reduced == [{"y": [6.0, 6.0]}, {}, {"x": [3.0, 3.0], "z": [9.0, 9.0]}]


def _zero_timeout(world: World) -> float:
    from deepspeed.utils import groups

    group = groups._get_data_parallel_group()
    assert group is not dist.group.WORLD
    return group._get_backend(world.device).options._timeout.total_seconds()


def test_zero_waits_no_longer_than_other_collectives() -> None:
    assert run_ranks(_zero_timeout, 2, use_deepspeed=True) == [TIMEOUT_MINUTES * 60] * 2


def test_one_process_needs_no_group() -> None:
    tensor = torch.arange(3)
    assert torch.equal(collect_tensors({"a": tensor}, {"a": 0}, ALONE)["a"], tensor)
    assert gather_objects("x", ALONE) == ["x"]
    assert all_reduce_sum(tensor, ALONE) is tensor
    assert local_share([1, 2], ALONE) == [1, 2]
    sums = {"a": tensor.clone()}
    reduce_sums(sums, {"a": 0}, ALONE)
    assert torch.equal(sums["a"], tensor)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(min_size=1), st.floats(0, 100), max_size=30), st.integers(1, 8))
def test_work_is_shared_out_evenly_and_alike_on_every_rank(costs: dict[str, float], size: int) -> None:
    owners = share_out(costs, size)
    assert owners.keys() == costs.keys()
    assert owners == share_out(dict(reversed(costs.items())), size)
    loads = [sum(costs[name] for name in costs if owners[name] == rank) for rank in range(size)]
    # The bound of longest-first scheduling: no rank exceeds the mean by more than one item.
    assert max(loads) <= sum(loads) / size + max(costs.values(), default=0) + 1e-9
