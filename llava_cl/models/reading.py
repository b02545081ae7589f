"""Reading checkpoints of transformers: the weights in one go, and every key that does not fit as an error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    get_verbosity,
    is_progress_bar_enabled,
    set_verbosity,
    set_verbosity_error,
)

from llava_cl.config import ModelConfig
from llava_cl.errors import InputError
from llava_cl.models.contract import ImageSpec
from llava_cl.store import read_json
from llava_cl.store.fingerprint import model_files

_LISTED = 10


def read_config(config: ModelConfig, model_types: tuple[str, ...]) -> dict[str, Any]:
    """The content of a checkpoint's `config.json`.

    Raises:
        InputError: there is none, or it is of another kind of model.
    """
    file = config.path / "config.json"
    if not file.is_file():
        raise InputError(
            f"model.path: {config.path} holds no config.json; give the folder of a {config.family} checkpoint."
        )
    content: dict[str, Any] = read_json(file)
    kind = content.get("model_type")
    if kind not in model_types:
        kinds = " or ".join(f"'{known}'" for known in model_types)
        raise InputError(f"{file}: model_type is '{kind}', expected {kinds}.")
    return content


def normalisation(folder: Path) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of a checkpoint's image processor.

    Raises:
        InputError: the file that states them is missing or lacks them.
    """
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        raise InputError(f"{file}: missing; it states the mean and standard deviation of the images.")
    processor = read_json(file)
    missing = [f"{file}: {key} is missing." for key in ("image_mean", "image_std") if key not in processor]
    if missing:
        raise InputError(*missing)
    return tuple(processor["image_mean"]), tuple(processor["image_std"])


def processor_config(kind: str, images: ImageSpec) -> dict[str, Any]:
    """The content of `preprocessor_config.json` for images that are resized to a square."""
    side = {"height": images.size, "width": images.size}
    steps = {"do_resize": True, "do_rescale": True, "do_normalize": True}
    values = {"image_mean": list(images.mean), "image_std": list(images.std), "size": side}
    return {"image_processor_type": kind, **steps, **values}


def read_model(
    model_class: type[PreTrainedModel], folder: Path, settings: ModelConfig, device: torch.device, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """A model with the weights of a folder, and the keys that do not fit, by kind.

    On the meta device keys and shapes are compared and no weights are kept; on others they are read to host memory.

    Raises:
        InputError: the weights are missing or damaged, or an index of them names a file outside the folder.
    """
    model_files(folder)
    if device.type == "meta":
        options["device_map"] = "meta"
    try:
        with _quiet():
            loaded: Any = model_class.from_pretrained(
                None if "state_dict" in options else folder,
                dtype=settings.dtype,
                attn_implementation=settings.attention,
                local_files_only=True,
                weights_only=True,
                output_loading_info=True,
                # They are listed with the other problems then.
                ignore_mismatched_sizes=True,
                **options,
            )
    except (OSError, SafetensorError, UnpicklingError) as error:
        raise InputError(f"{folder}: the weights cannot be read ({error}).") from error
    model, info = loaded
    return model, dict(info)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar, and without its report on keys, which are told as errors here."""
    verbosity, bar = get_verbosity(), is_progress_bar_enabled()
    set_verbosity_error()
    disable_progress_bar()
    try:
        yield
    finally:
        set_verbosity(verbosity)
        if bar:
            enable_progress_bar()


def complain(folder: Path, problems: dict[str, Any]) -> None:
    """Raises InputError if there are keys that do not fit, naming the first ones of each kind."""
    messages = [
        f"{folder}: {kind.replace('_', ' ')}: {', '.join(sorted(map(str, keys))[:_LISTED])}; the weights do not "
        "fit config.json, give a complete checkpoint of one model."
        for kind, keys in problems.items()
        if keys
    ]
    if messages:
        raise InputError(*messages)
