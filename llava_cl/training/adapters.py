"""LoRA adapters of a stage: attaching them with PEFT, storing them, replaying stored ones on a base model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from llava_cl import config as configuration
from llava_cl.errors import InputError
from llava_cl.methods import LoraFactors
from llava_cl.store import load_tensors, save_tensors, write_text

_ADAPTER = "default"
_PREFIX = "base_model.model."
_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"


@contextlib.contextmanager
def _gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Makes ZeRO-3 parameters whole, for reading, inside the block; a no-op for ordinary ones."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def attach(
    model: PreTrainedModel,
    factors: Mapping[str, LoraFactors],
    lora: configuration.LoraConfig,
    *,
    train_a: bool,
    projector: str | None,
    fp32_adapters: bool,
) -> PeftModel:
    """Puts LoRA adapters with given factors on a frozen model.

    Args:
        model: the model; `scale * b @ a` of a start with b != 0 is taken off its weight.
        factors: layer name -> start of its adapter.
        lora: rank, alpha and dropout.
        train_a: train A beside B.
        projector: qualified name of a module that is trained whole beside the adapters, or None.
        fp32_adapters: keep adapters in fp32 over a bf16 base (DeepSpeed keeps fp32 masters itself).
    """
    config = _peft_config(sorted(factors), lora, projector)
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=fp32_adapters)
    scale = lora.alpha / lora.rank
    with torch.no_grad():
        for name, start in factors.items():
            layer = peft_model.get_submodule(_PREFIX + name)
            a, b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
            a.copy_(start.a)
            b.copy_(start.b)
            a.requires_grad_(train_a)
            if start.b.any():
                weight = layer.base_layer.weight
                weight.copy_(weight.float() - scale * start.b.to(weight.device) @ start.a.to(weight.device))
    return peft_model


def _peft_config(names: Sequence[str], lora: configuration.LoraConfig, projector: str | None) -> LoraConfig:
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(names),
        modules_to_save=[projector] if projector else None,
        init_lora_weights=False,
        bias="none",
    )


def collect(peft_model: PeftModel, start: Mapping[str, LoraFactors], projector: str | None) -> dict[str, torch.Tensor]:
    """The trained tensors by PEFT's key, fp32 on the CPU, whole under every ZeRO stage; call it on all ranks.

    B is stored less its start, so that `scale * B @ A` is what training added.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, begin in start.items():
        layer = peft_model.get_submodule(_PREFIX + name)
        a, b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        with _gathered([a, b]):
            tensors[f"{_PREFIX}{name}.lora_A.weight"] = a.detach().float().cpu().clone()
            tensors[f"{_PREFIX}{name}.lora_B.weight"] = b.detach().float().cpu() - begin.b.cpu()
    if projector:
        module = peft_model.get_submodule(_PREFIX + projector).modules_to_save[_ADAPTER]
        for name, parameter in module.named_parameters():
            with _gathered([parameter]):
                tensors[f"{_PREFIX}{projector}.{name}"] = parameter.detach().float().cpu().clone()
    return tensors


def save_adapter(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    names: Sequence[str],
    lora: configuration.LoraConfig,
    projector: str | None,
) -> list[Path]:
    """Writes an adapter folder that `PeftModel.from_pretrained` also reads; returns its files."""
    scale = lora.alpha / lora.rank
    save_tensors(folder / _WEIGHTS, tensors, {"layers": sorted(names), "scale": scale, "projector": projector})
    content = _peft_config(sorted(names), lora, projector).to_dict()
    content["target_modules"] = sorted(names)
    content["inference_mode"] = True
    write_text(folder / _CONFIG, json.dumps(content, indent=1, sort_keys=True, default=str) + "\n")
    return [folder / _WEIGHTS, folder / _CONFIG]


def replay(model: PreTrainedModel, folders: Sequence[Path]) -> None:
    """Adds the stored deltas of earlier stages to a base model and installs the last stored projector.

    All deltas of a weight are summed in fp32 with the base weight and rounded to its dtype once.

    Args:
        model: the untouched base model; changed in place.
        folders: adapter folders in the order of the stages.

    Raises:
        InputError: an adapter that does not fit the model.
    """
    adapters = [load_tensors(folder / _WEIGHTS) for folder in folders]
    layers = sorted({name for _, metadata in adapters for name in metadata["layers"]})
    with torch.no_grad():
        for name in layers:
            weight = model.get_submodule(name).weight
            total = weight.float()
            for (tensors, metadata), folder in zip(adapters, folders, strict=True):
                a = tensors[f"{_PREFIX}{name}.lora_A.weight"].to(weight.device)
                b = tensors[f"{_PREFIX}{name}.lora_B.weight"].to(weight.device)
                if (b.shape[0], a.shape[1]) != tuple(weight.shape):
                    raise InputError(
                        f"{folder}: the adapter of {name} is {b.shape[0]} x {a.shape[1]}, the model's weight "
                        f"{tuple(weight.shape)}; it was made for another base model."
                    )
                total = total.addmm(b, a, alpha=metadata["scale"])
            weight.copy_(total)
        for tensors, metadata in reversed(adapters):
            if metadata["projector"]:
                _install(model, metadata["projector"], tensors)
                break


def _install(model: PreTrainedModel, projector: str, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in model.get_submodule(projector).named_parameters():
        parameter.copy_(tensors[f"{_PREFIX}{projector}.{name}"])
