"""Measure the two models for vision streams on the pictures of playground/data/Classes.

Usage: python playground/prepare/check_vision.py --data playground/data --vit playground/vit --clip playground/clip
Prints, for one split, how often the nearest class mean and a linear probe are right over all classes of the incremental
stream (features of the ViT, means and probe from the train pictures), and how often CLIP's zero-shot choice is right.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel, ViTModel

import cached_pictures

SIDE = 48
VIT_NORMAL = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# the template of every set, for class names with a space in place of "_"
TEMPLATES = {
    "Garments": "a photo of a {}.",
    "Digits": "a photo of the number {}.",
    "Outlines": "the outline of a {}.",
    "Icons": "an icon of a {}.",
    "Land": "a satellite photo of {}.",
}


def read(folder: Path) -> tuple[np.ndarray, torch.Tensor, list[str]]:
    """Pictures uint8 ``[n, 48, 48, 3]``, labels and class names of a folder of class folders."""
    names = sorted(place.name for place in folder.iterdir())
    images, labels = [], []
    for label, name in enumerate(names):
        for file in sorted((folder / name).iterdir()):
            images.append(cached_pictures.resized(np.asarray(Image.open(file).convert("RGB")), SIDE))
            labels.append(label)
    return np.stack(images), torch.tensor(labels), names


@torch.no_grad()
def vit_features(model: ViTModel, images: np.ndarray) -> torch.Tensor:
    """The class token after the last norm, float32 ``[n, 144]``."""
    parts = [cached_pictures.pixels(images[k : k + 200], normal=VIT_NORMAL) for k in range(0, len(images), 200)]
    return torch.cat([model(pixel_values=part.to(model.dtype)).last_hidden_state[:, 0].float() for part in parts])


def nearest_mean(train: torch.Tensor, truth: torch.Tensor, test: torch.Tensor, answers: torch.Tensor) -> float:
    """Accuracy, percent, of the nearest class mean by cosine."""
    means = torch.stack([train[truth == k].mean(0) for k in range(int(truth.max()) + 1)])
    guess = torch.nn.functional.cosine_similarity(test[:, None], means[None], dim=-1).argmax(1)
    return 100 * float((guess == answers).float().mean())


def linear_probe(train: torch.Tensor, truth: torch.Tensor, test: torch.Tensor, answers: torch.Tensor) -> float:
    """Accuracy, percent, of logistic regression on standardised features."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    torch.manual_seed(0)
    probe = torch.nn.Linear(train.shape[1], int(truth.max()) + 1)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(probe((train - mean) / std), truth)
        loss = loss + 1e-2 * probe.weight.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return 100 * float((probe((test - mean) / std).argmax(1) == answers).float().mean())


def check_vit(model: ViTModel, data: Path, part: str) -> dict[str, float]:
    """Nearest class mean and linear probe over all classes of the incremental stream, then over every grey set."""
    found = {}
    for name, folder in (("all", "Incremental"), *((n, f"Classes/{n}") for n in ("Garments", "Digits", "Outlines"))):
        images, truth, _ = read(data / folder / "train")
        shown, answers, _ = read(data / folder / part)
        features = vit_features(model, images), truth, vit_features(model, shown), answers
        found[f"{name} nearest mean"] = round(nearest_mean(*features), 1)
        found[f"{name} linear probe"] = round(linear_probe(*features), 1)
    return found


@torch.no_grad()
def check_clip(model: CLIPModel, tokenizer: Any, data: Path, part: str) -> dict[str, float]:
    """Zero-shot accuracy, percent, on every set."""
    found = {}
    for name, template in TEMPLATES.items():
        images, answers, classes = read(data / "Classes" / name / part)
        texts = tokenizer([template.format(c.replace("_", " ")) for c in classes], padding=True, return_tensors="pt")
        pixels = cached_pictures.pixels(images).to(model.dtype)
        logits = model(input_ids=texts.input_ids, attention_mask=texts.attention_mask, pixel_values=pixels)
        guess = logits.logits_per_image.argmax(1)
        found[name] = round(100 * float((guess == answers).float().mean()), 1)
    return found


def main() -> None:
    """Print what the models know."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--vit", type=Path)
    parser.add_argument("--clip", type=Path)
    parser.add_argument("--part", default="val", choices=("val", "test"))
    options = parser.parse_args()
    if options.vit:
        model = ViTModel.from_pretrained(options.vit, add_pooling_layer=False, dtype=torch.float32)
        print(json.dumps({"vit": check_vit(model.eval(), options.data, options.part)}, indent=1))
    if options.clip:
        clip = CLIPModel.from_pretrained(options.clip, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(options.clip)
        print(json.dumps({"zero-shot": check_clip(clip, tokenizer, options.data, options.part)}, indent=1))


if __name__ == "__main__":
    main()
