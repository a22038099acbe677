"""Every question has exactly one right answer, found again here from the scene alone, by other code."""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache

import numpy as np
import pytest

from sicog_exp.data.questions import (
    CAPTIONS,
    Question,
    base_turns,
    chain_of_description,
    chain_of_thought,
    description,
    questions,
    text_turns,
)
from sicog_exp.data.scenes import CATEGORIES, CATEGORY_OF, COLORS, NAMES, PLACES, Scene, Thing, make_scene, rng_for
from sicog_exp.prompts import final_text, normalize_answer, steps_of

SCENES = 1000
CATEGORY = "|".join(CATEGORIES)
COLOR = "|".join(COLORS)
NAME = "|".join(NAMES)
WORDINGS = {
    "naming": r"Which thing is furthest (left|right|up|down)\?",
    "existence": rf"Is there any ({CATEGORY}) on the (left|right|top|bottom)\?",
    "attribute": rf"At which place is the ({CATEGORY})\?",
    "counting": rf"How many ({CATEGORY})s are there\?",
    "comparison": rf"Are there more ({CATEGORY})s or ({CATEGORY})s\?",
    "relation": rf"Where is the ({NAME}) relative to the ({NAME})\?",
    "category": rf"Which category is (?:the ({COLOR}) thing|most common)\?",
}


@lru_cache(maxsize=1)
def asked() -> list[tuple[Scene, Question]]:
    pairs = []
    for i in range(SCENES):
        scene = make_scene(11, "development", i)
        pairs += [(scene, question) for question in questions(scene, rng_for(11, "development", i, "t"), 7)]
    return pairs


def of_family(family: str) -> list[tuple[Scene, Question]]:
    return [(scene, question) for scene, question in asked() if question.family == family]


# The truth, recomputed: all answers that a careful person could give.


def position(thing: Thing) -> tuple[int, int]:
    return divmod(PLACES.index(thing.place), 3)


def naming(scene: Scene, word: str) -> set[str]:
    axis, sign = {"left": (1, 1), "right": (1, -1), "up": (0, 1), "down": (0, -1)}[word]
    end = min(sign * position(thing)[axis] for thing in scene.things)
    extremal = [thing for thing in scene.things if sign * position(thing)[axis] == end]
    return {thing.name for thing in extremal} if len(extremal) == 1 else {"several", "things"}


def existence(scene: Scene, category: str, side: str) -> set[str]:
    axis, line = {"left": (1, 0), "right": (1, 2), "top": (0, 0), "bottom": (0, 2)}[side]
    members = [thing for thing in scene.things if CATEGORY_OF[thing.name] == category]
    return {"yes" if any(position(thing)[axis] == line for thing in members) else "no"}


def attribute(scene: Scene, category: str) -> set[str]:
    return {thing.place for thing in scene.things if CATEGORY_OF[thing.name] == category}


def counting(scene: Scene, category: str) -> set[str]:
    return {str(sum(CATEGORY_OF[thing.name] == category for thing in scene.things))}


def comparison(scene: Scene, first: str, second: str) -> set[str]:
    counts = Counter(CATEGORY_OF[thing.name] for thing in scene.things)
    if counts[first] == counts[second]:
        return {"equal"}
    return {f"{first if counts[first] > counts[second] else second}s"}


def relation(scene: Scene, first: str, second: str) -> set[str]:
    ones, others = ([t for t in scene.things if t.name == name] for name in (first, second))
    answers: set[str] = set()
    for a in map(position, ones):
        for b in map(position, others):
            answers |= {"left"} if a[1] < b[1] else {"right"} if a[1] > b[1] else set()
            answers |= {"above"} if a[0] < b[0] else {"below"} if a[0] > b[0] else set()
    return answers


def category(scene: Scene, color: str | None) -> set[str]:
    if color:
        return {CATEGORY_OF[thing.name] for thing in scene.things if thing.color == color}
    counts = Counter(CATEGORY_OF[thing.name] for thing in scene.things)
    return {name for name, count in counts.items() if count == max(counts.values())}


TRUTH = {"naming": naming, "existence": existence, "attribute": attribute, "counting": counting,
         "comparison": comparison, "relation": relation, "category": category}  # fmt: skip


@pytest.mark.parametrize("family", TRUTH)
def test_every_question_has_exactly_one_right_answer(family: str) -> None:
    pairs = of_family(family)
    assert len(pairs) > 300
    for scene, question in pairs:
        match = re.fullmatch(WORDINGS[family], question.text)
        assert match, question.text
        assert TRUTH[family](scene, *match.groups()) == {question.answer}, (question, scene.listing())


@pytest.mark.parametrize("family", TRUTH)
def test_the_blind_prior_is_low(family: str) -> None:
    """What the most frequent answer scores without a look; existence is a yes-no family, its prior a half."""
    answers = Counter(question.answer for _, question in of_family(family))
    prior = answers.most_common(1)[0][1] / answers.total()
    assert prior < {"existence": 0.56, "counting": 0.48}.get(family, 0.45)


def test_each_scene_asks_a_family_once() -> None:
    for i in range(50):
        scene = make_scene(3, "benchmark", i)
        for count in (1, 4, 7):
            made = questions(scene, rng_for(3, "benchmark", i, "q"), count)
            assert len({question.family for question in made}) == len(made) <= count
            again = questions(scene, rng_for(3, "benchmark", i, "q"), count)
            assert made == again


def test_the_last_step_of_a_chain_of_thought_is_the_answer() -> None:
    for scene, question in asked():
        response = chain_of_thought(scene, question)
        steps = steps_of("cot", response)
        assert steps == (question.objective, scene.listing(), question.reasoning, question.answer)
        assert final_text("cot", response) == question.answer
        assert normalize_answer(question.answer) == question.answer


def test_the_last_step_of_a_description_is_the_whole_caption() -> None:
    for i in range(100):
        scene = make_scene(5, "annotated", i)
        steps = steps_of("cod", chain_of_description(scene))
        assert steps is not None
        assert steps[-1] == description(scene)
        assert all(str(thing) in steps[-1] for thing in scene.things)
        assert scene.background in steps[-1]


def test_the_base_is_never_asked_a_family_about_an_image() -> None:
    wordings = [re.compile(wording) for wording in WORDINGS.values()]
    for i in range(SCENES):
        scene = make_scene(11, "base", i)
        turns = base_turns(scene, rng_for(11, "base", i, "b"), 6)
        assert len(turns) == 6
        for question, answer in turns:
            assert answer
            assert not any(wording.search(question) for wording in wordings), question


def looked_up(scene: Scene, question: str, answer: str) -> bool:
    """Whether the turn asks for a thing's colour or place by its name; then the answer must be the whole truth."""
    match = re.fullmatch(r"(Where is|Which color does) the (\w+)( have)?\?( Name it\.)?", question)
    if not match:
        return False
    named = [t for t in scene.things if t.name == match[2]]
    truth = ", ".join(t.place if match[1] == "Where is" else t.color for t in named)
    assert answer == (f"{match[2]} {truth}" if match[4] else truth)
    return True


def test_base_answers_are_true() -> None:
    for i in range(300):
        scene = make_scene(12, "base", i)
        for question, answer in base_turns(scene, rng_for(12, "base", i, "b"), 6):
            if match := re.fullmatch(r"Is there a (\w+)\?", question):
                assert answer == ("yes" if match[1] in [t.name for t in scene.things] else "no")
            elif match := re.fullmatch(r"What is at the ([\w-]+)\?", question):
                shown = [f"{t.color} {t.name}" for t in scene.things if t.place == match[1]]
                assert [answer] == (shown or ["none"])
            elif match := re.fullmatch(r"List the things with (.+)\.", question):
                told = answer.removesuffix(".").removesuffix(f", {scene.background} background").split(", ")
                assert sorted(told) == sorted(CAPTIONS[match[1]].format(thing) for thing in scene.things)
            else:
                assert looked_up(scene, question, answer)


def test_text_turns_reason_over_their_own_listing() -> None:
    """A family's question in text comes with the listing that answers it; facts are true."""
    reasoned = facts = found = 0
    for i in range(400):
        scene = make_scene(13, "base", i)
        for question, answer in text_turns(scene, rng_for(13, "base", i, "t")):
            head, _, listing = question.partition("\nScene: ")
            if not listing:
                known = looked_up(scene, question, answer)
                facts, found = facts + (not known), found + known
                continue
            reasoned += 1
            assert listing == scene.listing()
            family = next(name for name, wording in WORDINGS.items() if re.fullmatch(wording, head))
            match = re.fullmatch(WORDINGS[family], head)
            assert match
            assert TRUTH[family](scene, *match.groups()) == {answer.rsplit("\n", 1)[1]}
    assert reasoned > 300
    assert facts > 20
    assert found > 300


def test_questions_need_the_image() -> None:
    """The same wording has different answers in different scenes: no question can be answered from its words."""
    answers: dict[str, set[str]] = {}
    for _, question in asked():
        answers.setdefault(question.text, set()).add(question.answer)
    counts = Counter(question.text for _, question in asked())
    often = [text for text, count in counts.items() if count >= 30]
    assert often
    assert all(len(answers[text]) > 1 for text in often)
    assert np.mean([len(answers[text]) for text in often]) > 2
