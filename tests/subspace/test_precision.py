"""Reduced precision is off inside, and every setting is as before afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from llava_cl.subspace import full_precision


def _settings() -> list[str]:
    """What can be read; torch refuses to tell the global ones where they contradict a backend's."""
    readings: list[Callable[[], object]] = [
        torch.get_float32_matmul_precision,
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: torch.is_autocast_enabled("cpu"),
        lambda: torch.is_autocast_enabled("cuda"),
        lambda: torch.backends.cuda.matmul.fp32_precision,
        lambda: torch.backends.mkldnn.matmul.fp32_precision,
        lambda: torch.backends.fp32_precision,
    ]
    found = []
    for read in readings:
        try:
            found.append(str(read()))
        except RuntimeError:
            found.append("refused")
    return found


@pytest.fixture(autouse=True)
def _back() -> Iterator[None]:
    yield
    torch.set_autocast_enabled("cuda", False)
    torch.set_float32_matmul_precision("highest")
    for flag in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        flag.fp32_precision = "none"


def _check() -> None:
    # As a block of `torch.autocast("cuda")` does, which without a GPU does nothing.
    torch.set_autocast_enabled("cuda", True)
    before = _settings()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(KeyError), full_precision():
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_enabled("cuda")
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        raise KeyError
    assert _settings() == before


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_after_the_global_setting(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    _check()


@pytest.mark.parametrize("allowed", [True, False])
def test_after_the_setting_of_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed
    _check()


def test_untouched() -> None:
    _check()


@pytest.mark.parametrize("cuda", ["none", "ieee", "tf32"])
@pytest.mark.parametrize("cpu", ["none", "ieee", "bf16"])
def test_after_the_settings_of_the_backends(cuda: str, cpu: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = cuda
    torch.backends.mkldnn.matmul.fp32_precision = cpu
    _check()


def test_after_the_setting_of_all_backends() -> None:
    torch.backends.fp32_precision = "tf32"
    _check()
