"""What all vision-language families on transformers' own implementations share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

from llava_cl.config import ModelConfig
from llava_cl.errors import InputError
from llava_cl.models.contract import LinearTarget
from llava_cl.models.supervised import supervised
from llava_cl.store import read_json

# Linears that read the same tensor share its statistics.
_INPUT_OF_LEAF = {
    "q_proj": "attention_input",
    "k_proj": "attention_input",
    "v_proj": "attention_input",
    "o_proj": "attention_output",
    "gate_proj": "mlp_input",
    "up_proj": "mlp_input",
    "down_proj": "mlp_hidden",
}
_LISTED = 10


class VisionLanguageFamily:
    """A family whose decoder has LLaMA's blocks (see `llava_cl.models.contract.ModelFamily`).

    Attributes:
        model_class: transformers' class.
        model_types: values of `model_type` in `config.json` that the family accepts.
        decoder, projector: qualified names of the language model and of what connects vision to it.
    """

    model_class: ClassVar[type[PreTrainedModel]]
    model_types: ClassVar[tuple[str, ...]]
    decoder: ClassVar[str]
    projector: ClassVar[str]
    layouts: tuple[str, ...] = ("hf",)

    def __init__(self, config: ModelConfig) -> None:
        file = config.path / "config.json"
        if not file.is_file():
            raise InputError(
                f"model.path: {config.path} holds no config.json; give the folder of a {config.family} checkpoint."
            )
        self._content: dict[str, Any] = read_json(file)
        kind = self._content.get("model_type")
        if kind not in self.model_types:
            kinds = " or ".join(f"'{known}'" for known in self.model_types)
            raise InputError(f"{file}: model_type is '{kind}', expected {kinds}.")
        self._config = config
        self._architecture: Any = self._read_architecture()

    def _read_architecture(self) -> Any:
        return AutoConfig.from_pretrained(self._config.path, local_files_only=True)

    def folders(self) -> list[Path]:
        """The checkpoint's folder."""
        return [self._config.path]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer."""
        try:
            return AutoTokenizer.from_pretrained(self._config.path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InputError(f"{self._config.path}: the tokenizer cannot be loaded ({error}).") from error

    def _normalisation(self, folder: Path) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and standard deviation of the checkpoint's image processor."""
        file = folder / "preprocessor_config.json"
        if not file.is_file():
            raise InputError(f"{file}: missing; it states the mean and standard deviation of the images.")
        processor = read_json(file)
        missing = [f"{file}: {key} is missing." for key in ("image_mean", "image_std") if key not in processor]
        if missing:
            raise InputError(*missing)
        return tuple(processor["image_mean"]), tuple(processor["image_std"])

    def skeleton(self) -> PreTrainedModel:
        """The model without memory for its weights."""
        build: Any = self.model_class
        with torch.device("meta"):
            return build(self._architecture)

    def load(self, device: torch.device) -> PreTrainedModel:
        """The base model on `device`, frozen.

        Raises:
            InputError: the weights are missing or damaged, or do not fit the architecture key by key.
        """
        model = self._load()
        supervised(model)
        model.requires_grad_(False)
        return model.eval().to(device)

    def _load(self) -> PreTrainedModel:
        model, problems = self._read(self.model_class, self._config.path, config=self._architecture)
        complain(self._config.path, problems)
        return model

    def _read(self, model_class: type[PreTrainedModel], folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
        """A model with the weights of a folder, and the keys that do not fit, by kind."""
        try:
            with _quiet():
                loaded: Any = model_class.from_pretrained(
                    folder,
                    dtype=getattr(torch, self._config.dtype),
                    attn_implementation=self._config.attention,
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

    def linear_targets(self, model: PreTrainedModel) -> dict[str, LinearTarget]:
        """Every linear of the decoder's blocks; tower, projector and head stay out."""
        targets = {}
        blocks: Any = model.get_submodule(f"{self.decoder}.layers")
        for index, block in enumerate(blocks):
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear):
                    leaf = name.rpartition(".")[2]
                    prefix = f"{self.decoder}.layers.{index}"
                    targets[f"{prefix}.{name}"] = LinearTarget(module, f"{prefix}.{_INPUT_OF_LEAF[leaf]}")
        return targets

    def projector_prefix(self) -> str:
        """The module between vision and language."""
        return self.projector

    def generate(self, model: Any, batch: dict[str, torch.Tensor], max_new_tokens: int) -> torch.Tensor:
        """Greedy continuation `[batch, new]`."""
        ids = batch["input_ids"]
        output = model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
        )
        return output[:, ids.shape[1] :]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own report on keys, which are told as errors here."""
    before = get_verbosity()
    set_verbosity_error()
    try:
        yield
    finally:
        set_verbosity(before)


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
