"""Runs a function on several gloo ranks on the CPU, each forked from a server that has imported everything."""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import os
import pickle
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from llava_cl.distributed import free_port, init_world

_PRELOADED = [
    "deepspeed",
    "deepspeed.module_inject",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "peft",
    "pytest",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava",
    "llava_cl.models.llava",
    "llava_cl.pipeline.orchestrator",
    "llava_cl.pipeline.stage",
    "llava_cl.training.adapters",
    "llava_cl.training.statistics",
    "llava_cl.training.trainer",
]

TIMEOUT_MINUTES = 2
"""How long a rank waits for another."""


class RankFailed(Exception):
    """A rank raised, died, or did not finish in time; the message holds its traceback."""


def forkserver() -> multiprocessing.context.ForkServerContext:
    """Starts processes that have imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def run_ranks(
    function: Callable[..., Any], size: int, *args: Any, use_deepspeed: bool = False, timeout: float = 120
) -> list[Any]:
    """Calls `function(world, *args)` on `size` ranks that have joined one process group.

    Args:
        function: importable from its module; runs in processes of its own, so it returns what is to be checked.
        size: number of ranks.
        args: passed on; pickled, as is the result.
        use_deepspeed: join the process group through DeepSpeed.
        timeout: seconds after which all ranks are killed.

    Returns:
        The results in rank order.

    Raises:
        RankFailed: with the traceback of the first rank that failed; the other ranks are killed.
    """
    context = forkserver()
    payload = pickle.dumps((function, args))
    port = free_port()
    processes: list[Any] = []
    pending: dict[multiprocessing.connection.Connection, int] = {}
    try:
        for rank in range(size):
            receiver, sender = context.Pipe(duplex=False)
            # No daemons, which could start no processes that read data.
            process = context.Process(target=_rank, args=(sender, payload, rank, size, port, use_deepspeed))
            process.start()
            sender.close()
            processes.append(process)
            pending[receiver] = rank
        return _results(pending, processes, time.monotonic() + timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()
            process.close()


def _results(
    pending: dict[multiprocessing.connection.Connection, int], processes: list[Any], deadline: float
) -> list[Any]:
    results: list[Any] = [None] * len(pending)
    while pending:
        ready = multiprocessing.connection.wait(list(pending), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailed(f"ranks {sorted(pending.values())} did not finish in time")
        for receiver in ready:
            assert isinstance(receiver, multiprocessing.connection.Connection)
            rank = pending.pop(receiver)
            try:
                succeeded, results[rank] = pickle.loads(receiver.recv_bytes())
            except EOFError:
                processes[rank].join()
                raise RankFailed(f"rank {rank} died with {processes[rank].exitcode}") from None
            finally:
                receiver.close()
            if not succeeded:
                raise RankFailed(f"rank {rank}:\n{results[rank]}")
    return results


def _rank(
    sender: multiprocessing.connection.Connection, payload: bytes, rank: int, size: int, port: int, use_deepspeed: bool
) -> None:
    """One rank: the environment that torchrun sets, the process group, the function, and the answer."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # DeepSpeed collects garbage often, and would walk over all that the server has imported.
    gc.freeze()
    try:
        function, args = pickle.loads(payload)
        world = init_world(use_deepspeed=use_deepspeed, timeout_minutes=TIMEOUT_MINUTES)
        answer = pickle.dumps((True, function(world, *args)))
    except Exception:  # noqa: BLE001 - raised again in the parent
        answer = pickle.dumps((False, traceback.format_exc()))
    sender.send_bytes(answer)
    # A normal exit could wait for ranks that wait for this one.
    os._exit(0)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
