"""Corrupted images: four ways, each within its measure, drawn by the sample id alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from sicog_exp.data.corruption import ANGLES, CORRUPTIONS, blur, corrupt, jitter, mask, turn


@pytest.fixture(scope="module")
def scene(world_images: list[Path]) -> Image.Image:
    return Image.open(world_images[0]).convert("RGB")


def draws(count: int = 30) -> Iterator[np.random.Generator]:
    return (np.random.default_rng(i) for i in range(count))


def plain(size: tuple[int, int], level: int) -> Image.Image:
    return Image.new("RGB", size, (level, level, level))


@settings(max_examples=40, deadline=None)
@given(name=st.text(max_size=20), size=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_the_same_id_gives_the_same_picture_of_the_same_size(name: str, size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    one, two = corrupt(image, name), corrupt(image.copy(), name)
    assert (one.size, one.mode, one.tobytes()) == (size, "RGB", two.tobytes())
    assert image.tobytes() == pixels.tobytes()


def test_ids_draw_each_corruption_about_as_often(scene: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: Counter[str] = Counter()
    for name in CORRUPTIONS:
        monkeypatch.setitem(CORRUPTIONS, name, lambda image, rng, name=name: drawn.update([name]) or image)
    for i in range(400):
        corrupt(scene, f"unlabeled-{i}")
    assert set(drawn) == {"blur", "jitter", "turn", "mask"}
    assert all(70 <= count <= 130 for count in drawn.values()), drawn


def test_no_two_ids_draw_the_same(scene: Image.Image) -> None:
    made = {corrupt(scene, f"unlabeled-{i}").tobytes() for i in range(60)}
    assert len(made) == 60
    assert scene.tobytes() not in made


def test_blur_spreads_a_point_by_3_to_5_pixels() -> None:
    edge = plain((121, 121), 0)
    edge.paste((255, 255, 255), (60, 0, 121, 121))
    spreads = []
    for rng in draws():
        row = np.asarray(blur(edge, rng), float)[60, :, 0]
        rise = np.diff(row) / row[-1]
        place = np.arange(len(rise))
        spreads.append(np.sqrt((rise * (place - (rise * place).sum()) ** 2).sum()))
    assert 2.7 < min(spreads) < 3.4
    assert 4.6 < max(spreads) < 5.3


def test_jitter_keeps_to_its_factors() -> None:
    """Of a grey picture only the brightness changes: by a factor of 0.2 to 1.8."""
    found = [int(np.asarray(jitter(plain((8, 8), 100), rng))[0, 0, 0]) for rng in draws(200)]
    assert 19 <= min(found) < 30
    assert 170 < max(found) <= 181


def test_jitter_moves_colours(scene: Image.Image) -> None:
    red = Image.new("RGB", (4, 4), (200, 60, 60))
    hues = {np.asarray(jitter(red, rng).convert("HSV"))[0, 0, 0] for rng in draws(100)}
    turns = sorted((int(hue) + 128) % 256 - 128 for hue in hues)
    assert len(turns) > 20
    assert -54 <= turns[0] < -35
    assert 35 < turns[-1] <= 54


def test_turn_mirrors_and_rotates(scene: Image.Image) -> None:
    """Turned back and mirrored, the middle is what it was."""
    large = scene.resize((216, 216))
    middle = (80, 80, 136, 136)
    for rng in draws(8):
        again = np.random.default_rng(0)
        again.bit_generator.state = rng.bit_generator.state
        angle = again.uniform(*ANGLES)
        back = ImageOps.mirror(turn(large, rng).rotate(-angle, resample=Image.Resampling.BILINEAR))
        away = np.asarray(back.crop(middle), float) - np.asarray(large.crop(middle), float)
        assert np.abs(away).mean() < 8
        assert np.abs(np.asarray(turn(large, again), float) - np.asarray(large, float)).mean() > 15


@pytest.mark.parametrize("size", [(72, 72), (90, 40), (7, 33)])
def test_mask_cuts_three_tenths_off_by_a_line(size: tuple[int, int]) -> None:
    for rng in draws():
        black = np.asarray(mask(plain(size, 200), rng)).max(-1) == 0
        assert black.mean() == pytest.approx(0.3, abs=1.5 / min(size))
        # A line parts the two sides: along every row the mask begins or ends at most once.
        for lines in (black, black.T):
            assert max(sum(a != b for a, b in pairwise(line)) for line in lines.tolist()) <= 1


def test_mask_leaves_the_rest_as_it_is(scene: Image.Image) -> None:
    for rng in draws(5):
        masked, pixels = np.asarray(mask(scene, rng)), np.asarray(scene)
        left = masked.max(-1) > 0
        assert np.array_equal(masked[left], pixels[left])
