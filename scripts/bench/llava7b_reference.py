"""The steps of a stage as the published code of KeepLoRA does them, written anew for `llava7b.py` to time.

Restated: gradients of trainable base weights one sample at a time, their running mean in the model's own precision; a
singular value decomposition of whole matrices; training that computes every layer twice and logits at every position;
questions one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

Batch = dict[str, torch.Tensor]

LOADS = 8
"""Times that the model is loaded in a stage."""


def gradients(model: Any, samples: Sequence[Batch], weights: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    """Mean gradient of each weight over samples that come one at a time, in the model's precision."""
    for weight in weights:
        weight.requires_grad_(True)
    means = [torch.zeros_like(weight) for weight in weights]
    for count, sample in enumerate(samples, start=1):
        full_loss(model, sample).backward()
        for mean, weight in zip(means, weights, strict=True):
            assert weight.grad is not None
            mean.mul_((count - 1) / count).add_(weight.grad, alpha=1 / count)
            weight.grad = None
    for weight in weights:
        weight.requires_grad_(False)
    return means


def initial_basis(weight: torch.Tensor, energy: float) -> torch.Tensor:
    """Principal input directions `[in, k]` of a weight `[out, in]`, from all its singular vectors."""
    vectors, values, _ = torch.linalg.svd(weight.float().T, full_matrices=False)
    shares = values.square().cumsum(0) / values.square().sum()
    return vectors[:, : max(1, int((shares < energy).sum()))]


def initial_a(gradient: torch.Tensor, basis: torch.Tensor, rank: int) -> torch.Tensor:
    """A `[rank, in]`, from a randomised decomposition of the gradient outside the basis."""
    transposed = gradient.float().T
    residual = transposed - basis @ (basis.T @ transposed)
    return torch.svd_lowrank(residual, q=rank, niter=2)[0].T


def grown_basis(gradient: torch.Tensor, basis: torch.Tensor, energy: float) -> torch.Tensor:
    """The basis with the gradient's directions up to a share of its energy, from all singular vectors."""
    transposed = gradient.float().T
    residual = transposed - basis @ (basis.T @ transposed)
    vectors, values, _ = torch.linalg.svd(residual, full_matrices=False)
    total = transposed.square().sum()
    shares = (total - residual.square().sum() + values.square().cumsum(0)) / total
    added = min(int((shares < energy).sum()) + 1, basis.shape[0] - basis.shape[1])
    return torch.cat([basis, vectors[:, :added]], dim=1)


def full_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the supervised tokens, from logits of all positions in fp32."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    logits = model(**inputs, use_cache=False).logits.float()
    shifted = logits[:, :-1].reshape(-1, logits.shape[-1])
    return nn.functional.cross_entropy(shifted, batch["labels"][:, 1:].reshape(-1), ignore_index=-100)


def train_step(model: Any, batches: Sequence[Batch], optimizer: torch.optim.Optimizer) -> None:
    """One optimizer step over micro-batches, on a model that computes its layers again in backward."""
    for batch in batches:
        (full_loss(model, batch) / len(batches)).backward()
    optimizer.step()
    optimizer.zero_grad()
