"""A GPU that is none: tensors that compute on the CPU, and refuse to meet those of the CPU as those of a GPU do.

Its device is called `meta`, the only one beside `cpu` that every build of torch lets a tensor have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
GPU = torch.device("meta")
_MOVES = (aten._to_copy.default, aten.copy_.default)
_INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
"""An index may be on the CPU."""


class OnGpu(torch.Tensor):
    """A tensor of the pretended GPU around one of the CPU, `content`."""

    content: torch.Tensor

    @staticmethod
    def __new__(cls, real: torch.Tensor) -> OnGpu:
        return torch.Tensor._make_wrapper_subclass(
            cls, real.size(), strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype, device=GPU
        )

    def __init__(self, real: torch.Tensor) -> None:
        self.content = real

    def tolist(self) -> Any:
        return self.content.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with PretendGpu():
            return func(*args, **(kwargs or {}))


class _Made(TorchFunctionMode):
    """Makes tensors of lists, for which torch asks no mode of operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        made = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor)
        if made and kwargs.get("device") is not None and torch.device(kwargs["device"]) == GPU:
            return OnGpu(func(*args, **{**kwargs, "device": None}))
        return func(*args, **kwargs)


class PretendGpu(TorchDispatchMode):
    """Inside, its device makes tensors of the pretended GPU."""

    def __enter__(self) -> PretendGpu:
        self._made = _Made()
        self._made.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._made.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        on_gpu = any(isinstance(each, OnGpu) for each in tensors)
        moved = func in _MOVES or func in _INDEXING
        if on_gpu and not moved and any(each.ndim and not isinstance(each, OnGpu) for each in tensors):
            raise RuntimeError(f"{func}: tensors of the CPU and of the GPU")
        if func is aten._fused_sdp_choice.default:
            return 0
        if "device" in kwargs and kwargs["device"] is not None:
            on_gpu = torch.device(kwargs["device"]).type == "meta"
            kwargs["device"] = torch.device("cpu") if on_gpu else kwargs["device"]
            kwargs.pop("pin_memory", None)
        made = func(*tree_map(_real, args), **tree_map(_real, kwargs))
        if func in (aten.copy_.default, aten.index_put_.default):
            return args[0]
        own = {id(each.content): each for each in tensors if isinstance(each, OnGpu)}
        return tree_map(lambda each: own[id(each)] if id(each) in own else _put(each), made) if on_gpu else made


def _real(value: Any) -> Any:
    return value.content if isinstance(value, OnGpu) else value


def _put(value: Any) -> Any:
    return OnGpu(value) if isinstance(value, torch.Tensor) and not isinstance(value, OnGpu) else value


def on_gpu(model: Any) -> Any:
    """A model of the CPU whose parameters and buffers are put on the pretended GPU, in place."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(OnGpu(parameter.detach()), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = OnGpu(buffer)
    return model
