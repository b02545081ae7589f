"""A ViT of a few thousand parameters and a class-incremental stream of coloured squares: built on the fly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTModel

CONFIG = ViTConfig(
    hidden_size=24,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
)
COLOURS = {
    "black": (20, 20, 20),
    "blue": (40, 60, 220),
    "green": (30, 200, 60),
    "red": (220, 30, 30),
    "white": (240, 240, 240),
    "yellow": (230, 220, 40),
}
ORDER = ("red", "black", "green", "white", "blue", "yellow")


def build_model(folder: Path, *, seed: int = 0) -> Path:
    """Writes a random ViT in the layout of transformers; returns the folder."""
    torch.manual_seed(seed)
    ViTModel(CONFIG, add_pooling_layer=False).save_pretrained(folder)
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def build_images(folder: Path, count: int, *, seed: int) -> None:
    """Writes `count` noisy squares of each colour, 20 x 16 pixels."""
    noise = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        place = folder / name
        place.mkdir(parents=True)
        for index in range(count):
            pixels = np.clip(np.asarray(colour) + noise.normal(0, 25, (16, 20, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{index}.png")


def run_content(folder: Path, method: str = "sequential") -> dict[str, Any]:
    """The content of a run file for a stream of three tasks of two colours; builds what it needs below `folder`."""
    if not (folder / "model").exists():
        build_model(folder / "model")
        build_images(folder / "data" / "train", 12, seed=1)
        build_images(folder / "data" / "val", 4, seed=2)
    return {
        "name": "tiny_vit",
        "data_root": str(folder / "data"),
        "model": {"family": "vit", "path": str(folder / "model"), "dtype": "float32"},
        "method": {"name": method},
        "benchmark": {
            "name": "colours",
            "evaluate": "seen",
            "tasks": [
                {"name": f"T{number + 1}", "train": "train", "test": "val", "classes": list(ORDER[2 * number :][:2])}
                for number in range(3)
            ],
        },
        "lora": {"rank": 2, "alpha": 2},
        "training": {
            "epochs": 4,
            "learning_rate": 5e-3,
            "head_learning_rate": 2e-2,
            "global_batch": 8,
            "micro_batch": 4,
            "scheduler": "steps",
            "milestones": [0.5, 0.75],
        },
        "measurement": {"ratio": 1.0, "batch_size": 8},
        "evaluation": {"batch_size": 8},
    }
