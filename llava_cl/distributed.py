"""The process group: ranks, devices, and the few collectives that the package uses."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

_Item = TypeVar("_Item", str, int)
_NO_MEMORY = re.compile(
    r"out of memory|cannot allocate memory|can't allocate memory|not enough memory|failed to cuda c?m?alloc"
    r"|alloc(ation)?_failed|err_(host|device)_alloc|cublas_status_not_initialized|cudaerrormemoryallocation",
    re.IGNORECASE,
)
"""As torch, CUDA, its libraries and NCCL say it; cuBLAS is not initialised where its handle finds no room."""


@dataclass(frozen=True)
class World:
    """This process among all: its rank, how many there are, its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes the files."""
        return self.rank == 0


def init_world(*, use_deepspeed: bool, timeout_minutes: float = 30) -> World:
    """Joins the process group that torchrun's environment variables describe; alone without them.

    Args:
        use_deepspeed: initialise through DeepSpeed, which must happen before its engines are built.
        timeout_minutes: a collective that waits longer fails, so that a dead rank cannot hang the job.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    backend = "nccl" if cuda else "gloo"
    if use_deepspeed:
        _init_deepspeed(backend, timeout)
    elif size > 1:
        dist.init_process_group(backend, timeout=timeout)
    return World(rank, size, device)


def _init_deepspeed(backend: str, timeout: datetime.timedelta) -> None:
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
        )
    if backend == "gloo":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed import ops
    from deepspeed.utils import groups
    from torch.distributed import distributed_c10d

    if backend == "gloo":
        # Otherwise the first use compiles a shared-memory collective for a minute.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    # ZeRO works in a copy of the world's group, which torch would give its own default timeout.
    distributed_c10d._set_pg_timeout(timeout, groups._clone_world_group())


def free_port() -> int:
    """A TCP port of this host that is free now."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def be_deterministic() -> None:
    """Makes torch give the same bits each time on the same GPUs; call it before CUDA starts.

    Kernels that add up in no fixed order, as in attention's backward, give way to slower ones. An operation that has
    no other kernel ends the run; torch names it.
    """
    os.environ.update(CUBLAS_WORKSPACE_CONFIG=":4096:8", FLASH_ATTENTION_DETERMINISTIC="1")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of a GPU or of the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and _NO_MEMORY.search(str(error)) is not None


def shutdown() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def share_out(costs: Mapping[_Item, float], size: int) -> dict[_Item, int]:
    """Gives each item an owner rank so that the ranks' total costs are even (longest first).

    Args:
        costs: item -> cost, in any unit.
        size: number of ranks.

    Returns:
        item -> rank; the same on every rank.
    """
    loads = [0.0] * size
    owners: dict[_Item, int] = {}
    for name in sorted(costs, key=lambda item: (-costs[item], item)):
        owner = loads.index(min(loads))
        owners[name] = owner
        loads[owner] += costs[name]
    return owners


def reduce_sums(sums: Mapping[str, torch.Tensor], owners: Mapping[str, int], world: World) -> None:
    """Sums each tensor over the ranks into its owner's copy, in place; other copies become undefined.

    Reducing to the one rank that needs the sum moves half the bytes of an all-reduce.
    """
    if world.size == 1:
        return
    for name in sorted(sums):
        dist.reduce(sums[name], dst=owners[name])


def all_reduce_sum(value: torch.Tensor, world: World) -> torch.Tensor:
    """The sum of `value` over the ranks, in place."""
    if world.size > 1:
        dist.all_reduce(value)
    return value


def gather_objects(value: Any, world: World) -> list[Any]:
    """Every rank's small Python value, in rank order, on every rank."""
    if world.size == 1:
        return [value]
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, value)
    return gathered


def any_rank(decision: bool, world: World) -> bool:
    """Whether any rank has decided so, on every rank."""
    if world.size == 1:
        return decision
    value = torch.tensor(float(decision), device=world.device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value)


def collect_tensors(
    owned: Mapping[str, torch.Tensor], owners: Mapping[str, int], world: World
) -> dict[str, torch.Tensor]:
    """Sends each owner's tensors to rank 0, one after the other: no device holds a second one of another rank.

    Args:
        owned: this rank's tensors by name; names that no rank holds are left out of the result.
        owners: name -> owner rank.

    Returns:
        All tensors by name in host memory on rank 0, none on the others.
    """
    parts = gather_objects({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in owned.items()}, world)
    result: dict[str, torch.Tensor] = {}
    for name, (shape, dtype) in sorted((name, like) for part in parts for name, like in part.items()):
        tensor = owned[name].to(world.device).contiguous() if name in owned else None
        if tensor is None and world.is_main:
            tensor = torch.empty(shape, dtype=dtype, device=world.device)
            if tensor.numel():
                dist.recv(tensor, src=owners[name])
        elif tensor is not None and tensor.numel() and not world.is_main:
            dist.send(tensor, dst=0)
        if tensor is not None and world.is_main:
            result[name] = tensor.cpu()
    return result


def share_tensors(tensors: Mapping[str, torch.Tensor], owners: Mapping[str, int], world: World) -> None:
    """Gives every rank each owner's values, in place; all ranks have all tensors."""
    if world.size == 1:
        return
    for name in sorted(tensors):
        dist.broadcast(tensors[name].detach(), src=owners[name])


def barrier(world: World) -> None:
    """Waits for all ranks."""
    if world.size > 1:
        dist.barrier()


def local_share(items: Sequence[Any], world: World) -> list[Any]:
    """This rank's items, dealt round-robin; shares differ by one at the most."""
    return list(items[world.rank :: world.size])
