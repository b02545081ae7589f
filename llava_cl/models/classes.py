"""What models that tell classes share: the loss of a batch."""

from __future__ import annotations

import torch
from torch.nn import functional


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
