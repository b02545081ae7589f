"""Greedy answers to a batch of prompts, of which what several begin with is read once."""

from __future__ import annotations

from typing import Any

import torch


def greedy(model: Any, batch: dict[str, torch.Tensor], max_new_tokens: int) -> torch.Tensor:
    """The most probable continuation of each prompt.

    Not transformers' `generate`: that cannot continue a cache whose rows go on with padding, and keeps computing rows
    that have ended.

    Args:
        model: a decoder of transformers; its generation config states the ids that end an answer.
        batch: of `llava_cl.data.collate_prompts`, without `index`.
        max_new_tokens: the most new tokens of an answer.

    Returns:
        New token ids `[batch, new]`; what follows the end of an answer is the padding id, or else the id that ends it.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    images = {key: batch[key] for key in ("pixel_values",) if key in batch}
    cache = None
    if "start_ids" in batch:
        start, own = batch["start_mask"], batch["start_of"]
        read = model(
            input_ids=batch["start_ids"],
            attention_mask=start,
            position_ids=_positions(start),
            use_cache=True,
            logits_to_keep=1,
            **images,
        )
        cache, images = read.past_key_values, {}
        cache.batch_select_indices(own)
        mask = torch.cat([start[own], mask], dim=1)
    stops = _stops(model, ids.device)
    padding = model.generation_config.pad_token_id
    if padding is None:
        padding = stops[0] if len(stops) else 0
    new = torch.full((len(ids), max_new_tokens), int(padding), device=ids.device)
    rows = torch.arange(len(ids), device=ids.device)
    going = torch.ones_like(rows, dtype=torch.bool)
    positions = _positions(mask)[:, -ids.shape[1] :]
    step = 0
    for step in range(max_new_tokens):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **images,
        )
        cache, images = output.past_key_values, {}
        best = output.logits[:, -1].argmax(dim=-1)
        new[rows, step] = torch.where(going, best, padding)
        going = going & ~torch.isin(best, stops)
        left = int(going.sum())
        if not left:
            break
        # Rows that have ended stay until half of them have: to take rows out copies the cache.
        if left <= len(rows) // 2:
            cache.batch_select_indices(going.nonzero()[:, 0])
            rows, best, mask, positions = rows[going], best[going], mask[going], positions[going]
            going = going[going]
        ids = best[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return new[:, : step + 1]


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Places of tokens among those that are no padding."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def _stops(model: Any, device: torch.device) -> torch.Tensor:
    """The ids that end an answer."""
    stop = model.generation_config.eos_token_id
    return torch.as_tensor([] if stop is None else stop, dtype=torch.long, device=device).reshape(-1)
