"""What families of models take besides token ids and a mask: token types, places in an image's grid, image features.

Shapes in names: B prompts, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
GRIDS = ("image_grid_thw",)
"""Image tensors from which positions follow."""


@lru_cache(maxsize=64)
def _takes(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(signature(forward).parameters)


def token_types(model: PreTrainedModel, ids_BL: Tensor) -> dict[str, Tensor]:
    """1 where an image's token stands, 0 elsewhere, under the model's own name for it; nothing for most models.

    Gemma 3 attends both ways inside an image, Qwen-VL numbers an image's tokens by row and column.
    """
    names = [name for name in TOKEN_TYPES if name in _takes(type(model).forward)]
    return {name: (ids_BL == model.config.image_token_id).long() for name in names}


def positions(model: PreTrainedModel, ids_BL: Tensor, mask_BL: Tensor, images: Mapping[str, Tensor]) -> Tensor:
    """Positions of padded prompts: (B, L), or (3, B, L) where the model has time, row and column (M-RoPE).

    `images` are the prompts' image tensors in reading order. What follows a prompt goes on behind its largest position.
    """
    grid = {name: value for name, value in images.items() if name in GRIDS}
    if not grid:
        return (mask_BL.cumsum(-1) - 1).clamp(min=0)
    found, _ = model.model.get_rope_index(  # type: ignore[operator]
        ids_BL, attention_mask=mask_BL, **token_types(model, ids_BL), **grid
    )
    return found


def packing_problem(model: PreTrainedModel) -> str | None:
    """Why several samples in one row would not stay apart; None where they do."""
    if "mrope_section" in str(model.config):
        return "numbers positions by place in the image (M-RoPE), which packed rows would break"
    if "token_type_ids" in _takes(type(model).forward):
        return "attends both ways inside an image, whose places transformers' sliding masks mistake in packed rows"
    if model.config._attn_implementation == "flash_attention_2":
        # transformers reads from positions where samples begin for a batch of one row alone, and mixes them in others
        return "attends by flash_attention_2, which keeps packed samples apart in a batch of one row alone; use sdpa"
    return None


def shares_features(model: PreTrainedModel) -> bool:
    """Whether image features can stand in for images: not where deeper layers take some too (Qwen3-VL)."""
    vision = getattr(model.config, "vision_config", None)
    return hasattr(model, "get_image_features") and not getattr(vision, "deepstack_visual_indexes", None)


def image_features(model: PreTrainedModel, images: Mapping[str, Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Features (tokens, width) of several examples' images, `counts` tokens each; `images` as `join_images` gives."""
    output = model.get_image_features(**images)  # type: ignore[operator]
    found: Any = getattr(output, "pooler_output", output)
    parts = found if isinstance(found, list | tuple) else [found]
    rows = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
    return list(rows.split(list(counts)))
