"""LLaVA-1.5: CLIP tower, two-layer projector and LLaMA decoder, on transformers' own implementation."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llava_cl.config import ModelConfig
from llava_cl.errors import InputError
from llava_cl.models.contract import ImageSpec, LinearTarget
from llava_cl.models.supervised import supervised

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


class Llava:
    """The LLaVA family (see `llava_cl.models.contract.ModelFamily`), in the layout of transformers."""

    def __init__(self, config: ModelConfig) -> None:
        if not (config.path / "config.json").is_file():
            raise InputError(f"model.path: {config.path} holds no config.json; give the folder of a LLaVA checkpoint.")
        self._config = config
        content = json.loads((config.path / "config.json").read_text(encoding="utf-8"))
        if content.get("model_type") != "llava":
            raise InputError(
                f"{config.path / 'config.json'}: model_type is '{content.get('model_type')}', expected 'llava'."
            )
        self._content = content

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer."""
        return AutoTokenizer.from_pretrained(self._config.path, local_files_only=True)

    def image_spec(self) -> ImageSpec:
        """Size, mean and std of the checkpoint's image processor; one token for each patch."""
        vision = self._content["vision_config"]
        file = self._config.path / "preprocessor_config.json"
        if not file.is_file():
            raise InputError(f"{file}: missing; it states the image size, mean and standard deviation.")
        processor = json.loads(file.read_text(encoding="utf-8"))
        patches = (vision["image_size"] // vision["patch_size"]) ** 2
        keeps_cls = self._content.get("vision_feature_select_strategy", "default") == "full"
        return ImageSpec(
            size=vision["image_size"],
            mean=tuple(processor["image_mean"]),
            std=tuple(processor["image_std"]),
            tokens=patches + int(keeps_cls),
            token_id=self._content.get("image_token_index", self._content.get("image_token_id", 32000)),
        )

    def skeleton(self) -> PreTrainedModel:
        """The model without memory for its weights."""
        with torch.device("meta"):
            return LlavaForConditionalGeneration(AutoConfig.from_pretrained(self._config.path, local_files_only=True))

    def load(self, device: torch.device) -> PreTrainedModel:
        """The base model on `device`, frozen."""
        model, loaded = LlavaForConditionalGeneration.from_pretrained(
            self._config.path,
            dtype=getattr(torch, self._config.dtype),
            attn_implementation=self._config.attention,
            local_files_only=True,
            output_loading_info=True,
        )
        problems = [f"{kind}: {', '.join(sorted(map(str, keys))[:10])}" for kind, keys in loaded.items() if keys]
        if problems:
            raise InputError(
                f"{self._config.path}: the checkpoint does not fit its config.json; {'; '.join(problems)}."
            )
        model = supervised(model)
        model.requires_grad_(False)
        model.eval()
        return model.to(device)

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
