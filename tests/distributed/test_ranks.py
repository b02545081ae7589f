"""The helper that the distributed tests stand on: order of results, failures, deaths and time-outs are told."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from llava_cl.distributed import World
from ranks import RankFailed, run_ranks

pytestmark = pytest.mark.distributed


def _rank_and_sum(world: World, value: float) -> tuple[int, int, float]:
    total = torch.tensor(value + world.rank)
    dist.all_reduce(total)
    return world.rank, world.size, total.item()


def _raise_on_rank_1(world: World) -> None:
    if world.rank == 1:
        raise ValueError("the reason")
    dist.barrier()


def _die_on_rank_1(world: World) -> None:
    if world.rank == 1:
        os._exit(9)
    dist.barrier()


def _hang(world: World) -> None:
    while True:
        time.sleep(60)


@pytest.mark.parametrize("use_deepspeed", [False, True])
def test_results_come_in_rank_order_from_one_group(use_deepspeed: bool) -> None:
    results = run_ranks(_rank_and_sum, 3, 0.5, use_deepspeed=use_deepspeed)
    assert results == [(0, 3, 4.5), (1, 3, 4.5), (2, 3, 4.5)]


def test_traceback_of_the_rank_that_failed_is_raised() -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 1:.*_raise_on_rank_1.*ValueError: the reason"):
        run_ranks(_raise_on_rank_1, 2)


def test_a_rank_that_dies_is_told() -> None:
    with pytest.raises(RankFailed, match="rank 1 died"):
        run_ranks(_die_on_rank_1, 2)


def test_ranks_that_hang_are_killed() -> None:
    with pytest.raises(RankFailed, match=r"\[0, 1\] did not finish"):
        run_ranks(_hang, 2, timeout=0.5)
