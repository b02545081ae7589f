"""What models that tell classes share: the loss of a batch, the model around a backbone, the family's small parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel

from llava_cl.config import ModelConfig


def class_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    *,
    per_sample: bool = False,
) -> torch.Tensor:
    """Cross-entropy in fp32; samples with the label -100 count nothing.

    Args:
        logits: `[batch, classes]`.
        labels: `[batch]`.
        num_items_in_batch: divisor of the summed losses; default the batch's own labelled samples.
        per_sample: the sum over the samples, not divided.
    """
    total = functional.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")
    if per_sample:
        return total
    items = (labels != -100).sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
    return total / items.clamp(min=1).to(total.device)


class Classifier(PreTrainedModel):
    """A backbone with a head for each of a stream's tasks, of which one is learned at a time."""

    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.heads = nn.ModuleList()
        self.task = 0
        self.temperature = 1.0

    def logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Of the classes of the task that is learned, `[images, classes]`."""
        raise NotImplementedError

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        per_sample: bool = False,
    ) -> dict[str, torch.Tensor]:
        """The loss over the classes of the task that is learned; see `class_loss`."""
        logits = self.logits(pixel_values) / self.temperature
        return {"loss": class_loss(logits, labels, num_items_in_batch, per_sample=per_sample)}

    def add_head(self, width: int, classes: int, *, bias: bool) -> None:
        """Adds a frozen head of zeros."""
        parameter = next(self.parameters())
        head = nn.Linear(width, classes, bias=bias, device=parameter.device, dtype=parameter.dtype)
        for own in head.parameters():
            nn.init.zeros_(own)
        self.heads.append(head.requires_grad_(False))


class ClassifierBase:
    """The parts that all families of classifiers have alike (see `llava_cl.models.contract.ClassifierFamily`)."""

    layouts: tuple[str, ...] = ("hf",)

    def __init__(self, config: ModelConfig) -> None:
        self._config = config

    def folders(self) -> list[Path]:
        """The checkpoint's folder."""
        return [self._config.path]

    def learn(self, model: Any, task: int, temperature: float) -> None:
        """The labels are positions in the task's classes."""
        model.task, model.temperature = task, temperature
