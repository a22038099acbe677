"""Contamination: planted near-copies are found, different pictures and recurring short questions are not."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from sicog_exp.curation.contamination import (
    Overlap,
    Picture,
    Question,
    Row,
    counts,
    overlaps,
    picture_matches,
    picture_of,
)
from sicog_exp.data.scenes import make_scene, render

Change = Callable[[Image.Image, np.random.Generator], Image.Image]
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket", "camera", "coins", "page", "brick", "grass", "retina",
               "immunohistochemistry", "hubble_deep_field")  # fmt: skip


def world(split: str, count: int, first: int = 0) -> list[Image.Image]:
    return [Image.fromarray(render(make_scene(11, split, i), 11)) for i in range(first, first + count)]


def photographs() -> list[Image.Image]:
    data = pytest.importorskip("skimage.data")
    return [Image.fromarray(getattr(data, name)()).convert("RGB") for name in PHOTOGRAPHS]


def resized(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    scale = rng.uniform(0.5, 2)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def recompressed(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(30, 80)))
    return Image.open(buffer).convert("RGB")


def cropped(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    left, right, top, bottom = rng.uniform(0, 0.1, 4)
    w, h = image.size
    return image.crop((round(left * w), round(top * h), round(w - right * w), round(h - bottom * h)))


def brighter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(rng.uniform(0.8, 1.2))


CHANGES: tuple[Change, ...] = (resized, recompressed, cropped, brighter)


def pictures(images: list[Image.Image], prefix: str) -> dict[str, Picture]:
    return {f"{prefix}{i}": picture_of(image) for i, image in enumerate(images)}


def test_planted_near_copies_are_found_and_nothing_else() -> None:
    """40 copies, each changed in one or two ways, hidden among 200 clean pictures; a crop may be on either side."""
    rng = np.random.default_rng(5)
    originals = [*world("benchmark", 28), *photographs()]
    copies = []
    for i, image in enumerate(originals):
        copy = CHANGES[i % 4](image, rng)
        copies.append(CHANGES[(i // 4) % 4](copy, rng) if i % 3 == 0 else copy)
    # The other way round: the training set holds the original of what the benchmark crops.
    copies[2], originals[2] = originals[2], copies[2]
    training = pictures(copies, "copy") | pictures(world("unlabeled", 200), "clean")
    found = picture_matches(training, pictures([*originals, *world("development", 60)], "benchmark"))
    right = {m.image for m in found if m.benchmark_image == m.image.replace("copy", "benchmark")}
    assert len(right) >= 38, sorted({f"copy{i}" for i in range(40)} - right)
    assert {(m.image, m.benchmark_image) for m in found if m.image not in right} == set()
    assert all(0 <= m.distance <= 0.13 for m in found)


def test_different_pictures_are_no_copies() -> None:
    """30,000 pairs of different built-in scenes, which share grounds, icons and places, and 66 of photographs."""
    assert picture_matches(pictures(world("unlabeled", 200), "t"), pictures(world("benchmark", 150), "b")) == []
    shots = photographs()
    for i in range(len(shots)):
        others = pictures([shot for j, shot in enumerate(shots) if j != i], "b")
        assert picture_matches({"t": picture_of(shots[i])}, others) == []


def plain(color: str, x: int) -> Image.Image:
    image = Image.new("RGB", (64, 64), "white")
    image.paste(color, (x, 20, x + 20, 40))
    return image


def test_plain_pictures_are_judged_by_their_pixels_alone() -> None:
    training = pictures([plain("red", 20), plain("red", 22), plain("blue", 30)], "t")
    found = picture_matches(training, pictures([plain("red", 21), plain("blue", 30)], "b"))
    assert [(m.image, m.benchmark_image, m.how) for m in found] == [("t2", "b1", "same pixels")]


def test_the_same_pixels_in_another_file_are_the_same() -> None:
    image = world("benchmark", 1)[0]
    (match,) = picture_matches({"t": picture_of(image.copy())}, {"b": picture_of(image)})
    assert (match.how, match.distance) == ("same pixels", 0.0)


def test_a_reworded_question_beside_the_same_picture_is_found_and_its_likeness_said() -> None:
    image = world("benchmark", 1)[0]
    shown = {"b": picture_of(image)}
    questions = [Question("task", "q0", "Which thing is furthest left?", "dog", ("b",)),
                 Question("task", "q1", "How many tools are there?", "2", ("b",))]  # fmt: skip
    row = Row("unlabeled", "u1:q0", "How many tools can you see there?", "", ("t",))
    copy = {"t": picture_of(recompressed(image, np.random.default_rng(1)))}
    (overlap,) = overlaps([row], copy, questions, shown)
    assert (overlap.how, overlap.task, overlap.benchmark_id, overlap.id) == ("near copy", "task", "q1", "u1:q0")
    assert 0.3 < overlap.question_similarity < 1


LETTER = ("The letter says that the shipment left the harbour on the third of May and was expected two weeks later; "
          "on which day did the crew expect to arrive")  # fmt: skip


@pytest.mark.parametrize(
    ("question", "response", "expected"),
    [
        (LETTER + "?", "the seventeenth of May", True),
        ("Read this. " + LETTER.replace("says that", "says:") + "?", "the seventeenth of May", True),
        (LETTER + "?", "a Monday", False),  # the question without its answer
        (LETTER + "?", "", True),  # unlabeled: the question is what the model would be asked
        ("On which day did the crew expect to arrive?", "the seventeenth of May", False),
        ("Tell me about harbours.", "They are places where ships are loaded.", False),
    ],
)
def test_long_texts_count_alone(question: str, response: str, expected: bool) -> None:
    asked = [Question("docs", "d7", LETTER + "?", "The seventeenth of May", ("page",))]
    blank = picture_of(Image.new("RGB", (60, 60), "white"))
    found = list(overlaps([Row("instruction", "i3", question, response)], {}, asked, {"page": blank}))
    assert [(o.how, o.benchmark_id) for o in found] == ([("text", "d7")] if expected else [])


def test_short_questions_and_forms_of_words_recur_without_being_contamination() -> None:
    grey, white = (picture_of(Image.new("RGB", (60, 60), color)) for color in ("grey", "white"))
    form = "Look at the picture and answer with one word or a short phrase what is shown at the"
    asked = [Question("t", f"q{i}", f"{form} {place}?", "dog", (f"b{i}",)) for i, place in enumerate("abcd")]
    asked.append(Question("t", "q9", "Where is the hat relative to the apple?", "left", ("b0",)))
    rows = [Row("annotated", "a", f"{form} a?", "dog", ("t",)),
            Row("annotated", "b", "Where is the hat relative to the apple?", "left", ("t",))]  # fmt: skip
    assert list(overlaps(rows, {"t": grey}, asked, {f"b{i}": white for i in range(4)})) == []


def test_rows_count_once_by_split_and_how() -> None:
    def one(id: str, how: str) -> Overlap:
        return Overlap("annotated", id, None, "t", "q", how, 0.0, 1.0)

    assert counts([one("a", "near copy"), one("a", "text"), one("b", "text")]) == {
        "annotated": {"near copy": 1, "text": 1}}  # fmt: skip
