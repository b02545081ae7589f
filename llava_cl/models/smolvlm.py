"""SmolVLM: SigLIP tower, pixel-shuffle connector and a small LLaMA-like decoder, on transformers' own implementation.

Each image is one view, padded to a square and resized to the tower's side; it is not split into tiles.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, SmolVLMForConditionalGeneration

from llava_cl.errors import InputError
from llava_cl.models.contract import TokenImages
from llava_cl.models.reading import normalisation
from llava_cl.models.supervised import mix_in, plain
from llava_cl.models.vision_language import VisionLanguageFamily

_NOT_OURS = ("*.safetensors", "*.bin", "*.index.json", "config.json", "generation_config.json")


class _FlatImages:
    """Takes a batch's images as `[images, 3, size, size]`, in the order of their tokens."""

    def get_image_features(self: Any, pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The model's own, for images that belong to no sample in particular."""
        flat = pixel_values.unsqueeze(0) if pixel_values.ndim == 4 else pixel_values
        return super().get_image_features(flat, *args, **kwargs)  # type: ignore[misc]


class SmolVlm(VisionLanguageFamily):
    """SmolVLM and SmolVLM2 without image splitting."""

    model_class = SmolVLMForConditionalGeneration
    model_types = ("smolvlm",)
    decoder = "model.text_model"
    projector = "model.connector"
    chat = "smolvlm"

    def image_spec(self) -> TokenImages:
        """The tower's side; the connector merges `scale_factor` x `scale_factor` patches into one token."""
        config, vision = self._architecture, self._architecture.vision_config
        mean, std = normalisation(self._config.path)
        patches = vision.image_size // vision.patch_size
        side, rest = divmod(patches, config.scale_factor)
        if rest:
            file = self._config.path / "config.json"
            raise InputError(f"{file}: scale_factor {config.scale_factor} cannot merge {patches} patches a side.")
        return TokenImages(vision.image_size, mean, std, side * side, config.image_token_id)

    def _load(self, device: torch.device) -> PreTrainedModel:
        model = super()._load(device)
        mix_in(model.model, _FlatImages)
        return model

    def save(self, model: Any, folder: Path, layout: str) -> None:
        """Writes a loaded model, perhaps trained since, as a checkpoint of transformers."""
        ours = {file for pattern in _NOT_OURS for file in self._config.path.glob(pattern)}
        for file in self._config.path.iterdir():
            if file.is_file() and file not in ours:
                shutil.copyfile(file, folder / file.name)
        with plain(model):
            model.save_pretrained(folder, max_shard_size="5GB")
