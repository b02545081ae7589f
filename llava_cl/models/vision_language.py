"""What all vision-language families on transformers' own implementations share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from llava_cl.config import ModelConfig
from llava_cl.models.contract import LinearTarget
from llava_cl.models.generation import greedy
from llava_cl.models.reading import BUILDING, complain, read_config, read_model, read_tokenizer, reading
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


class VisionLanguageFamily:
    """A family whose decoder has LLaMA's blocks (see `llava_cl.models.contract.ModelFamily`).

    Attributes:
        model_class: transformers' class.
        model_types: values of `model_type` in `config.json` that the family accepts.
        decoder, projector: qualified names of the language model and of what connects vision to it.
    """

    model_class: ClassVar[type[PreTrainedModel]]
    model_types: ClassVar[tuple[str, ...]]
    decoder: ClassVar[str]
    projector: ClassVar[str]
    layouts: tuple[str, ...] = ("hf",)

    def __init__(self, config: ModelConfig) -> None:
        self._content = read_config(config, self.model_types)
        self._config = config
        self._architecture: Any = self._read_architecture()

    def _read_architecture(self) -> Any:
        return AutoConfig.from_pretrained(self._config.path, local_files_only=True)

    def folders(self) -> list[Path]:
        """The checkpoint's folder."""
        return [self._config.path]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer."""
        return read_tokenizer(self._config.path)

    def skeleton(self) -> PreTrainedModel:
        """The model without memory for its weights."""
        build: Any = self.model_class
        with reading(self._config.path, BUILDING), torch.device("meta"):
            return build(self._architecture)

    def load(self, device: torch.device) -> PreTrainedModel:
        """The base model on `device`, frozen; on the meta device its weights are only looked at.

        Raises:
            InputError: the weights are missing or damaged, or do not fit the architecture key by key.
        """
        model = self._load(device)
        supervised(model)
        model.requires_grad_(False)
        return model.eval().to(device)

    def _load(self, device: torch.device) -> PreTrainedModel:
        model, problems = read_model(
            self.model_class, self._config.path, self._config, device, config=self._architecture
        )
        complain(self._config.path, problems)
        return model

    def linear_targets(self, model: PreTrainedModel) -> dict[str, LinearTarget]:
        """Every linear of the decoder's blocks; tower, projector and head stay out."""
        targets = {}
        blocks: Any = model.get_submodule(f"{self.decoder}.layers")
        for index, block in enumerate(blocks):
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear):
                    leaf = name.rpartition(".")[2]
                    prefix = f"{self.decoder}.layers.{index}"
                    targets[f"{prefix}.{name}"] = LinearTarget(module, f"{prefix}.{_INPUT_OF_LEAF[leaf]}")
        return targets

    def entries(self, model: PreTrainedModel) -> list[nn.Module]:
        """The token embeddings."""
        return [model.get_input_embeddings()]

    def token_mask(self, batch: dict[str, torch.Tensor], source: str) -> torch.Tensor:
        """`[batch, length]`: all tokens but padding, at every input alike."""
        return batch["attention_mask"].bool() & (batch["index"] >= 0)[:, None]

    def positions(self) -> int:
        """The decoder's."""
        return int(self._architecture.get_text_config().max_position_embeddings)

    def projector_prefix(self) -> str:
        """The module between vision and language."""
        return self.projector

    def generate(self, model: Any, batch: dict[str, torch.Tensor], max_new_tokens: int) -> torch.Tensor:
        """Greedy continuation `[batch, new]`; see `llava_cl.models.generation.greedy`."""
        return greedy(model, batch, max_new_tokens)
