"""A loss for multimodal language models of transformers that computes logits only where there are labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class _SupervisedLoss:
    """Forward with a loss over supervised positions alone, in fp32.

    At 7B scale the full logits of a batch of 8 are the largest tensor of a training step, although only the
    answer tokens are supervised.
    """

    def forward(
        self: Any,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        per_sample: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The loss of a batch; without `labels`, the model's own forward (used by `generate`).

        Args:
            input_ids: `[batch, length]`.
            pixel_values: `[images, 3, size, size]`, or None for a batch of text alone.
            attention_mask: `[batch, length]`.
            labels: `[batch, length]`, -100 = ignored, not yet shifted.
            num_items_in_batch: divisor of the summed token losses; default the batch's own supervised tokens.
            per_sample: return the sum over samples of each sample's mean token loss instead.
            kwargs: passed on to the model's own forward.
        """
        if pixel_values is not None:
            pixel_values = pixel_values.to(self.dtype)
        inputs = {"input_ids": input_ids, "pixel_values": pixel_values, "attention_mask": attention_mask}
        if labels is None:
            return super().forward(**inputs, **kwargs)  # type: ignore[misc]
        hidden = self.model(**inputs, use_cache=False).last_hidden_state
        targets = labels[:, 1:]
        supervised = targets != -100
        logits = self.lm_head(hidden[:, :-1][supervised]).float()
        losses = nn.functional.cross_entropy(logits, targets[supervised], reduction="none")
        if per_sample:
            counts = supervised.sum(dim=1, keepdim=True).expand_as(supervised)[supervised]
            loss = (losses / counts).sum()
        else:
            loss = losses.sum() / (losses.numel() if num_items_in_batch is None else num_items_in_batch)
        if pixel_values is None and self.training:
            # A rank whose batch is text alone must still give the projector a (zero) gradient.
            loss = loss + 0.0 * self._features_of_no_image(hidden).sum()
        return {"loss": loss}

    def _features_of_no_image(self: Any, like: torch.Tensor) -> torch.Tensor:
        size = self.config.vision_config.image_size
        pixels = torch.zeros(1, 3, size, size, dtype=like.dtype, device=like.device)
        features = self.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        return torch.cat(list(features), dim=0)


def supervised(model: PreTrainedModel) -> PreTrainedModel:
    """Gives a loaded model the supervised loss, in place.

    The class is exchanged after loading, because transformers converts the keys of a checkpoint only for its
    own classes.
    """
    own = type(model)
    model.__class__ = type(f"Supervised{own.__name__}", (_SupervisedLoss, own), {})
    return model
