"""Tensors on disk: exact, the same bytes from every process, and never half read."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_cl.errors import InputError
from llava_cl.store import load_tensors, load_tensors_metadata, save_tensors

METADATA = {"scale": 0.5, "layers": ["b", "a"], "none": None, "nested": {"y": 1, "x": 2}}


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "b": torch.randn(3, 4, generator=generator),
        "a": torch.randn(4, 3, generator=generator).bfloat16(),
        "transposed": torch.randn(5, 2, generator=generator).T,
        "empty": torch.zeros(6, 0),
        "trained": torch.nn.Parameter(torch.ones(2)),
    }


def test_tensors_and_metadata_come_back_as_they_were(tmp_path: Path) -> None:
    save_tensors(tmp_path / "file.safetensors", _tensors(), METADATA)
    loaded, metadata = load_tensors(tmp_path / "file.safetensors")
    assert metadata == METADATA == load_tensors_metadata(tmp_path / "file.safetensors")
    assert loaded.keys() == _tensors().keys()
    for name, tensor in _tensors().items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert list(tmp_path.iterdir()) == [tmp_path / "file.safetensors"]


def test_bytes_are_the_same_from_every_process(tmp_path: Path) -> None:
    save_tensors(tmp_path / "here", _tensors(), METADATA)
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; import pathlib, {__name__} as own;"
        "own.save_tensors(pathlib.Path(sys.argv[1]), dict(reversed(own._tensors().items())), own.METADATA)"
    )
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "there"], env={**os.environ, "PYTHONHASHSEED": seed}, check=True
    )
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
@pytest.mark.parametrize("load", [load_tensors, load_tensors_metadata])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: int, load: Callable[[Path], Any]) -> None:
    file = tmp_path / "file.safetensors"
    save_tensors(file, _tensors(), METADATA)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InputError, match="not a readable safetensors file") as error:
        load(file)
    assert str(file) in str(error.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        load_tensors(tmp_path / "nowhere")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "file.safetensors"
    save_tensors(file, _tensors(), METADATA)
    before = file.read_bytes()
    with pytest.raises(TypeError):
        save_tensors(file, {}, {"not json": object()})
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
