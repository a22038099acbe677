"""How many pixels of an image a model sees: one recipe key, in the words of each family's own processor."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class ResolutionError(ValueError):
    """A cap that a processor cannot keep; the message says which it can."""


def cap_pixels(config: PretrainedConfig, processor: Any, pixels: int) -> None:
    """Let the processor make at most `pixels` of an image, overview tiles not counted; a lower cap of its own stays.

    What is set is saved with the model. Raises ResolutionError where the processor has only larger sizes.
    """
    images = processor.image_processor
    if getattr(images, "image_grid_pinpoints", None):
        _fewer_grids(config, images, pixels)
    elif getattr(images, "max_image_size", None):
        _fewer_tiles_a_side(images, pixels)
    elif hasattr(images, "max_patches"):
        _fewer_tiles(images, pixels)
    elif hasattr(images, "merge_size"):
        _smaller(images, pixels)
    else:
        _one_size(type(processor).__name__, images, pixels)


def _one_size(name: str, images: Any, pixels: int) -> None:
    """LLaVA-1.5, Gemma 3: nothing to set, and a cap above their size is kept."""
    size = images.crop_size if getattr(images, "do_center_crop", False) else images.size
    height, width = (getattr(size, side, None) or size[side] for side in ("height", "width"))
    if height * width > pixels:
        raise ResolutionError(f"{name} shows every image at one size, {height * width} pixels; leave the key out")


def _require(pixels: int, least: int) -> None:
    if pixels < least:
        raise ResolutionError(f"the least that this model's processor can show an image with is {least} pixels")


def _fewer_grids(config: PretrainedConfig, images: Any, pixels: int) -> None:
    """AnyRes (LLaVA-NeXT, LLaVA-OneVision): the processor and the model choose among the same grids."""
    grids = [list(grid) for grid in images.image_grid_pinpoints]
    _require(pixels, min(height * width for height, width in grids))
    kept = [grid for grid in grids if grid[0] * grid[1] <= pixels]
    images.image_grid_pinpoints = kept
    config.image_grid_pinpoints = kept


def _fewer_tiles_a_side(images: Any, pixels: int) -> None:
    """Idefics3, SmolVLM: an image's longer side is brought to a multiple of a tile's."""
    side = images.max_image_size["longest_edge"]
    _require(pixels, side * side)
    longest = min(images.size["longest_edge"], isqrt(pixels) // side * side)
    images.size = _sized(images.size, {"longest_edge": longest})


def _fewer_tiles(images: Any, pixels: int) -> None:
    """InternVL: tiles of one size, as many as the image's shape asks for."""
    tile = images.size["height"] * images.size["width"]
    _require(pixels, tile)
    images.max_patches = min(images.max_patches, pixels // tile)
    images.min_patches = min(images.min_patches, images.max_patches)


def _smaller(images: Any, pixels: int) -> None:
    """Qwen-VL: an image keeps its shape; its sides are multiples of a merged patch's."""
    _require(pixels, (images.patch_size * images.merge_size) ** 2)
    least, most = images.size["shortest_edge"], images.size["longest_edge"]
    images.size = _sized(images.size, {"shortest_edge": min(least, pixels), "longest_edge": min(most, pixels)})


def _sized(before: Any, sizes: Mapping[str, int]) -> Any:
    return dict(sizes) if isinstance(before, dict) else type(before)(**sizes)
