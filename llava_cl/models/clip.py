"""CLIP as a classifier by the names of classes, on transformers' own implementation."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, CLIPConfig, CLIPModel

from llava_cl.config import ClassTaskConfig, ModelConfig
from llava_cl.errors import InputError
from llava_cl.models.classes import Classifier, ClassifierBase
from llava_cl.models.contract import ImageSpec, LinearTarget
from llava_cl.models.reading import (
    BUILDING,
    complain,
    image_processor,
    normalisation,
    read_config,
    read_model,
    read_tokenizer,
    reading,
)
from llava_cl.subspace import truncate_spectrum

_SOURCES = {"q_proj": "input", "k_proj": "input", "v_proj": "input", "out_proj": "output"}
_TOWERS = {"vision": "clip.vision_model", "text": "clip.text_model"}
_HEAD_SCALE = 30.0
"""Weight of the cosine to a class's head (KeepLoRA+)."""
_PAD = 0


class ClipClassifier(Classifier):
    """A CLIP that scores images against the prompts of a stream's classes, and against a head for each task."""

    config_class = CLIPConfig

    def __init__(self, config: CLIPConfig, clip: CLIPModel) -> None:
        super().__init__(config)
        # It is never trained, and DeepSpeed cannot send round a parameter without dimensions.
        scale = clip.logit_scale.detach()
        del clip.logit_scale
        clip.register_buffer("logit_scale", scale)
        self.clip = clip
        self.prompts: list[torch.Tensor] = []

    def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`[images, width]` of length one."""
        pooled = self.clip.vision_model(pixel_values=pixel_values.to(self.clip.dtype)).pooler_output
        return functional.normalize(self.clip.visual_projection(pooled), dim=-1)

    def text_features(self, task: int) -> torch.Tensor:
        """Of the prompts of a task's classes `[classes, width]`, of length one."""
        ids = self.prompts[task].to(self.clip.device)
        pooled = self.clip.text_model(input_ids=ids).pooler_output
        return functional.normalize(self.clip.text_projection(pooled), dim=-1)

    def scores(self, images: torch.Tensor, text: torch.Tensor, task: int) -> torch.Tensor:
        """Logits `[images, classes]` of one task: CLIP's, plus the scaled cosine to the rows of a head."""
        logits = self.clip.logit_scale.exp() * images @ text.T
        if len(self.heads):
            # A head that is still zero adds nothing.
            weight: Any = self.heads[task].weight
            logits = logits + _HEAD_SCALE * images @ functional.normalize(weight, dim=-1).T
        return logits

    def logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Scores against the task's prompts, and its head."""
        return self.scores(self.image_features(pixel_values), self.text_features(self.task), self.task)


class Clip(ClassifierBase):
    """CLIP in the layout of transformers (see `llava_cl.models.contract.ClassifierFamily`)."""

    head_from_means = True
    zero_shot = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        read_config(config, ("clip",))
        self._architecture: Any = AutoConfig.from_pretrained(config.path, local_files_only=True)

    def image_spec(self) -> ImageSpec:
        """Size, mean and standard deviation of the checkpoint."""
        mean, std = normalisation(self._config.path)
        return ImageSpec(self._architecture.vision_config.image_size, mean, std)

    def skeleton(self) -> ClipClassifier:
        """The model without memory for its weights."""
        with reading(self._config.path, BUILDING), torch.device("meta"):
            return ClipClassifier(self._architecture, CLIPModel(self._architecture))

    def load(self, device: torch.device) -> ClipClassifier:
        """The base model on `device`, frozen; on the meta device its weights are only looked at.

        Raises:
            InputError: the weights are missing or damaged, or do not fit the architecture key by key.
        """
        clip, problems = read_model(CLIPModel, self._config.path, self._config, device, config=self._architecture)
        # Older checkpoints hold the numbers of the positions.
        unexpected = problems["unexpected_keys"]
        problems["unexpected_keys"] = [key for key in unexpected if not key.endswith(".position_ids")]
        complain(self._config.path, problems)
        model = ClipClassifier(self._architecture, clip)
        model.requires_grad_(False)
        self._truncate(model)
        return model.eval().to(device)

    def _truncate(self, model: ClipClassifier) -> None:
        """Takes the smallest singular directions off the weights that the configuration names."""
        for part, ratios in self._config.truncate.items():
            if part not in _TOWERS:
                raise InputError(f"model.truncate: '{part}' is none of {', '.join(_TOWERS)}.")
            modules = model.get_submodule(_TOWERS[part]).named_modules()
            linears = [(name.rpartition(".")[2], module) for name, module in modules if isinstance(module, nn.Linear)]
            strange = sorted(ratios.keys() - {leaf for leaf, _ in linears})
            if strange:
                raise InputError(f"model.truncate.{part}: {', '.join(strange)} is no linear of this tower.")
            for leaf, module in linears:
                if leaf in ratios and module.weight.device.type != "meta":
                    module.weight.copy_(truncate_spectrum(module.weight, ratios[leaf]))

    def linear_targets(self, model: Any) -> dict[str, LinearTarget]:
        """Query, key, value and output projection of every block of both towers."""
        targets = {}
        for part, tower in _TOWERS.items():
            for name, module in model.get_submodule(tower).named_modules(prefix=tower):
                block, _, leaf = name.rpartition(".")
                if isinstance(module, nn.Linear) and leaf in _SOURCES:
                    targets[name] = LinearTarget(module, f"{block}.{_SOURCES[leaf]}", part)
        return targets

    def entries(self, model: Any) -> list[nn.Module]:
        """The embeddings of both towers."""
        return [model.get_submodule(tower).embeddings for tower in _TOWERS.values()]

    def token_mask(self, batch: dict[str, torch.Tensor], source: str) -> Any:
        """All tokens of the images that are no padding, and of the prompts, which every batch reads once."""
        return ... if source.startswith(_TOWERS["text"]) else batch["index"] >= 0

    def install(self, model: Any, tasks: Sequence[ClassTaskConfig]) -> None:
        """The prompts of all classes, and, if the model is to have them, heads of zeros.

        Raises:
            InputError: a prompt is too long for the text tower.
        """
        tokenizer = read_tokenizer(self._config.path)
        for task in tasks:
            model.prompts.append(self._tokenized(task, tokenizer))
            if self._config.cosine_heads:
                model.add_head(self._architecture.projection_dim, len(task.folders), bias=False)

    def _tokenized(self, task: ClassTaskConfig, tokenizer: Any) -> torch.Tensor:
        length = self._architecture.text_config.max_position_embeddings
        texts = [task.template.replace("{}", name) for name in task.class_names()]
        ids = [tokenizer(text)["input_ids"] for text in texts]
        long = [text for text, own in zip(texts, ids, strict=True) if len(own) > length]
        if long:
            raise InputError(
                f"benchmark task {task.name}: {long[0]!r} has more than the {length} tokens that CLIP reads."
            )
        rows, end = self._architecture.text_config.vocab_size, self._architecture.text_config.eos_token_id
        # Older checkpoints say 2, and the highest id is then what ends a text.
        if any(max(own) >= rows or (end != 2 and end not in own) for own in ids):
            raise InputError(
                f"{self._config.path}: the tokenizer is another model's: {texts[0]!r} is {ids[0]}, of a vocabulary of "
                f"{rows} tokens, of which {end} ends a text."
            )
        return torch.tensor([own + [_PAD] * (length - len(own)) for own in ids])

    def head(self, task: int) -> str | None:
        """The task's own linear, if the model is to have heads."""
        return f"heads.{task}" if self._config.cosine_heads else None

    def head_start(
        self, model: Any, task: int, means: torch.Tensor | None, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """The means of the classes' image features, of length one (KeepLoRA+)."""
        assert means is not None
        return {"weight": functional.normalize(means, dim=-1)}

    def features(self, model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
        """Image features of length one."""
        return model.image_features(pixel_values)

    def scorer(self, model: Any, tasks: Sequence[int]) -> Callable[[torch.Tensor], torch.Tensor]:
        """Scores of images for the classes of the tasks; the prompts are read once."""
        with torch.inference_mode():
            texts = {task: model.text_features(task) for task in tasks}

        def score(pixel_values: torch.Tensor) -> torch.Tensor:
            images = model.image_features(pixel_values)
            return torch.cat([model.scores(images, texts[task], task) for task in tasks], dim=1).float()

        return score

    def save(self, model: Any, folder: Path, layout: str) -> None:
        """Writes transformers' CLIP; heads are left out."""
        model.clip.save_pretrained(folder)
        file, _ = image_processor(self._config.path)
        shutil.copyfile(file, folder / file.name)
        read_tokenizer(self._config.path).save_pretrained(folder)
