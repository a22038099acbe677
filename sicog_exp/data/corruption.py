"""Corrupted images: what a model says about one is a response to reject (paper.md, Curation, preference variant).

One of four corruptions an image, chosen and drawn by the sample id alone: the same in every process and run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

BLUR = (3.0, 5.0)
"""Gaussian blur's standard deviation in pixels, lowest and highest."""
JITTER = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
"""Largest change: factors lie in 1 +- it, the hue moves by +- it of its circle."""
ANGLES = (30.0, 330.0)
"""Degrees of the rotation. The paper names none; ours never leaves a picture nearly upright."""
MASKED = 0.3
"""Share of the pixels on the masked side of the line."""


def corrupt(image: Image, sample_id: str) -> Image:
    """A corrupted copy of an RGB image, of the same size."""
    rng = np.random.default_rng(list(hashlib.sha256(f"corrupt:{sample_id}".encode()).digest()))
    names = list(CORRUPTIONS)
    return CORRUPTIONS[names[rng.integers(len(names))]](image, rng)


def blur(image: Image, rng: np.random.Generator) -> Image:
    """Gaussian blur."""
    from PIL import ImageFilter

    return image.filter(ImageFilter.GaussianBlur(rng.uniform(*BLUR)))


def jitter(image: Image, rng: np.random.Generator) -> Image:
    """Brightness, contrast, saturation and hue changed in random order, as torchvision's ColorJitter does."""
    from torchvision.transforms import functional

    for i in rng.permutation(len(JITTER)):
        name, most = list(JITTER.items())[i]
        amount = rng.uniform(-most, most)
        change: Callable[[Image, float], Image] = getattr(functional, f"adjust_{name}")
        image = change(image, amount if name == "hue" else 1 + amount)
    return image


def turn(image: Image, rng: np.random.Generator) -> Image:
    """Mirrored left to right, then rotated about its centre; black where nothing is left to show."""
    from PIL import Image as Images
    from PIL import ImageOps

    return ImageOps.mirror(image).rotate(rng.uniform(*ANGLES), resample=Images.Resampling.BILINEAR)


def mask(image: Image, rng: np.random.Generator) -> Image:
    """Black on one side of a line in a random direction, which cuts off MASKED of the pixels."""
    from PIL import Image as Images

    pixels = np.array(image)
    angle = rng.uniform(0, 2 * np.pi)
    rows, columns = np.indices(pixels.shape[:2])
    along = rows * np.sin(angle) + columns * np.cos(angle)
    pixels[along > np.quantile(along, 1 - MASKED)] = 0
    return Images.fromarray(pixels)


CORRUPTIONS: dict[str, Callable[[Image, np.random.Generator], Image]] = {
    "blur": blur, "jitter": jitter, "turn": turn, "mask": mask,
}  # fmt: skip
