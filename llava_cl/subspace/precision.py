"""Float32 products at float32, whatever reduced precisions a process allows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Switches TF32, bfloat16 products and autocast off inside, and leaves all settings as they were before.

    Of the old and the new settings of torch, set so that they contradict each other, the new ones are left so. A new
    one that followed the setting of all backends keeps its value, and follows no more.
    """
    backends: Any = torch.backends
    flags = [backends.cuda.matmul, backends.mkldnn.matmul]
    precisions = [flag.fp32_precision for flag in flags]
    legacy = _legacy_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
        for flag, precision in zip(flags, precisions, strict=True):
            flag.fp32_precision = precision


def _legacy_precision() -> str | None:
    """The global setting; None where the backends' flags differ from it, as torch then refuses to tell it."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
