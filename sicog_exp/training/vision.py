"""Vision pre-training of the embedded base: a tower learns what is where before any language is attached to it.

Real bases start from a contrastively trained tower; at this size dense labels need far fewer images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset

from sicog_exp.data.scenes import CELL, COLORS, NAMES, PLACES, make_scene, render
from sicog_exp.recipe import StageConfig
from sicog_exp.training.modules import Stage


class CellProbe(nn.Module):
    """Names what each patch shows; thrown away after pre-training. The world's cells are the tower's patches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.name = nn.Linear(width, len(NAMES) + 1)
        self.color = nn.Linear(width, len(COLORS) + 1)

    def forward(self, patches_BPD: Tensor) -> tuple[Tensor, Tensor]:
        """Logits over names (batch, patches, names + 1) and colours (batch, patches, colours + 1); 0 is empty."""
        return self.name(patches_BPD), self.color(patches_BPD)


class VisionPretraining(Stage):
    """Name and colour of every cell from the vision tower's patches."""

    def __init__(self, tower: nn.Module, config: StageConfig) -> None:
        super().__init__(config)
        self.tower = tower
        shape: Any = tower.config
        if (shape.image_size // shape.patch_size) ** 2 != len(PLACES):
            raise ValueError(f"vision pre-training needs one patch per cell of the scene: shape.patch_size={CELL}")
        self.probe = CellProbe(shape.hidden_size)

    def parameter_groups(self) -> list[dict[str, Any]]:
        used = [p for name, p in self.tower.named_parameters() if "post_layernorm" not in name]
        return [{"params": [*used, *self.probe.parameters()], "lr": self.config.vision_lr}]

    def terms(self, micro_batch: Mapping[str, Any]) -> int:
        return micro_batch["names"].numel()

    def work(self, batch: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        return {"samples": sum(len(micro["pixel_values"]) for micro in batch)}

    def batch_loss(self, micro_batch: Mapping[str, Any]) -> tuple[Tensor, int]:
        patches = self.tower(pixel_values=micro_batch["pixel_values"]).last_hidden_state[:, 1:]
        names, colors = self.probe(patches)
        loss = F.cross_entropy(names.flatten(0, 1), micro_batch["names"].flatten(), reduction="sum")
        loss += F.cross_entropy(colors.flatten(0, 1), micro_batch["colors"].flatten(), reduction="sum")
        self._report(names, colors, micro_batch)
        return loss, self.terms(micro_batch)

    def _report(self, names: Tensor, colors: Tensor, micro_batch: Mapping[str, Any]) -> None:
        filled = micro_batch["names"] > 0
        self.log("name_accuracy", (names.argmax(-1) == micro_batch["names"])[filled].float().mean())
        self.log("color_accuracy", (colors.argmax(-1) == micro_batch["colors"])[filled].float().mean())


class SceneCells(IterableDataset):
    """Steps of rendered base scenes with the name and colour of each cell."""

    def __init__(self, seed: int, batch_size: int, pixels: Any) -> None:
        self.first_step = 0
        self._seed, self._batch_size, self._pixels = seed, batch_size, pixels

    def __iter__(self) -> Iterator[list[dict[str, Tensor]]]:
        step = self.first_step
        while True:
            yield [self._batch(step * self._batch_size)]
            step += 1

    def _batch(self, first: int) -> dict[str, Tensor]:
        names = np.zeros((self._batch_size, len(PLACES)), np.int64)
        colors = np.zeros_like(names)
        images = []
        for i in range(self._batch_size):
            scene = make_scene(self._seed, "base", first + i)
            images.append(render(scene, self._seed))
            for thing in scene.things:
                cell = PLACES.index(thing.place)
                names[i, cell] = NAMES.index(thing.name) + 1
                colors[i, cell] = list(COLORS).index(thing.color) + 1
        pixels = self._pixels(images)["pixel_values"]
        return {"pixel_values": pixels, "names": torch.from_numpy(names), "colors": torch.from_numpy(colors)}
