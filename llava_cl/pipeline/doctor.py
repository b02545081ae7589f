"""What this environment has, and whether ranks can talk to each other; `python -m` runs one rank of that trial."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch

from llava_cl.distributed import all_reduce_sum, init_world, shutdown
from llava_cl.errors import InputError, problems_of
from llava_cl.evaluation.captions import check_coco_tools
from llava_cl.pipeline.launch import environment, torchrun

PACKAGES = ("llava_cl", "torch", "transformers", "peft", "deepspeed", "accelerate", "safetensors")
TRIAL_SECONDS = 120
"""How long the ranks' trial may take."""
_DEVICES = ("dev/nvidia[0-9]*", "proc/driver/nvidia/gpus/*")
LITTLE_DISK = 20e9
LITTLE_SHARED = 1e9
SHARED_MEMORY = Path("/dev/shm")
"""Where processes hand over batches, and NCCL keeps its buffers; containers have 64 MB of it unless told otherwise."""
MORE_SHARED = "Give the container more (docker run --shm-size=16g, or --ipc=host)"
_TRIAL_ADVICE = "Look for a firewall or a wrong interface (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME; NCCL_DEBUG=INFO)."

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; a "note" is something optional that is missing."""

    subject: str
    state: State
    detail: str


def versions() -> dict[str, str]:
    """Python, the platform, and the version of each package that a result depends on, or "not installed"."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def diagnose(ranks: int) -> Iterator[Finding]:
    """Looks at packages, hardware and optional tools, and sums a number over `ranks` ranks; one finding each."""
    for subject, version in versions().items():
        missing = version == "not installed"
        yield Finding(subject, *(("problem", f"{version}: install llava_cl[train]") if missing else ("ok", version)))
    yield from _hardware()
    yield _deepspeed_operators()
    yield _optional("FlashAttention-2", check_flash_attention)
    yield _optional("COCO caption metrics", check_coco_tools)
    yield _trial(ranks)


def _hardware() -> Iterator[Finding]:
    memory, disk = psutil.virtual_memory().total, shutil.disk_usage(Path.cwd()).free
    yield Finding("CPU", "ok", f"{os.cpu_count()} cores, {memory / 1e9:.0f} GB of memory")
    free = f"{disk / 1e9:.0f} GB free in {Path.cwd()}"
    if disk < LITTLE_DISK:
        yield Finding("disk", "note", f"{free}: little for a large model; llava-cl check says what a run needs")
    else:
        yield Finding("disk", "ok", free)
    if SHARED_MEMORY.is_dir():
        shared = shutil.disk_usage(SHARED_MEMORY).total
        size = f"{shared / 1e9:.2g} GB in {SHARED_MEMORY}"
        little = f"{size}: little for training.workers and for NCCL. {MORE_SHARED}"
        yield Finding("shared memory", *(("note", little) if shared < LITTLE_SHARED else ("ok", size)))
    if not torch.cuda.is_available():
        yield Finding("backend", "ok", "gloo")
        problem = next(problems_of(check_gpu), None)
        yield Finding("GPU", "problem" if problem else "note", problem or "none: runs go on the CPU")
    elif torch.distributed.is_nccl_available():
        yield Finding("backend", "ok", f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    else:
        yield Finding("backend", "problem", "this torch has no NCCL: install the build of torch for CUDA")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        bf16 = (device.major, device.minor) >= (8, 0)
        detail = f"{device.name}, {device.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"
        yield Finding(f"GPU {index}", "ok" if bf16 else "note", detail + ("" if bf16 else ", bfloat16 is slow on it"))


def _deepspeed_operators() -> Finding:
    """Which compiled operators DeepSpeed was built with; runs need none, as the optimizer is torch's."""
    try:
        from deepspeed.git_version_info import installed_ops
    except ImportError as error:
        return Finding("DeepSpeed operators", "problem", f"deepspeed cannot be imported ({error}): install it again")
    built = ", ".join(sorted(name for name, there in installed_ops.items() if there))
    return Finding("DeepSpeed operators", "ok", f"{built or 'none'} built, none needed")


def check_gpu() -> None:
    """Raises InputError, with what to do, if a run would go on the CPU, unasked, although there is a GPU."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.cuda.is_available() or asked in ("", "-1"):
        return
    devices = (str(device) for pattern in _DEVICES for device in Path("/").glob(pattern))
    sign = f"CUDA_VISIBLE_DEVICES={asked}" if asked else next(devices, None)
    if sign:
        raise InputError(
            f"{sign}: there is a GPU that torch {torch.__version__} cannot use, so that all would be computed on the "
            "CPU. Install the build of torch for its driver, or set CUDA_VISIBLE_DEVICES to nothing to have it so."
        )


def check_flash_attention() -> None:
    """Raises InputError, with what to do, if FlashAttention-2 cannot be used."""
    from transformers.utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        raise InputError("not usable here: with a GPU, install llava_cl[flash]; attention: sdpa needs nothing.")


def _optional(subject: str, check: Callable[[], None]) -> Finding:
    try:
        check()
    except InputError as error:
        return Finding(subject, "note", str(error))
    return Finding(subject, "ok", "usable")


def _trial(ranks: int) -> Finding:
    subject = f"{ranks} ranks" if ranks > 1 else "1 rank"
    try:
        trial = subprocess.run(
            [*torchrun(ranks), "-m", __spec__.name],
            env=environment(ranks),
            capture_output=True,
            text=True,
            timeout=TRIAL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return Finding(subject, "problem", f"had not summed one number after {TRIAL_SECONDS} s. {_TRIAL_ADVICE}")
    if trial.returncode:
        said = trial.stderr.strip()[-2000:]
        return Finding(subject, "problem", f"could not sum one number. {_TRIAL_ADVICE}\n{said}")
    return Finding(subject, "ok", trial.stdout.strip())


def _rank() -> None:
    """Sums the ranks' numbers over all of them; rank 0 says how."""
    world = init_world(use_deepspeed=False, timeout_minutes=1)
    total = all_reduce_sum(torch.tensor(float(world.rank + 1), device=world.device), world)
    expected = world.size * (world.size + 1) / 2
    if total.item() != expected:
        raise RuntimeError(f"the sum over {world.size} ranks is {total.item()}, not {expected}")
    if world.is_main:
        how = f"summed a number over {torch.distributed.get_backend()}" if world.size > 1 else "started"
        print(how)  # noqa: T201 - what the parent process reads
    shutdown()


if __name__ == "__main__":
    _rank()
