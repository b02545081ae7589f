"""ViT with one linear head for each task, on transformers' own implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, ViTConfig, ViTForImageClassification, ViTModel

from llava_cl.config import ClassTaskConfig, ModelConfig
from llava_cl.errors import InputError
from llava_cl.models import vit_timm
from llava_cl.models.classes import Classifier, ClassifierBase
from llava_cl.models.contract import ImageSpec, LinearTarget
from llava_cl.models.reading import (
    BUILDING,
    check_weights,
    complain,
    normalisation,
    processor_config,
    read_config,
    read_model,
    reading,
)
from llava_cl.store import read_json, write_json

_ADAPTED = ("k_proj", "v_proj", "key", "value")  # transformers 5 has used both pairs of names
_HEAD_STD = 0.02


class VitClassifier(Classifier):
    """A ViT whose class token is read by the heads of a stream's tasks."""

    config_class = ViTConfig

    def __init__(self, config: ViTConfig, vit: ViTModel) -> None:
        super().__init__(config)
        self.vit = vit
        self.class_names: list[list[str]] = []

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The class token after the last layer norm `[images, width]`."""
        return self.vit(pixel_values=pixel_values.to(self.vit.dtype)).last_hidden_state[:, 0]

    def logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Of the task's own head."""
        return self.heads[self.task](self.features(pixel_values))


class Vit(ClassifierBase):
    """ViT in the layout of transformers or of timm (see `llava_cl.models.contract.ClassifierFamily`)."""

    head_from_means = False
    zero_shot = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        file = config.path / "config.json"
        self._timm = file.is_file() and vit_timm.is_timm(read_json(file))
        if self._timm:
            check_weights(config.path)
            self._architecture: Any = vit_timm.architecture(config.path)
        else:
            read_config(config, ("vit",))
            self._architecture = AutoConfig.from_pretrained(config.path, local_files_only=True)

    def image_spec(self) -> ImageSpec:
        """Size, mean and standard deviation of the checkpoint."""
        mean, std = vit_timm.normalisation(self._config.path) if self._timm else normalisation(self._config.path)
        return ImageSpec(self._architecture.image_size, mean, std)

    def skeleton(self) -> VitClassifier:
        """The model without memory for its weights."""
        with reading(self._config.path, BUILDING), torch.device("meta"):
            return VitClassifier(self._architecture, ViTModel(self._architecture, add_pooling_layer=False))

    def load(self, device: torch.device) -> VitClassifier:
        """The base model on `device`, frozen, without heads; on the meta device its weights are only looked at.

        Raises:
            InputError: the weights are missing or damaged, or do not fit the architecture key by key.
        """
        options = {"state_dict": vit_timm.weights(self._config.path)} if self._timm else {}
        vit, problems = read_model(
            ViTModel,
            self._config.path,
            self._config,
            device,
            config=self._architecture,
            add_pooling_layer=False,
            **options,
        )
        # What published checkpoints have beyond the blocks is for their own task.
        problems["unexpected_keys"] = [
            key for key in problems["unexpected_keys"] if not key.startswith(("pooler.", "classifier."))
        ]
        complain(self._config.path, problems)
        model = VitClassifier(self._architecture, vit)
        model.requires_grad_(False)
        return model.eval().to(device)

    def linear_targets(self, model: Any) -> dict[str, LinearTarget]:
        """Key and value projection of every block (SplitLoRA, ICLR 2026)."""
        targets = {}
        for name, module in model.vit.named_modules(prefix="vit"):
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in _ADAPTED:
                targets[name] = LinearTarget(module, f"{name.rpartition('.')[0]}.input")
        return targets

    def entries(self, model: Any) -> list[nn.Module]:
        """Patch and position embeddings."""
        return [model.vit.embeddings]

    def token_mask(self, batch: dict[str, torch.Tensor], source: str) -> torch.Tensor:
        """All tokens of the images that are no padding."""
        return batch["index"] >= 0

    def install(self, model: Any, tasks: Sequence[ClassTaskConfig]) -> None:
        """Adds a head of zeros for each task."""
        for task in tasks:
            model.class_names.append(task.class_names())
            model.add_head(self._architecture.hidden_size, len(task.folders), bias=True)

    def head(self, task: int) -> str:
        """The task's own linear."""
        return f"heads.{task}"

    def features(self, model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
        """The class token."""
        return model.features(pixel_values)

    def head_start(
        self, model: Any, task: int, means: torch.Tensor | None, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Normal weights of standard deviation 0.02, no bias (as timm starts a head)."""
        head = model.heads[task]
        drawn = torch.empty(head.weight.shape).normal_(0, _HEAD_STD, generator=generator)
        return {"weight": drawn, "bias": torch.zeros(head.bias.shape)}

    def scorer(self, model: Any, tasks: Sequence[int]) -> Callable[[torch.Tensor], torch.Tensor]:
        """Scores of all classes of the tasks, head after head."""

        def score(pixel_values: torch.Tensor) -> torch.Tensor:
            features = model.features(pixel_values)
            return torch.cat([model.heads[task](features) for task in tasks], dim=1).float()

        return score

    def save(self, model: Any, folder: Path, layout: str) -> None:
        """Writes transformers' classifier over the classes of all tasks that were learned.

        Raises:
            InputError: no task was learned yet.
        """
        pairs = zip(model.heads, model.class_names, strict=True)
        learned = [(head, names) for head, names in pairs if head.weight.any()]
        if not learned:
            raise InputError("the base model has no head to export; give a stage from 1.")
        heads = [head for head, _ in learned]
        weight = torch.cat([head.weight for head in heads])
        labels = dict(enumerate(name for _, names in learned for name in names))
        config = self._architecture.__class__(
            **{**self._architecture.to_dict(), "id2label": labels, "label2id": {name: i for i, name in labels.items()}}
        )
        whole: Any = ViTForImageClassification(config)
        whole.to(weight.dtype)
        whole.vit.load_state_dict(model.vit.state_dict())
        with torch.no_grad():
            whole.classifier.weight.copy_(weight)
            whole.classifier.bias.copy_(torch.cat([head.bias for head in heads]))
        whole.save_pretrained(folder)
        write_json(folder / "preprocessor_config.json", processor_config("ViTImageProcessor", self.image_spec()))
