"""Train the ViT of the class-incremental stream on the pre-training pictures, without the classes of that stream.

Usage: python playground/prepare/pretrain_vit.py --cache DIR --out playground/vit --steps N [--data playground/data]
Linear heads on the class token tell the facts of a picture, but none that names a garment, an animal or a digit. Of
those three kinds it learns instead which of 64 heaps a picture belongs to: heaps of pictures that look alike, found by
k-means over coarse pixels. The heads are thrown away. Writes a ViTModel in float16.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import numpy as np
import torch
from transformers import ViTConfig, ViTModel

import cached_pictures
import check_vision
import sources
from half_precision import MasterWeights
from pretrain_tower import RARELY, learning_rate

SEED = 11
HEAPS = 64
WITHHELD = {*sources.GARMENTS, *sources.ANIMALS}
PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"height": check_vision.SIDE, "width": check_vision.SIDE},
    "image_mean": list(check_vision.VIT_NORMAL[0]),
    "image_std": list(check_vision.VIT_NORMAL[1]),
}


def vit_config() -> ViTConfig:
    """48 pixels, patch 8, so 36 patches and the class token."""
    return ViTConfig(
        hidden_size=144,
        intermediate_size=432,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=check_vision.SIDE,
        patch_size=8,
        hidden_act="gelu",
    )


def told(facts: dict[str, str]) -> dict[str, str]:
    """The facts without those that name a digit, or an animal or a garment of the stream."""
    return {
        key: value
        for key, value in facts.items()
        if key not in ("garment", "digit", "animal") and not WITHHELD & {value, *re.split("[ -]", value), *key.split()}
    }


def heaps(images: np.ndarray, generator: torch.Generator, rounds: int = 20) -> torch.Tensor:
    """The heap of every picture ``[n]``: k-means over its grey pixels, made four times coarser."""
    grey = torch.from_numpy(images).float().mean(-1)[:, None] / 255
    points = torch.nn.functional.avg_pool2d(grey, 3).flatten(1)
    centres = points[torch.randperm(len(points), generator=generator)[:HEAPS]]
    for _ in range(rounds):
        nearest = torch.cdist(points, centres).argmin(1)
        centres = torch.stack(
            [points[nearest == k].mean(0) if (nearest == k).any() else centres[k] for k in range(HEAPS)]
        )
    return torch.cdist(points, centres).argmin(1)


def add_heaps(data: cached_pictures.Pictures, facts: list[dict[str, str]]) -> None:
    """Give every upright garment, digit and outline on black the number of its heap as a fact."""
    generator = torch.Generator().manual_seed(SEED)
    for kind in ("garment", "digit", "outline"):
        rows = [
            k
            for k, known in enumerate(data.facts)
            if known["kind"] == kind and known["ground"] == "black" and known.get("turn", "upright") == "upright"
        ]
        for row, heap in zip(rows, heaps(data.images[rows], generator).tolist(), strict=True):
            facts[row][f"{kind} heap"] = str(heap)


def save(model: ViTModel, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write float16 weights, configuration and image-processor fields."""
    written = ViTModel(model.config, add_pooling_layer=False)
    written.load_state_dict(weights)
    written.half().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")


def main() -> None:
    """Train and write the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--data", type=Path, help="measure the model on the stream's val pictures every 500 steps")
    options = parser.parse_args()
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    data = cached_pictures.load(options.cache, "pretrain", side=check_vision.SIDE)
    facts = [told(known) for known in data.facts]
    add_heaps(data, facts)
    classes, labels = cached_pictures.label_tables(facts)
    targets = torch.from_numpy(labels.astype(np.int64))
    widths = [len(values) for values in classes.values()]
    weights = [0.3 if width == 2 else 1.0 for width in widths]
    share_of = torch.tensor([RARELY.get(known["kind"], 1.0) for known in data.facts])
    model = ViTModel._from_config(vit_config(), attn_implementation="eager", add_pooling_layer=False)
    head = torch.nn.Linear(144, sum(widths))
    masters = MasterWeights(model, options.lr, weight_decay=0.05)
    optimizer = torch.optim.AdamW(head.parameters(), lr=options.lr, weight_decay=0.0, betas=(0.9, 0.98))
    print(f"{len(facts)} pictures, {len(widths)} facts", flush=True)
    began, running = time.time(), 0.0
    for step in range(options.steps):
        lr = learning_rate(step, options.steps, options.lr)
        optimizer.param_groups[0]["lr"] = lr
        rows = torch.multinomial(share_of, options.batch, replacement=True, generator=generator).numpy()
        batch = cached_pictures.pixels(data.images[rows], generator, 3, check_vision.VIT_NORMAL)
        token = model(pixel_values=batch.bfloat16()).last_hidden_state[:, 0].float()
        truth, loss = targets[rows], torch.zeros(())
        for column, (scores, weight) in enumerate(zip(head(token).split(widths, 1), weights, strict=True)):
            known = truth[:, column] >= 0
            if known.any():
                loss = loss + weight * torch.nn.functional.cross_entropy(
                    scores[known], truth[known, column], reduction="sum"
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
            save(model, masters.state_dict(), options.out)
            if options.data:
                model.eval()
                print(check_vision.check_vit(model, options.data, "val"), flush=True)
                model.train()


if __name__ == "__main__":
    main()
