"""Tensors on disk: safetensors files whose bytes depend on their content alone."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llava_cl.errors import InputError
from llava_cl.store.files import atomic_path

_METADATA = "llava_cl"


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes tensors atomically, with metadata as one JSON string.

    One metadata entry, because safetensors writes several in an order that changes from process to process.
    """
    on_cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(on_cpu, temporary, metadata={_METADATA: json.dumps(dict(metadata), sort_keys=True)})


class TensorFile:
    """An open file of `save_tensors`, of which each tensor is read when it is asked for.

    Attributes:
        metadata: what was stored with the tensors.
        shapes: of each tensor.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.metadata: dict[str, Any] = json.loads((stream.metadata() or {}).get(_METADATA, "{}"))
        self.shapes = {name: tuple(stream.get_slice(name).get_shape()) for name in stream.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._stream.get_tensor(name)
        return tensor


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Opens a file of `save_tensors`.

    Raises:
        InputError: missing or damaged.
    """
    try:
        path.open("rb").close()  # safetensors says of every file it may not read that there is none
        with safe_open(path, framework="pt") as stream:
            yield TensorFile(stream)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}).") from error


def load_tensors(path: Path, names: Collection[str] | None = None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads tensors (all, or those of `names` that are there) and the metadata of a file of `save_tensors`.

    Raises:
        InputError: missing or damaged.
    """
    with open_tensors(path) as file:
        return {name: file[name] for name in file.shapes if names is None or name in names}, file.metadata


def load_tensors_metadata(path: Path) -> dict[str, Any]:
    """Reads the metadata alone."""
    with open_tensors(path) as file:
        return file.metadata
