"""The checkpoint layout of timm's ViTs, as of `vit_base_patch16_224.augreg2_in21k_ft_in1k`.

One folder with `config.json` (`architecture` and `pretrained_cfg`) and `model.safetensors`, in which query, key
and value are one matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import ViTConfig

from llava_cl.errors import InputError
from llava_cl.models.reading import Channels, mean_and_std
from llava_cl.parsing import shown
from llava_cl.store import read_json

_HEAD_WIDTH = 64
"""Width of an attention head in every plain ViT of timm."""
_WEIGHTS = "model.safetensors"
_TOP = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_IN_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_QKV = ("query", "key", "value")
_HEAD = ("head.weight", "head.bias")


def is_timm(content: Mapping[str, Any]) -> bool:
    """Whether the content of a `config.json` is timm's."""
    return "architecture" in content and "pretrained_cfg" in content and "model_type" not in content


def normalisation(folder: Path) -> tuple[Channels, Channels]:
    """Mean and standard deviation of the images."""
    file = folder / "config.json"
    content = read_json(file)["pretrained_cfg"]
    if not isinstance(content, dict):
        raise InputError(f"{file}: pretrained_cfg is {shown(content)}, but must be an object.")
    return mean_and_std(file, content, "mean", "std", "pretrained_cfg.")


def architecture(folder: Path) -> ViTConfig:
    """Transformers' configuration for the shapes of the weights.

    Raises:
        InputError: the weights are missing, damaged, or not those of a plain ViT.
    """
    shapes = _shapes(folder)
    needed = ("pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    missing = [
        f"{folder / _WEIGHTS}: {key} is missing; give a plain ViT of timm." for key in needed if key not in shapes
    ]
    if missing:
        raise InputError(*missing)
    if len(shapes["patch_embed.proj.weight"]) != 4 or len(shapes["pos_embed"]) != 3:
        raise InputError(
            f"{folder / _WEIGHTS}: patch_embed.proj.weight or pos_embed has not the shape of a plain ViT's."
        )
    width, channels, patch, _ = shapes["patch_embed.proj.weight"]
    if width % _HEAD_WIDTH:
        raise InputError(f"{folder / _WEIGHTS}: {width} features are no multiple of the {_HEAD_WIDTH} of a head.")
    side = round((shapes["pos_embed"][1] - 1) ** 0.5)
    blocks = {key.split(".")[1] for key in shapes if key.startswith("blocks.")}
    return ViTConfig(
        hidden_size=width,
        num_hidden_layers=len(blocks),
        num_attention_heads=width // _HEAD_WIDTH,
        intermediate_size=shapes["blocks.0.mlp.fc1.weight"][0],
        image_size=side * patch,
        patch_size=patch,
        num_channels=channels,
        layer_norm_eps=1e-6,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights under the keys of published checkpoints of transformers; those of the head are left out.

    Raises:
        InputError: the file is missing or damaged.
    """
    with _opened(folder) as stream:
        found: dict[str, torch.Tensor] = {}
        for key in stream.keys():  # noqa: SIM118
            if key not in _HEAD:
                for name, tensor in _converted(key, stream.get_tensor(key)):
                    found[name] = tensor
        return found


def _converted(key: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """A weight under its new name, or query, key and value under theirs; an unknown key keeps its own."""
    if key in _TOP:
        return [(_TOP[key], tensor)]
    parts = key.split(".")
    if parts[0] != "blocks" or len(parts) < 4:
        return [(key, tensor)]
    block, inner, kind = f"encoder.layer.{parts[1]}", ".".join(parts[2:-1]), parts[-1]
    if inner == "attn.qkv":
        thirds = tensor.tensor_split(3)  # of any length, as what does not fit is told with the other keys
        return [
            (f"{block}.attention.attention.{name}.{kind}", third.contiguous())
            for name, third in zip(_QKV, thirds, strict=True)
        ]
    return [(f"{block}.{_IN_BLOCK[inner]}.{kind}" if inner in _IN_BLOCK else key, tensor)]


def _shapes(folder: Path) -> dict[str, list[int]]:
    with _opened(folder) as stream:
        return {key: stream.get_slice(key).get_shape() for key in stream.keys()}  # noqa: SIM118


def _opened(folder: Path) -> Any:
    file = folder / _WEIGHTS
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: the weights cannot be read ({error}).") from error
