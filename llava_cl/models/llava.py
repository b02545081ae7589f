"""LLaVA-1.5: CLIP tower, two-layer projector and LLaMA decoder, on transformers' own implementation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

from llava_cl.config import ModelConfig
from llava_cl.errors import InputError
from llava_cl.models import llava_original as original
from llava_cl.models.contract import ImageSpec, LinearTarget
from llava_cl.models.llava_saving import save_original, save_transformers
from llava_cl.models.supervised import plain, supervised
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
_PROJECTOR = "model.multi_modal_projector"
_MODEL_TYPES = ("llava", "llava_llama")
_LISTED = 10


class Llava:
    """The LLaVA family (see `llava_cl.models.contract.ModelFamily`), its checkpoints in either layout."""

    layouts: tuple[str, ...] = ("hf", "llava")

    def __init__(self, config: ModelConfig) -> None:
        file = config.path / "config.json"
        if not file.is_file():
            raise InputError(f"model.path: {config.path} holds no config.json; give the folder of a LLaVA checkpoint.")
        content = read_json(file)
        if content.get("model_type") not in _MODEL_TYPES:
            kinds = " or ".join(f"'{kind}'" for kind in _MODEL_TYPES)
            raise InputError(f"{file}: model_type is '{content.get('model_type')}', expected {kinds}.")
        self._config = config
        self._tower: Path | None = None
        self._architecture: LlavaConfig
        if original.TOWER in content:
            self._tower = original.find_tower(content, config.path, config.vision_tower)
            self._architecture = original.architecture(content, file, self._tower, self.tokenizer())
        else:
            self._architecture = LlavaConfig.from_pretrained(config.path, local_files_only=True)

    def folders(self) -> list[Path]:
        """The checkpoint's folder, and in the original layout that of its vision tower."""
        return [self._config.path, *([self._tower] if self._tower else [])]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer."""
        try:
            return AutoTokenizer.from_pretrained(self._config.path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InputError(f"{self._config.path}: the tokenizer cannot be loaded ({error}).") from error

    def image_spec(self) -> ImageSpec:
        """Size, mean and std of the checkpoint's image processor; one token for each patch."""
        vision: Any = self._architecture.vision_config
        file = (self._tower or self._config.path) / "preprocessor_config.json"
        if not file.is_file():
            raise InputError(f"{file}: missing; it states the mean and standard deviation of the images.")
        processor = read_json(file)
        missing = [f"{file}: {key} is missing." for key in ("image_mean", "image_std") if key not in processor]
        if missing:
            raise InputError(*missing)
        patches = (vision.image_size // vision.patch_size) ** 2
        keeps_cls = self._architecture.vision_feature_select_strategy == "full"
        return ImageSpec(
            size=vision.image_size,
            mean=tuple(processor["image_mean"]),
            std=tuple(processor["image_std"]),
            tokens=patches + int(keeps_cls),
            token_id=self._architecture.image_token_index,
        )

    def skeleton(self) -> PreTrainedModel:
        """The model without memory for its weights."""
        with torch.device("meta"):
            return LlavaForConditionalGeneration(self._architecture)

    def load(self, device: torch.device) -> PreTrainedModel:
        """The base model on `device`, frozen.

        Raises:
            InputError: the weights are missing or damaged, or do not fit the architecture key by key.
        """
        folder, tower = self._config.path, self._tower
        mapping = original.KEY_MAPPING if tower else None
        model, problems = self._read(
            LlavaForConditionalGeneration, folder, config=self._architecture, key_mapping=mapping
        )
        vision = dict(model.model.vision_tower.named_parameters(prefix="model.vision_tower"))
        if tower and vision.keys() <= set(problems.get("missing_keys", ())):
            # The layout's checkpoints that were trained further may hold the tower themselves.
            model.model.vision_tower, beside = self._read(
                CLIPVisionModel, tower, config=self._architecture.vision_config
            )
            problems["missing_keys"] = set(problems["missing_keys"]) - vision.keys()
            # A whole CLIP has a text tower, too.
            beside["unexpected_keys"] = [key for key in beside["unexpected_keys"] if key.startswith("vision_model.")]
            _complain(tower, beside)
        _complain(folder, problems)
        supervised(model)
        model.requires_grad_(False)
        return model.eval().to(device)

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

    def save(self, model: Any, folder: Path, layout: str) -> None:
        """Writes a loaded model, perhaps trained since, as a checkpoint of layout "hf" or "llava"."""
        with plain(model):
            if layout == "hf":
                save_transformers(model, folder, self._config.path, self.tokenizer(), self.image_spec())
            else:
                save_original(model, folder, self._config.path)

    def linear_targets(self, model: PreTrainedModel) -> dict[str, LinearTarget]:
        """Every linear of the decoder's blocks; tower, projector and head stay out."""
        targets = {}
        for index, block in enumerate(model.model.language_model.layers):
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear):
                    leaf = name.rpartition(".")[2]
                    prefix = f"model.language_model.layers.{index}"
                    targets[f"{prefix}.{name}"] = LinearTarget(module, f"{prefix}.{_INPUT_OF_LEAF[leaf]}")
        return targets

    def projector_prefix(self) -> str:
        """The two-layer projector."""
        return _PROJECTOR

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


def _complain(folder: Path, problems: dict[str, Any]) -> None:
    """Raises InputError if there are keys that do not fit, naming the first ones of each kind."""
    messages = [
        f"{folder}: {kind.replace('_', ' ')}: {', '.join(sorted(map(str, keys))[:_LISTED])}; the weights do not "
        "fit config.json, give a complete checkpoint of one LLaVA model."
        for kind, keys in problems.items()
        if keys
    ]
    if messages:
        raise InputError(*messages)
