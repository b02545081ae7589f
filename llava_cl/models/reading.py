"""Reading checkpoints of transformers: the weights in one go, and every key that does not fit as an error."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    get_verbosity,
    is_progress_bar_enabled,
    set_verbosity,
    set_verbosity_error,
)

from llava_cl.config import ModelConfig
from llava_cl.errors import InputError, LlavaClError
from llava_cl.models.contract import ImageSpec
from llava_cl.parsing import foreign, shown
from llava_cl.store import read_json
from llava_cl.store.fingerprint import indexed_files, model_files

_LISTED = 10
_LONGEST = 300
"""Most characters that are told of what a library said."""
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_FLOATS = frozenset(_NAMES.values())

_VOCABULARIES = frozenset({"tokenizer.json", "tokenizer.model", "vocab.json"})
_TOKENIZER = _VOCABULARIES | {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
BUILDING = "config.json describes no model that can be built"

Channels = tuple[float, float, float]


@contextlib.contextmanager
def reading(folder: Path, what: str) -> Iterator[None]:
    """Makes whatever libraries raise over the files of a checkpoint one InputError, and keeps them quiet meanwhile.

    They parse what others wrote, and any exception can come of it; tokenizers raises `Exception` itself.
    """
    try:
        with _quiet():
            yield
    except (LlavaClError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            said = f"{error.filename}: {error.strerror}"
        else:
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{folder}: {what} ({said[:_LONGEST]}).") from error


def read_config(config: ModelConfig, model_types: tuple[str, ...]) -> dict[str, Any]:
    """The content of a checkpoint's `config.json`.

    Raises:
        InputError: there is none, or it is of another kind of model.
    """
    file = config.path / "config.json"
    if not file.is_file():
        advice = f"give the folder of a {config.family} checkpoint"
        if not config.path.exists():
            name = "/".join(config.path.parts[-2:])
            advice = f"models are not downloaded: run 'hf download {name} --local-dir {config.path}', or {advice}"
        raise InputError(f"model.path: {config.path} holds no config.json; {advice}.")
    content: dict[str, Any] = read_json(file)
    kind = content.get("model_type")
    if kind not in model_types:
        kinds = " or ".join(f"'{known}'" for known in model_types)
        raise InputError(f"{file}: model_type is {kind!r}, expected {kinds}.")
    return content


def image_processor(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file of a checkpoint that says how images are prepared, and what it says; since transformers 5 a part.

    Raises:
        InputError: neither file is there, or it is no JSON object.
    """
    file, whole = folder / "preprocessor_config.json", folder / "processor_config.json"
    if whole.is_file():
        content = read_json(whole).get("image_processor")
        if isinstance(content, dict):
            return whole, content
    if not file.is_file():
        raise InputError(f"{file}: missing; it states the mean and standard deviation of the images.")
    return file, read_json(file)


def normalisation(folder: Path) -> tuple[Channels, Channels]:
    """Mean and standard deviation of a checkpoint's image processor; raises what the functions that it calls do."""
    return mean_and_std(*image_processor(folder), "image_mean", "image_std")


def mean_and_std(
    file: Path, content: Mapping[str, Any], mean: str, std: str, above: str = ""
) -> tuple[Channels, Channels]:
    """Mean and standard deviation of the three channels, which `content` has under two keys; `above` it are others.

    Raises:
        InputError: they are missing, or not three numbers each, those of the deviation above 0.
    """
    problems = []
    for key in (mean, std):
        values = content.get(key)
        if key not in content:
            problems.append(f"{file}: {above}{key} is missing.")
        elif not isinstance(values, list) or len(values) != 3 or not all(_usable(v, key == std) for v in values):
            numbers = "three numbers above 0" if key == std else "three numbers"
            problems.append(f"{file}: {above}{key} is {shown(values)}, but must be {numbers}.")
    if problems:
        raise InputError(*problems)
    return tuple(content[mean]), tuple(content[std])


def _usable(value: Any, positive: bool) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and (value > 0 or not positive)


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        InputError: it is missing or damaged.
    """
    files = [file for file in sorted(folder.glob("*")) if file.name in _TOKENIZER]
    if not {file.name for file in files} & _VOCABULARIES:
        raise InputError(f"{folder}: holds no tokenizer: none of {', '.join(sorted(_VOCABULARIES))} is there.")
    try:
        with reading(folder, "the tokenizer cannot be loaded"):
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except InputError:
        for file in files:  # one of them may say more
            if file.suffix == ".json":
                read_json(file)
            elif what := foreign(file.read_bytes()[:512]):
                raise InputError(f"{file}: {what}.") from None
        raise


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
    check_weights(folder)
    if (folder / "generation_config.json").is_file():
        read_json(folder / "generation_config.json")  # of a damaged one transformers takes nothing, without a word
    with reading(folder, "the weights cannot be read"):
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
    model, info = loaded
    return model, dict(info)


def check_weights(folder: Path) -> None:
    """Looks at the files of a checkpoint's weights, by their index where there is one, and at their tensors' types.

    Raises:
        InputError: an index that is none, a file that is missing or damaged, or weights that are no floats.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            problems = _file_problems(folder / name)
        elif index.is_file():
            problems = [each for file in indexed_files(index) for each in _file_problems(file)]
        else:
            continue
        if problems:
            raise InputError(*problems)
        return


def _file_problems(file: Path) -> list[str]:
    """What is wrong with a file of weights, whose values are not read."""
    if not file.is_file():
        return [f"{file}: is missing; the index of the weights names it."]
    try:
        with file.open("rb") as stream:
            start = stream.read(512)
        archive = start.startswith(b"PK")  # as torch saves it
        if not archive and (what := foreign(start)):
            return [f"{file}: {what}."]
        types = _types(file, archive)
    except UnpicklingError:
        return [
            f"{file}: the weights cannot be read: damaged, or holding more than tensors, which could run code; "
            "download it again, or where you trust it save its tensors as safetensors."
        ]
    except (OSError, RuntimeError, EOFError, ValueError, AttributeError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or " ".join(str(error).split())[:_LONGEST]
        return [f"{file}: the weights cannot be read ({said or 'the file is empty'}): copy or download it again."]
    strange = {key: type_ for key, type_ in types.items() if type_ not in _FLOATS and not key.endswith("position_ids")}
    if not strange:
        return []
    key, type_ = next(iter(sorted(strange.items())))
    return [f"{file}: {len(strange)} weights are no floats ({key} is {type_}); give a checkpoint in 16 or 32 bits."]


def _types(file: Path, archive: bool) -> dict[str, str]:
    """The tensors' types by name, as safetensors calls them."""
    if file.suffix == ".bin":
        tensors = torch.load(file, map_location="meta", weights_only=True, mmap=archive)
        return {key: _NAMES.get(tensor.dtype, str(tensor.dtype)) for key, tensor in tensors.items()}
    with safe_open(file, framework="pt") as stream:
        return {key: stream.get_slice(key).get_dtype() for key in stream.keys()}  # noqa: SIM118


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
