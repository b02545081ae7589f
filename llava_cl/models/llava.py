"""LLaVA-1.5: CLIP tower, two-layer projector and LLaMA decoder, on transformers' own implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llava_cl.errors import InputError
from llava_cl.models import llava_original as original
from llava_cl.models.contract import TokenImages
from llava_cl.models.llava_saving import save_original, save_transformers
from llava_cl.models.reading import complain, normalisation, read_model
from llava_cl.models.supervised import plain
from llava_cl.models.vision_language import VisionLanguageFamily


class Llava(VisionLanguageFamily):
    """LLaVA-1.5, its checkpoints in the layout of transformers or of its authors."""

    model_class = LlavaForConditionalGeneration
    model_types = ("llava", "llava_llama")
    decoder = "model.language_model"
    projector = "model.multi_modal_projector"
    chat = "vicuna_v1"
    layouts: tuple[str, ...] = ("hf", "llava")
    _tower: Path | None = None
    _tower_apart = False

    def _read_architecture(self) -> LlavaConfig:
        path = self._config.path
        if original.TOWER not in self._content:
            config = LlavaConfig.from_pretrained(path, local_files_only=True)
        else:
            self._tower = original.find_tower(self._content, path, self._config.vision_tower)
            config = original.architecture(self._content, path / "config.json", self._tower, self.tokenizer())
        vision: Any = config.vision_config
        layer, depth = config.vision_feature_layer, vision.num_hidden_layers
        # What goes into the first layer can be read, too.
        if any(not -depth - 1 <= each <= depth for each in ([layer] if isinstance(layer, int) else layer)):
            raise InputError(
                f"{path / 'config.json'}: images are read at layer {layer} of the vision tower, which has {depth}."
            )
        return config

    def folders(self) -> list[Path]:
        """The checkpoint's folder, and in the original layout that of its vision tower."""
        return [self._config.path, *([self._tower] if self._tower else [])]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer; LLaVA pads with the unknown token, which not every checkpoint says."""
        tokenizer = super().tokenizer()
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token
        return tokenizer

    def image_spec(self) -> TokenImages:
        """Size, mean and std of the checkpoint's image processor; one token for each patch."""
        vision = self._architecture.vision_config
        mean, std = normalisation(self._tower or self._config.path)
        patches = (vision.image_size // vision.patch_size) ** 2
        keeps_cls = self._architecture.vision_feature_select_strategy == "full"
        return TokenImages(
            size=vision.image_size,
            mean=mean,
            std=std,
            tokens=patches + int(keeps_cls),
            token_id=self._architecture.image_token_index,
        )

    def _load(self, device: torch.device) -> PreTrainedModel:
        folder, tower = self._config.path, self._tower
        mapping = original.KEY_MAPPING if tower else None
        model, problems = read_model(
            self.model_class, folder, self._config, device, config=self._architecture, key_mapping=mapping
        )
        vision = dict(model.model.vision_tower.named_parameters(prefix="model.vision_tower"))
        if tower and vision.keys() <= set(problems.get("missing_keys", ())):
            # The layout's checkpoints that were trained further may hold the tower themselves.
            config = self._architecture.vision_config
            model.model.vision_tower, beside = read_model(CLIPVisionModel, tower, self._config, device, config=config)
            problems["missing_keys"] = set(problems["missing_keys"]) - vision.keys()
            # A whole CLIP has a text tower, too.
            beside["unexpected_keys"] = [key for key in beside["unexpected_keys"] if key.startswith("vision_model.")]
            complain(tower, beside)
            self._tower_apart = True
        complain(folder, problems)
        return model

    def save(self, model: Any, folder: Path, layout: str) -> None:
        """Writes a loaded model, perhaps trained since, as a checkpoint of layout "hf" or "llava"."""
        with plain(model):
            if layout == "hf":
                save_transformers(model, folder, self._config.path, self.tokenizer(), self.image_spec())
            else:
                save_original(model, folder, self._config.path, self.image_spec(), tower_apart=self._tower_apart)
