"""The contract between the pipeline and a model family, and the registry of families.

The pipeline sees a family only through this contract; a new family is one file and one entry in `family`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import nn

from llava_cl.config import ModelConfig
from llava_cl.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ImageSpec:
    """How images become pixels and how many tokens each takes."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    tokens: int
    token_id: int


class LinearTarget(NamedTuple):
    """A linear that is adapted, and the name of the input that it may share with others."""

    module: nn.Linear
    source: str


class ModelFamily(Protocol):
    """One kind of model: loading, saving, targeted linears, loss of a batch, prediction of a batch.

    Attributes:
        layouts: names of the checkpoint layouts that `save` writes.
        chat: name of the format of its conversations (see `llava_cl.data.chat_format`).
    """

    layouts: tuple[str, ...]
    chat: str

    def folders(self) -> list[Path]:
        """Folders whose files the model and its tokenizer are read from."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the checkpoint."""

    def image_spec(self) -> ImageSpec:
        """Image preprocessing of the checkpoint."""

    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device: names and shapes without memory for the weights."""

    def load(self, device: torch.device) -> PreTrainedModel:
        """The untouched base model on `device` in evaluation mode, all parameters frozen.

        Called as `model(**batch)` on a collated batch with `labels [batch, length]` it returns an object with
        `loss`: the sum of token cross-entropies over `num_items_in_batch` (default: the batch's own count of
        supervised tokens), or with `per_sample=True` the sum over samples of each sample's mean.
        """

    def save(self, model: PreTrainedModel, folder: Path, layout: str) -> None:
        """Writes a model of `load`, perhaps trained since, to an empty folder, in one of the family's `layouts`."""

    def linear_targets(self, model: PreTrainedModel) -> dict[str, LinearTarget]:
        """The linears that are adapted, by qualified name."""

    def projector_prefix(self) -> str | None:
        """Qualified name of the module between vision and language, trained beside the adapters."""

    def generate(self, model: Any, batch: dict[str, torch.Tensor], max_new_tokens: int) -> torch.Tensor:
        """Greedy continuation of a left-padded batch -> new token ids `[batch, new]`, right-padded."""


def family(config: ModelConfig) -> ModelFamily:
    """The family object for a model configuration.

    Raises:
        InputError: an unknown family, or a path that holds no checkpoint of that family.
    """
    from llava_cl.models.llava import Llava
    from llava_cl.models.smolvlm import SmolVlm

    families: dict[str, Callable[[ModelConfig], ModelFamily]] = {"llava": Llava, "smolvlm": SmolVlm}
    if config.family not in families:
        raise InputError(f"model.family: unknown '{config.family}'; known: {', '.join(sorted(families))}.")
    return families[config.family](config)
