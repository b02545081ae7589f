"""A loss for multimodal language models of transformers that computes logits only where there are labels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from einops import repeat
from torch import nn
from transformers import PreTrainedModel

_OWN = "_class_of_transformers"


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
        logits_to_keep: torch.Tensor | int = 0,
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
            logits_to_keep: without `labels`, how many last positions get logits, 0 = all; `generate` looks for
                this argument, and without it would compute the logits of the whole prompt.
            kwargs: passed on to the model's own forward.
        """
        if pixel_values is not None:
            pixel_values = pixel_values.to(self.dtype)
        inputs = {"input_ids": input_ids, "pixel_values": pixel_values, "attention_mask": attention_mask}
        if labels is None:
            return super().forward(**inputs, logits_to_keep=logits_to_keep, **kwargs)  # type: ignore[misc]
        hidden = self.model(**inputs, use_cache=False, blank_image=pixel_values is None).last_hidden_state
        targets = labels[:, 1:]
        supervised = targets != -100
        logits = self.lm_head(hidden[:, :-1][supervised]).float()
        losses = nn.functional.cross_entropy(logits, targets[supervised], reduction="none")
        if per_sample:
            counts = repeat(supervised.sum(dim=1), "sample -> sample token", token=supervised.shape[1])[supervised]
            loss = (losses / counts).sum()
        else:
            items = losses.numel() if num_items_in_batch is None else num_items_in_batch
            # A batch in which no sample has a label has the loss 0, not 0 / 0; a clamp, as `max` waits for the device.
            loss = losses.sum() / torch.as_tensor(items).clamp(min=1).to(losses.device)
        return {"loss": loss}


class _BlankImage:
    """The model without its head, which can run tower and projector for text alone.

    A rank whose batch is text alone must run the same modules in the same order as one that sees images:
    ZeRO-3 gathers a module's weights on all ranks together, and all ranks reduce the projector's gradient.
    """

    def forward(self: Any, input_ids: torch.Tensor | None = None, *, blank_image: bool = False, **inputs: Any) -> Any:
        """The model's own forward; with `blank_image`, plus zero times the features of a black image."""
        if not blank_image:
            return super().forward(input_ids=input_ids, **inputs)  # type: ignore[misc]
        embeddings = self.get_input_embeddings()(input_ids)
        size = self.config.vision_config.image_size
        pixels = embeddings.new_zeros(1, 3, size, size)
        features = self.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        embeddings = embeddings + 0.0 * torch.cat(list(features)).sum()
        return super().forward(inputs_embeds=embeddings, **inputs)  # type: ignore[misc]


def supervised(model: PreTrainedModel) -> None:
    """Gives a loaded model the supervised loss, in place."""
    mix_in(model, _SupervisedLoss)
    mix_in(model.model, _BlankImage)


def mix_in(module: Any, behaviour: type) -> None:
    """Puts a class's methods in front of those of a loaded module, in place.

    The class is exchanged after loading, because transformers converts the keys of a checkpoint only for its own
    classes. It keeps its name, which transformers writes into the config of a saved model.
    """
    own = type(module)
    module.__class__ = type(own.__name__, (behaviour, own), {_OWN: getattr(own, _OWN, own)})


@contextlib.contextmanager
def plain(model: Any) -> Iterator[None]:
    """The model with transformers' own classes again inside the block, by which it renames keys on saving."""
    changed = [(module, type(module)) for module in (model, model.model)]
    for module, mixed in changed:
        module.__class__ = getattr(mixed, _OWN)
    try:
        yield
    finally:
        for module, mixed in changed:
            module.__class__ = mixed
