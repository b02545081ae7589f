"""The contract between the pipeline and a model family, and the registry of families.

The pipeline sees a family only through this contract; a new family is one file and one entry in `family`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import nn

from llava_cl.config import ClassTaskConfig, ModelConfig
from llava_cl.errors import InputError
from llava_cl.parsing import near_miss, shown

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ImageSpec:
    """How images become pixels."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"image_size: {self.size} is no number of pixels; correct the config.json of the model.")


@dataclass(frozen=True)
class TokenImages(ImageSpec):
    """How images become pixels for a language model, and how many tokens each takes."""

    tokens: int
    token_id: int


class LinearTarget(NamedTuple):
    """A linear that is adapted, the name of the input that it may share, and the part of the model that it is in.

    The method may have other options for a part (`method.parts`).
    """

    module: nn.Linear
    source: str
    part: str = ""


class ModelFamily(Protocol):
    """One kind of model: loading, saving, targeted linears, loss of a batch.

    Attributes:
        layouts: names of the checkpoint layouts that `save` writes.
    """

    layouts: tuple[str, ...]

    def folders(self) -> list[Path]:
        """Folders whose files the model and its tokenizer are read from."""

    def image_spec(self) -> ImageSpec:
        """Image preprocessing of the checkpoint."""

    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device: names and shapes without memory for the weights."""

    def load(self, device: torch.device) -> PreTrainedModel:
        """The untouched base model on `device` in evaluation mode, all parameters frozen.

        On the meta device keys and shapes of the checkpoint are compared with the architecture, and nothing is kept.

        Called as `model(**batch)` on a collated batch with `labels [batch, length]` it returns an object with
        `loss`: the sum of token cross-entropies over `num_items_in_batch` (default: the batch's own count of
        supervised tokens), or with `per_sample=True` the sum over samples of each sample's mean.
        """

    def save(self, model: PreTrainedModel, folder: Path, layout: str) -> None:
        """Writes a model of `load`, perhaps trained since, to an empty folder, in one of the family's `layouts`."""

    def linear_targets(self, model: PreTrainedModel) -> dict[str, LinearTarget]:
        """The linears that are adapted, by qualified name."""

    def entries(self, model: PreTrainedModel) -> list[nn.Module]:
        """Modules below all targets; their outputs need a gradient, so that one reaches every target."""

    def token_mask(self, batch: dict[str, torch.Tensor], source: str) -> Any:
        """Index of those tokens of a batch that count at an input, for the input's first axes."""


class LanguageFamily(ModelFamily, Protocol):
    """A model that reads images and text and answers in words.

    Attributes:
        chat: name of the format of its conversations (see `llava_cl.data.chat_format`).
    """

    chat: str

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the checkpoint."""

    def image_spec(self) -> TokenImages:
        """Image preprocessing of the checkpoint, and the tokens that stand for an image."""

    def positions(self) -> int:
        """The most tokens that the model reads, those of images and of its own answer among them."""

    def projector_prefix(self) -> str:
        """Qualified name of the module between vision and language, trained beside the adapters."""

    def generate(self, model: Any, batch: dict[str, torch.Tensor], max_new_tokens: int) -> torch.Tensor:
        """Greedy continuation of a batch of `llava_cl.data.collate_prompts` -> new ids `[batch, new]`, right-padded."""


class ClassifierFamily(ModelFamily, Protocol):
    """A model that tells the classes of images.

    Attributes:
        head_from_means: heads start from the means of their classes' features.
        zero_shot: it tells classes that it has not learned.
    """

    head_from_means: bool
    zero_shot: bool

    def install(self, model: PreTrainedModel, tasks: Sequence[ClassTaskConfig]) -> None:
        """Gives a model of `load` or `skeleton` what the classes of a stream need, before anything is learned."""

    def learn(self, model: PreTrainedModel, task: int, temperature: float) -> None:
        """Makes the labels of batches positions in the classes of one task, counted from 0.

        Logits are divided by `temperature` in the loss.
        """

    def head(self, task: int) -> str | None:
        """Qualified name of the module that is trained beside the adapters for a task; None for none."""

    def features(self, model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
        """What a head reads of `[images, 3, size, size]`: `[images, width]`."""

    def head_start(
        self, model: PreTrainedModel, task: int, means: torch.Tensor | None, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """How the parameters of a task's head start, by their names in the head.

        `means` are the means over each class's images of their features at unit length, `[classes, width]` fp32; None
        where heads do not start from them.
        """

    def scorer(self, model: PreTrainedModel, tasks: Sequence[int]) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function from `[images, 3, size, size]` to scores `[images, classes of the tasks]`, in the tasks' order."""


def _families() -> dict[str, Callable[[ModelConfig], ModelFamily]]:
    from llava_cl.models.clip import Clip
    from llava_cl.models.llava import Llava
    from llava_cl.models.smolvlm import SmolVlm
    from llava_cl.models.vit import Vit

    return {"clip": Clip, "llava": Llava, "smolvlm": SmolVlm, "vit": Vit}


def family(config: ModelConfig) -> ModelFamily:
    """The family object for a model configuration.

    Raises:
        InputError: an unknown family, or a path that holds no checkpoint of that family.
    """
    from llava_cl.models.reading import reading

    families = _families()
    if config.family not in families:
        known, close = ", ".join(sorted(families)), near_miss(config.family, families)
        raise InputError(f"model.family: unknown {shown(config.family)}; known: {known}.{close}")
    if config.family != "clip" and (config.truncate or config.cosine_heads):
        raise InputError(f"model.truncate and model.cosine_heads are for 'clip', not for '{config.family}'.")
    with reading(config.path, "the checkpoint cannot be read"):
        return families[config.family](config)


def language_family(config: ModelConfig) -> LanguageFamily:
    """The family object of a model that answers in words; raises what `family` does, and for other models."""
    found: Any = family(config)
    if not hasattr(found, "generate"):
        raise InputError(f"model.family: '{config.family}' tells classes, but the tasks are instructions.")
    return found


def classifier_family(config: ModelConfig) -> ClassifierFamily:
    """The family object of a model that tells classes; raises what `family` does, and for other models."""
    found: Any = family(config)
    if not hasattr(found, "scorer"):
        raise InputError(f"model.family: '{config.family}' answers in words, but the tasks are classes of images.")
    return found
