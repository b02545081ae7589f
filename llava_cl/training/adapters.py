"""LoRA adapters of a stage: attaching them with PEFT, storing them, replaying stored ones on a base model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from llava_cl import config as configuration
from llava_cl.errors import InputError
from llava_cl.methods import LoraFactors
from llava_cl.store import TensorFile, load_tensors, open_tensors, save_tensors, write_text

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
        train_a: train A beside B, which must then start from zero.
        projector: qualified name of a module that is trained whole beside the adapters, or None.
        fp32_adapters: keep adapters in fp32 over a bf16 base (DeepSpeed keeps fp32 masters itself).
    """
    peft_model = wrap(model, factors, lora, train_a=train_a, projector=projector, fp32_adapters=fp32_adapters)
    scale = lora.alpha / lora.rank
    with torch.no_grad():
        for name, start in factors.items():
            a, b = _factors(peft_model, name)
            a.copy_(start.a)
            b.copy_(start.b)
            if b.any():
                weight = peft_model.get_parameter(f"{_PREFIX}{name}.base_layer.weight")
                weight.copy_(weight.float() - scale * b.float() @ a.float())
    return peft_model


def wrap(
    model: PreTrainedModel,
    names: Collection[str],
    lora: configuration.LoraConfig,
    *,
    train_a: bool,
    projector: str | None,
    fp32_adapters: bool,
) -> PeftModel:
    """What `attach` makes, before its adapters of the named layers have values."""
    config = _peft_config(sorted(names), lora, projector)
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=fp32_adapters)
    for a in trained_a(peft_model, names).values():
        a.requires_grad_(train_a)
    return peft_model


def _factors(peft_model: PeftModel, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B of a layer's adapter."""
    a, b = (peft_model.get_parameter(f"{_PREFIX}{name}.{part}.{_ADAPTER}.weight") for part in ("lora_A", "lora_B"))
    return a, b


def install(model: PreTrainedModel, values: Mapping[str, torch.Tensor]) -> None:
    """Gives a model new parameters in place of its own, by qualified name; other users of the old ones keep them."""
    for name, value in values.items():
        parent, _, leaf = name.rpartition(".")
        own = model.get_parameter(name)
        new = nn.Parameter(value.to(own), requires_grad=own.requires_grad)
        model.get_submodule(parent).register_parameter(leaf, new)


def trained_a(peft_model: PeftModel, names: Collection[str]) -> dict[str, nn.Parameter]:
    """Layer -> the parameter A of its adapter."""
    return {name: _factors(peft_model, name)[0] for name in names}


def _peft_config(names: Sequence[str], lora: configuration.LoraConfig, projector: str | None) -> LoraConfig:
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT only divides it by the rank
        lora_dropout=lora.dropout,
        target_modules=list(names),
        modules_to_save=[projector] if projector else None,
        init_lora_weights=False,
        bias="none",
    )


def collect(
    peft_model: PeftModel, start: Mapping[str, LoraFactors], projector: str | None, *, train_a: bool
) -> dict[str, torch.Tensor]:
    """The trained tensors by PEFT's key, fp32 on the CPU, whole under every ZeRO stage; call it on all ranks.

    `scale * B @ A` is what training added. So B is stored less its start; where A was trained, too, the start follows
    the trained factors with a minus, as further rows of A and columns of B.
    """
    tensors: dict[str, torch.Tensor] = {}
    carried = train_a and any(begin.b.any() for begin in start.values())
    for name, begin in start.items():
        a, b = _factors(peft_model, name)
        with _gathered([a, b]):
            last = LoraFactors(a.detach().float().cpu().clone(), b.detach().float().cpu().clone())
        # The start is rounded as the factors are: what training did not change must be zero.
        first = LoraFactors(begin.a.cpu().to(a.dtype).float(), begin.b.cpu().to(b.dtype).float())
        if not train_a:
            last = LoraFactors(last.a, last.b - first.b)
        elif carried:
            last = LoraFactors(torch.cat([last.a, first.a]), torch.cat([last.b, -first.b], dim=1))
        tensors[f"{_PREFIX}{name}.lora_A.weight"], tensors[f"{_PREFIX}{name}.lora_B.weight"] = last
    if projector:
        module = peft_model.get_submodule(f"{_PREFIX}{projector}.modules_to_save.{_ADAPTER}")
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
    metadata = {"layers": sorted(names), "scale": scale, "projector": projector, "rank": lora.rank}
    save_tensors(folder / _WEIGHTS, tensors, metadata)
    stored = tensors[f"{_PREFIX}{names[0]}.lora_A.weight"].shape[0]
    whole = configuration.LoraConfig(rank=stored, alpha=scale * stored)
    content = _peft_config(sorted(names), whole, projector).to_dict()
    content["target_modules"] = sorted(names)
    content["inference_mode"] = True
    write_text(folder / _CONFIG, json.dumps(content, indent=1, sort_keys=True) + "\n")
    return [folder / _WEIGHTS, folder / _CONFIG]


def load_factors(folder: Path, names: Collection[str]) -> dict[str, LoraFactors]:
    """The trained factors of some layers, from a folder of `save_adapter`.

    Where B did not start at zero and A was frozen, its start is not known any more: B is what training added.
    """
    keys = {name: [f"{_PREFIX}{name}.{part}.weight" for part in ("lora_A", "lora_B")] for name in names}
    tensors, metadata = load_tensors(folder / _WEIGHTS, [key for pair in keys.values() for key in pair])
    rank = metadata["rank"]
    return {name: LoraFactors(tensors[a][:rank], tensors[b][:, :rank]) for name, (a, b) in keys.items()}


def combine(folders: Sequence[Path], folder: Path) -> None:
    """Writes the adapters of several stages as one, whose update is the sum of theirs.

    Its A and B are theirs side by side, so its rank is the sum of their ranks.

    Args:
        folders: adapter folders in the order of the stages; one scale, and the same layers in each.
        folder: where the combined adapter is written.
    """
    adapters = [load_tensors(part / _WEIGHTS) for part in folders]
    names = adapters[0][1]["layers"]
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        for part, along in (("lora_A", 0), ("lora_B", 1)):
            key = f"{_PREFIX}{name}.{part}.weight"
            tensors[key] = torch.cat([own[key] for own, _ in adapters], dim=along)
    projector = None
    for own, metadata in adapters:
        if metadata["projector"]:
            projector = metadata["projector"]
            tensors.update({key: own[key] for key in own if key.startswith(f"{_PREFIX}{projector}.")})
    rank = tensors[f"{_PREFIX}{names[0]}.lora_A.weight"].shape[0]
    scale = adapters[0][1]["scale"]
    save_adapter(folder, tensors, names, configuration.LoraConfig(rank=rank, alpha=scale * rank), projector)


def replay(
    model: PreTrainedModel,
    folders: Sequence[Path],
    layers: Collection[str] | None = None,
) -> None:
    """Gives a model the weights of its base plus the stored deltas, and the modules trained beside them.

    All deltas of a weight are summed in fp32 with the base weight and rounded to its dtype once. Side by side their
    factors are one product, and one layer is read at a time.

    Args:
        model: changed in place.
        folders: adapter folders in the order of the stages.
        layers: the layers to change; default all that have an adapter.

    Raises:
        InputError: adapters that do not fit the model, all named.
    """
    parameters = dict(model.named_parameters())
    with contextlib.ExitStack() as stack, torch.no_grad():
        files = [stack.enter_context(open_tensors(folder / _WEIGHTS)) for folder in folders]
        problems = [
            f"{folder}: {problem}; the adapter was made for another base model, or the file is not an adapter's."
            for folder, file in zip(folders, files, strict=True)
            for problem in _misfits(parameters, file)
        ]
        if problems:
            raise InputError(*problems)
        for name in sorted({name for file in files for name in file.metadata["layers"]}):
            if layers is None or name in layers:
                weight = parameters[f"{name}.weight"]
                weight.copy_(
                    weight.float().addmm(*_deltas([f for f in files if name in f.metadata["layers"]], name, weight))
                )
        for file in files:
            if file.metadata["projector"]:
                for name in _below(file.metadata["projector"], parameters):
                    parameters[name].copy_(file[_PREFIX + name])


def _deltas(files: Sequence[TensorFile], name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """B with its scale and A of a layer in several files, side by side."""
    a = [file[f"{_PREFIX}{name}.lora_A.weight"].to(weight.device) for file in files]
    b = [file[f"{_PREFIX}{name}.lora_B.weight"].to(weight.device) * file.metadata["scale"] for file in files]
    return torch.cat(b, dim=1), torch.cat(a)


def _below(module: str, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    return [name for name in parameters if name.startswith(f"{module}.")]


def _misfits(parameters: Mapping[str, nn.Parameter], file: TensorFile) -> Iterator[str]:
    """What of a stored adapter is missing or has another shape than the model's parameters."""
    metadata, shapes = file.metadata, file.shapes
    if not {"layers", "scale", "projector"} <= metadata.keys():
        yield "the layers, the scale and the projector are not stated in the metadata"
        return
    for name in metadata["layers"]:
        weight = parameters.get(f"{name}.weight")
        a, b = shapes.get(f"{_PREFIX}{name}.lora_A.weight"), shapes.get(f"{_PREFIX}{name}.lora_B.weight")
        if weight is None or a is None or b is None:
            yield f"{name} is missing in the {'model' if weight is None else 'file'}"
        elif (b[0], a[1]) != tuple(weight.shape) or a[0] != b[1]:
            yield f"{name} has B {b} and A {a}, the model's weight is {tuple(weight.shape)}"
    projector = metadata["projector"]
    if projector:
        names = _below(projector, parameters)
        if not names:
            yield f"{projector} is missing in the model"
        for name in names:
            stored, own = shapes.get(_PREFIX + name), tuple(parameters[name].shape)
            if stored != own:
                yield f"{name} is {stored or 'missing'}, the model's is {own}"
