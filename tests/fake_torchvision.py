"""Stands for torchvision, which the tests do without: random transforms of pictures that list what is made of them."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image


class Policy(enum.Enum):
    """Those of AutoAugment that are used."""

    CIFAR10 = "cifar10"
    IMAGENET = "imagenet"


class Mode(enum.Enum):
    """Those of interpolation that are used."""

    BILINEAR = "bilinear"
    BICUBIC = "bicubic"


def install(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Makes `torchvision.transforms` importable; returns a list of all transforms made and all seeds drawn from."""
    listed: list[tuple[Any, ...]] = []

    class AutoAugment:
        """Adds a random value to all pixels."""

        def __init__(self, policy: Policy, interpolation: Mode) -> None:
            listed.append(("augment", policy, interpolation))

        def __call__(self, image: Image.Image) -> Image.Image:
            listed.append(("seed", torch.initial_seed()))
            value = int(torch.randint(0, 100, ()))
            return image.point([(level + value) % 256 for level in range(256)] * 3)

    class RandomResizedCrop:
        """Cuts out a random part and resizes it."""

        def __init__(self, size: int, interpolation: Mode) -> None:
            listed.append(("crop", size, interpolation))
            self._size = size

        def __call__(self, image: Image.Image) -> Image.Image:
            left, top = (torch.rand(2) * 5).int().tolist()
            return image.crop((left, top, image.width - 2, image.height - 3)).resize((self._size, self._size))

    def compose(parts: list[Callable[[Image.Image], Image.Image]]) -> Callable[[Image.Image], Image.Image]:
        def transform(image: Image.Image) -> Image.Image:
            for part in parts:
                image = part(image)
            return image

        return transform

    package, transforms = ModuleType("torchvision"), ModuleType("torchvision.transforms")
    vars(transforms).update(
        AutoAugment=AutoAugment,
        AutoAugmentPolicy=Policy,
        Compose=compose,
        InterpolationMode=Mode,
        RandomResizedCrop=RandomResizedCrop,
    )
    vars(package)["transforms"] = transforms
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.transforms", transforms)
    return listed
