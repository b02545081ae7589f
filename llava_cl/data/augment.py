"""Pictures of class folders as pixels: resized and cropped, or augmented in a way that depends on seeds alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llava_cl.data.images import normalise, resize_and_crop, to_rgb
from llava_cl.errors import InputError

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class Plain:
    """The centre of the resized picture.

    Args:
        size: side of the model's square in pixels.
        resize: see `llava_cl.data.images.resize_and_crop`.
        interpolation: "bilinear" or "bicubic".
        mean, std: of each channel.
    """

    def __init__(
        self,
        size: int,
        resize: int | tuple[int, int],
        interpolation: str,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        self._resize = (size, resize, RESAMPLING[interpolation])
        self._normalisation = (mean, std)

    def __call__(self, image: Image.Image, index: int) -> Tensor:
        """float32 `[3, size, size]`."""
        return torch.from_numpy(normalise(resize_and_crop(image, *self._resize), *self._normalisation))


class Augmented:
    """AutoAugment (Cubuk et al., CVPR 2019) and a random resized crop, both torchvision's.

    Args:
        policy: "cifar10" or "imagenet".
        size, interpolation, mean, std: see `Plain`.
        seed: with the epoch and the picture's index it fixes what is drawn.

    Raises:
        InputError: torchvision is not installed.
    """

    def __init__(
        self, policy: str, size: int, interpolation: str, mean: tuple[float, ...], std: tuple[float, ...], seed: int
    ) -> None:
        self._transform = _torchvision_transform(policy, size, interpolation)
        self._normalisation = (mean, std)
        self._seed = seed
        self.epoch = 0

    def __call__(self, image: Image.Image, index: int) -> Tensor:
        """float32 `[3, size, size]`, the same for the same epoch and index."""
        text = f"{self._seed}/{self.epoch}/{index}"
        with torch.random.fork_rng(devices=[]):
            # Only that of the CPU, from which torchvision draws.
            torch.default_generator.manual_seed(
                int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
            )
            augmented = self._transform(to_rgb(image))
        return torch.from_numpy(normalise(augmented, *self._normalisation))


def _torchvision_transform(policy: str, size: int, interpolation: str) -> Callable[[Image.Image], Any]:
    try:
        from torchvision import transforms
    except (ImportError, RuntimeError) as error:  # the latter where its build does not fit that of torch
        raise InputError(
            f"images.augment: AutoAugment is torchvision's, which cannot be imported ({error}): "
            "pip install 'llava_cl[vision]'."
        ) from error
    return transforms.Compose(
        [
            transforms.AutoAugment(
                transforms.AutoAugmentPolicy(policy), interpolation=transforms.InterpolationMode.BILINEAR
            ),
            transforms.RandomResizedCrop(size, interpolation=transforms.InterpolationMode(interpolation)),
        ]
    )
