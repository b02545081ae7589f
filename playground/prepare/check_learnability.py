"""Measure what the base knows, and how well each stream task is learned alone by LoRA from the base.

Usage: python playground/prepare/check_learnability.py --data playground/data --model playground/model [--tasks A B]
LoRA of rank 8 on the seven decoder linears, tower frozen, projector frozen, AdamW, cosine, batch 16. An answer counts
when every token of it, the closing </s> included, is the first choice: what greedy decoding would answer.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlavaForConditionalGeneration

import base_model
from llava_cl.data import encode_conversation, load_image, preprocess_image

LINEARS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass
class Samples:
    """Encoded records: ids, labels, and one projected picture each, ``[n, 36, 256]``."""

    ids: list[list[int]]
    labels: list[list[int]]
    features: torch.Tensor


def encode(
    records: list[dict[str, Any]], images: Path, model: LlavaForConditionalGeneration, tokenizer: Any
) -> Samples:
    """Encode train or test records and compute their picture features once."""
    ids, labels, pixels = [], [], []
    for record in records:
        turns = record.get("conversations") or [
            {"from": "human", "value": f"<image>\n{record['text']}"},
            {"from": "gpt", "value": record["answer"]},
        ]
        made = encode_conversation(
            turns, tokenizer, image_token_id=3, num_image_tokens=base_model.IMAGE_TOKENS, max_length=2048
        )
        ids.append(made["input_ids"])
        labels.append(made["labels"])
        pixels.append(torch.from_numpy(preprocess_image(load_image(record["image"], images), size=72)))
    with torch.no_grad():
        parts = [model.model.get_image_features(torch.stack(pixels[k : k + 100])) for k in range(0, len(pixels), 100)]
        flat = [f for p in parts for f in (p.pooler_output if hasattr(p, "pooler_output") else p)]
    return Samples(ids, labels, torch.stack(flat))


def forward(model: Any, samples: Samples, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of the answer positions, their true tokens, and which row each belongs to."""
    longest = max(len(samples.ids[r]) for r in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for k, r in enumerate(rows):
        ids[k, : len(samples.ids[r])] = torch.tensor(samples.ids[r])
        labels[k, : len(samples.ids[r])] = torch.tensor(samples.labels[r])
    inner = model.get_base_model().model if hasattr(model, "get_base_model") else model.model
    embedded = inner.language_model.embed_tokens(ids)
    embedded = embedded.masked_scatter((ids == 3)[..., None], samples.features[rows])
    hidden = inner.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    known = labels[:, 1:] != -100
    logits = torch.nn.functional.linear(hidden[:, :-1][known], inner.language_model.embed_tokens.weight)
    return logits, labels[:, 1:][known], torch.nonzero(known)[:, 0]


@torch.no_grad()
def accuracy(model: Any, samples: Samples) -> tuple[float, float]:
    """(share of records answered exactly, share of answer tokens right), percent."""
    right, tokens, total = 0, 0, 0
    for start in range(0, len(samples.ids), 50):
        rows = list(range(start, min(start + 50, len(samples.ids))))
        logits, truth, row = forward(model, samples, rows)
        hit = logits.argmax(-1) == truth
        wrong = torch.zeros(len(rows)).index_add_(0, row, (~hit).float())
        right += int((wrong == 0).sum())
        tokens, total = tokens + int(hit.sum()), total + len(hit)
    return 100 * right / len(samples.ids), 100 * tokens / total


def learn(model: Any, samples: Samples, steps: int, lr: float) -> None:
    """Train the adapter in place."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    for step in range(steps):
        if len(order) < 16:
            order += torch.randperm(len(samples.ids), generator=generator).tolist()
        rows, order = order[:16], order[16:]
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        logits, truth, _ = forward(model, samples, rows)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, truth).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def main() -> None:
    """Print one line per task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tasks", nargs="*")
    parser.add_argument("--steps", type=int, default=136)
    parser.add_argument("--lr", type=float, default=2e-3)
    options = parser.parse_args()
    tokenizer = base_model.load_tokenizer(options.model)
    for file in sorted(options.data.glob("*/*/test.json")):
        name, stream = file.parent.name, file.parent.parent
        if options.tasks and name not in options.tasks:
            continue
        images = stream / "datasets" if stream.name == "UCIT" else file.parent
        model = LlavaForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)
        test = encode(json.loads(file.read_text()), images, model, tokenizer)
        began, before = time.time(), accuracy(model, test)
        line = f"{name:14} base {before[0]:5.1f} % ({before[1]:5.1f} % of tokens)"
        if (file.parent / "train.json").exists():
            train = encode(json.loads((file.parent / "train.json").read_text()), images, model, tokenizer)
            torch.manual_seed(0)
            adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=LINEARS))
            learn(adapted, train, options.steps, options.lr)
            after = accuracy(adapted, test)
            line += f"  learned {after[0]:5.1f} % ({after[1]:5.1f} % of tokens)"
        print(f"{line}  {time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
