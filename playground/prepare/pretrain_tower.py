"""Stage A: train the vision tower to tell every fact of the pre-training pictures, as CLIP learned from captions.

Usage: python playground/prepare/pretrain_tower.py --cache DIR --steps N
The last layer stays as it was drawn, since LLaVA reads the one before. Linear heads read the mean patch token of the
layer that the language model reads; they are thrown away afterwards. Writes DIR/tower-<steps>.safetensors every 500
steps, and DIR/tower_heads.json with the held-out accuracy of every fact.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

import cached_pictures
from half_precision import MasterWeights

SEED = 7
HELD_OUT = 40
# share of an epoch that the kinds learned fastest are drawn with
RARELY = {"molecule": 0.3, "map": 0.4, "flag": 0.5}


def tower_config() -> CLIPVisionConfig:
    """The tower: 72 pixels, patch 12, so 36 patches; the language model reads the output of its fourth layer."""
    return CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=5,
        num_attention_heads=6,
        image_size=72,
        patch_size=12,
        projection_dim=192,
        hidden_act="gelu",
    )


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then cosine to 2 % of ``peak``."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))))


def pooled(tower: CLIPVisionModel, batch: torch.Tensor) -> torch.Tensor:
    """Mean patch token of the second last layer, ``[n, 192]``."""
    return tower(pixel_values=batch.bfloat16(), output_hidden_states=True).hidden_states[-2][:, 1:].mean(1).float()


@torch.no_grad()
def held_out_accuracy(
    tower: CLIPVisionModel, head: torch.nn.Linear, images: np.ndarray, labels: np.ndarray, classes: dict[str, list[str]]
) -> dict[str, float]:
    """Accuracy of every fact over the held-out pictures that have it."""
    tower.eval()
    logits = torch.cat(
        [head(pooled(tower, cached_pictures.pixels(images[k : k + 200]))) for k in range(0, len(images), 200)]
    )
    tower.train()
    result, start = {}, 0
    for column, (key, values) in enumerate(classes.items()):
        known = labels[:, column] >= 0
        guess = logits[:, start : start + len(values)].argmax(1).numpy()
        result[key] = round(float((guess[known] == labels[known, column]).mean()), 3)
        start += len(values)
    return result


def main() -> None:
    """Train and write the tower."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--start", type=Path, help="continue from this tower instead of drawing one")
    options = parser.parse_args()
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    data = cached_pictures.load(options.cache, "pretrain")
    classes, labels = cached_pictures.cached_label_tables(options.cache, data.facts)
    order = torch.randperm(len(data.facts), generator=generator).numpy()
    test, train = order[: HELD_OUT * 50], order[HELD_OUT * 50 :]
    weight_of = torch.tensor([RARELY.get(data.facts[k]["kind"], 1.0) for k in train])
    targets = torch.from_numpy(labels.astype(np.int64))
    widths = [len(v) for v in classes.values()]
    weights = [0.3 if len(v) == 2 else 1.0 for v in classes.values()]
    tower = CLIPVisionModel._from_config(tower_config(), attn_implementation="eager")
    if options.start:
        tower.load_state_dict(load_file(options.start))
    head = torch.nn.Linear(192, sum(widths))
    masters = MasterWeights(tower, options.lr, weight_decay=0.05)
    optimizer = torch.optim.AdamW(head.parameters(), lr=options.lr, weight_decay=0.0, betas=(0.9, 0.98))
    began, running = time.time(), 0.0
    for step in range(options.steps):
        lr = learning_rate(step, options.steps, options.lr)
        optimizer.param_groups[0]["lr"] = lr
        rows = train[torch.multinomial(weight_of, options.batch, replacement=True, generator=generator).numpy()]
        logits = head(pooled(tower, cached_pictures.pixels(data.images[rows], generator))).split(widths, 1)
        truth = targets[rows]
        loss = torch.zeros(())
        for column, (scores, weight) in enumerate(zip(logits, weights, strict=True)):
            loss = loss + weight * torch.nn.functional.cross_entropy(
                scores, truth[:, column], ignore_index=-1, reduction="sum"
            )
        loss = loss / options.batch
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        masters.step(lr)
        running += loss.item()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} loss {running / 100:.3f} {time.time() - began:.0f} s", flush=True)
            running = 0.0
        if (step + 1) % 500 == 0 or step + 1 == options.steps:
            save_file(masters.state_dict(), options.cache / f"tower-{step + 1}.safetensors")
            accuracy = held_out_accuracy(tower, head, data.images[test], labels[test], classes)
            (options.cache / "tower_heads.json").write_text(json.dumps(accuracy, indent=1))
            print({k: v for k, v in accuracy.items() if not k.startswith("shows ")}, flush=True)


if __name__ == "__main__":
    main()
