"""LLaVA-1.5: CLIP tower, two-layer projector and LLaMA decoder, on transformers' own implementation."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llava_cl.config import ModelConfig
from llava_cl.errors import InputError
from llava_cl.models.contract import ImageSpec, LinearTarget
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
_PROJECTOR = "model.multi_modal_projector"
_LISTED = 10


class Llava:
    """The LLaVA family (see `llava_cl.models.contract.ModelFamily`), in the layout of transformers."""

    def __init__(self, config: ModelConfig) -> None:
        file = config.path / "config.json"
        if not file.is_file():
            raise InputError(f"model.path: {config.path} holds no config.json; give the folder of a LLaVA checkpoint.")
        kind = read_json(file).get("model_type")
        if kind != "llava":
            raise InputError(f"{file}: model_type is '{kind}', expected 'llava'.")
        self._config = config
        self._architecture: LlavaConfig = LlavaConfig.from_pretrained(config.path, local_files_only=True)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer."""
        try:
            return AutoTokenizer.from_pretrained(self._config.path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InputError(f"{self._config.path}: the tokenizer cannot be loaded ({error}).") from error

    def image_spec(self) -> ImageSpec:
        """Size, mean and std of the checkpoint's image processor; one token for each patch."""
        vision: Any = self._architecture.vision_config
        file = self._config.path / "preprocessor_config.json"
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
        folder = self._config.path
        try:
            loaded: Any = LlavaForConditionalGeneration.from_pretrained(
                folder,
                dtype=getattr(torch, self._config.dtype),
                attn_implementation=self._config.attention,
                local_files_only=True,
                output_loading_info=True,
                # They are listed with the other problems then.
                ignore_mismatched_sizes=True,
            )
        except (OSError, SafetensorError) as error:
            raise InputError(f"{folder}: the weights cannot be read ({error}).") from error
        model, info = loaded
        problems = [
            f"{folder}: {kind.replace('_', ' ')}: {', '.join(sorted(map(str, keys))[:_LISTED])}; the weights do not "
            "fit config.json, give a complete checkpoint of one LLaVA model."
            for kind, keys in info.items()
            if keys
        ]
        if problems:
            raise InputError(*problems)
        supervised(model)
        model.requires_grad_(False)
        return model.eval().to(device)

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
