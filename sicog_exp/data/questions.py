"""Text about scenes: captions, the benchmark's question families, and the base model's simpler curriculum.

Two vocabularies of tasks are kept apart. `caption` and `questions` make what the SIcog loop learns from a few
annotations (all kinds of paper.md). `base_turns` and `text_turns` make what the base model is trained on: short
captions and simple questions about images, and reasoning over listings in text only - never a family about an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from sicog_exp.data.scenes import CATEGORIES, CATEGORY_OF, NAMES, PLACES, Scene, Thing
from sicog_exp.prompts import structured

ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "middle", "right")


@dataclass(frozen=True)
class Question:
    """One question about a scene; `objective` and `reasoning` are steps 1 and 3 of its chain of thought."""

    family: str
    text: str
    answer: str
    objective: str
    reasoning: str


def chain_of_thought(scene: Scene, question: Question) -> str:
    return structured("cot", (question.objective, scene.listing(), question.reasoning, question.answer))


def description(scene: Scene) -> str:
    """The cohesive description: step 5 of a CoD caption, the whole of a DD caption."""
    return f"{scene.listing()}, {scene.background} background."


def chain_of_description(scene: Scene) -> str:
    things = scene.things
    salient = ", ".join(thing.name for thing in things)
    details = ", ".join(f"{thing.color} {thing.name}" for thing in things)
    relations = ", ".join(f"{a.name} {_order(a, b)} {b.name}" for a, b in pairwise(things))
    return structured("cod", (salient, details, relations, f"{scene.background} background", description(scene)))


def _order(a: Thing, b: Thing) -> str:
    return "left of" if a.row == b.row else "above"


def questions(scene: Scene, rng: np.random.Generator, count: int) -> list[Question]:
    """Up to `count` questions of different families that have exactly one right answer for this scene."""
    makers = [_naming, _existence, _attribute, _counting, _comparison, _relation, _category]
    made: list[Question] = []
    for i in rng.permutation(len(makers)):
        question = makers[i](scene, rng)
        if question is not None:
            made.append(question)
        if len(made) == count:
            break
    return made


def _pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def _running(things: list[Thing]) -> str:
    return " ".join(f"{thing.name} {i}" for i, thing in enumerate(things, 1)) or "none 0"


def _of_category(scene: Scene, category: str) -> list[Thing]:
    return [thing for thing in scene.things if thing.category == category]


def _naming(scene: Scene, rng: np.random.Generator) -> Question | None:
    ends_of = [("left", "column", 1), ("right", "column", -1), ("up", "row", 1), ("down", "row", -1)]
    word, key, sign = _pick(rng, ends_of)
    ends = sorted(scene.things, key=lambda thing: sign * getattr(thing, key))
    if getattr(ends[0], key) == getattr(ends[1], key):
        return None
    text = f"Which thing is furthest {word}?"
    return Question("naming", text, ends[0].name, f"find furthest {word}", f"{ends[0].place} {ends[0].name}")


SIDES = {"left": ("column", 0), "right": ("column", 2), "top": ("row", 0), "bottom": ("row", 2)}


def _existence(scene: Scene, rng: np.random.Generator) -> Question:
    category = _pick(rng, scene.things).category
    members = _of_category(scene, category)
    on = {side: any(getattr(thing, axis) == line for thing in members) for side, (axis, line) in SIDES.items()}
    answer = _pick(rng, ("yes", "no"))
    side = _pick(rng, [side for side, there in on.items() if there == (answer == "yes")] or list(SIDES))
    listed = " ".join(f"{thing.name} {thing.place}" for thing in members)
    text = f"Is there any {category} on the {side}?"
    return Question("existence", text, "yes" if on[side] else "no", f"find {category} {side}", listed)


def _attribute(scene: Scene, rng: np.random.Generator) -> Question | None:
    single = [c for c in CATEGORIES if len(_of_category(scene, c)) == 1]
    if not single:
        return None
    category = _pick(rng, single)
    thing = _of_category(scene, category)[0]
    return Question("attribute", f"At which place is the {category}?", thing.place, f"find {category} place",
                    f"{thing.name} {thing.place}")  # fmt: skip


def _counting(scene: Scene, rng: np.random.Generator) -> Question:
    present = sorted({thing.category for thing in scene.things})
    category = _pick(rng, present) if rng.random() < 0.85 else _pick(rng, CATEGORIES)
    members = _of_category(scene, category)
    text = f"How many {category}s are there?"
    return Question("counting", text, str(len(members)), f"count {category}s", _running(members))


def _comparison(scene: Scene, rng: np.random.Generator) -> Question | None:
    present = sorted({thing.category for thing in scene.things})
    first = _pick(rng, present)
    second = _pick(rng, [c for c in (present if len(present) > 1 and rng.random() < 0.7 else CATEGORIES) if c != first])
    if rng.random() < 0.5:
        first, second = second, first
    members = _of_category(scene, first), _of_category(scene, second)
    counts = len(members[0]), len(members[1])
    answer = "equal" if counts[0] == counts[1] else f"{first}s" if counts[0] > counts[1] else f"{second}s"
    text = f"Are there more {first}s or {second}s?"
    reasoning = f"{first}s {_running(members[0])}, {second}s {_running(members[1])}"
    return Question("comparison", text, answer, f"compare {first}s {second}s", reasoning)


def _unique_names(scene: Scene) -> list[Thing]:
    names = [thing.name for thing in scene.things]
    return [thing for thing in scene.things if names.count(thing.name) == 1]


def _relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    things = _unique_names(scene)
    pairs = [(a, b) for a in things for b in things if a is not b and (a.row == b.row) != (a.column == b.column)]
    if not pairs:
        return None
    a, b = _pick(rng, pairs)
    beside, over = ("left" if a.column < b.column else "right"), ("above" if a.row < b.row else "below")
    answer = beside if a.row == b.row else over
    text = f"Where is the {a.name} relative to the {b.name}?"
    return Question("relation", text, answer, f"relate {a.name} {b.name}", f"{a.name} {a.place}, {b.name} {b.place}")


def _category(scene: Scene, rng: np.random.Generator) -> Question | None:
    if rng.random() < 0.5:
        return _majority(scene)
    colors = [thing.color for thing in scene.things]
    single = [thing for thing in scene.things if colors.count(thing.color) == 1]
    if not single:
        return _majority(scene)
    thing = _pick(rng, single)
    text = f"Which category is the {thing.color} thing?"
    return Question("category", text, thing.category, f"find {thing.color} category", f"{thing.color} {thing.name}")


def _majority(scene: Scene) -> Question | None:
    counts = sorted((len(_of_category(scene, c)), c) for c in CATEGORIES)
    if counts[-1][0] == counts[-2][0]:
        return None
    seen: list[Thing] = []
    parts = []
    for thing in scene.things:
        seen.append(thing)
        parts.append(f"{thing.category} {sum(other.category == thing.category for other in seen)}")
    return Question("category", "Which category is most common?", counts[-1][1], "find most common", " ".join(parts))


# What the base model is trained on.


def base_turns(scene: Scene, rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """(question, answer) turns about one image, of the simple kinds that base training asks, none asked twice."""
    makers = [_short_caption, _is_there, _what_at, _color_of, _place_of]
    turns = dict([_short_caption(scene, rng)] if rng.random() < 0.5 else [])
    while len(turns) < count:
        question, answer = makers[rng.choice(5, p=[0.1, 0.1, 0.2, 0.25, 0.35])](scene, rng)
        turns.setdefault(question, answer)
    return list(turns.items())


CAPTIONS = {"colors and places": "{0.color} {0.name} {0.place}", "colors": "{0.name} {0.color}",
            "places": "{0.name} {0.place}"}  # fmt: skip
"""What a short caption says of each thing. Colour and place follow the name, so that the next word is found by the
name before it: measured, a small model learns to find a thing by its name there first, and in longer jumps later."""


def _short_caption(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """In reading order with colours and places, shuffled otherwise; with or without the background."""
    said = _pick(rng, list(CAPTIONS))
    things = list(scene.things)
    if said != "colors and places":
        things = [things[i] for i in rng.permutation(len(things))]
    text = ", ".join(CAPTIONS[said].format(thing) for thing in things)
    if rng.random() < 0.3:
        text += f", {scene.background} background"
    return f"List the things with {said}.", text + "."


def _is_there(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    name = _pick(rng, scene.things).name if rng.random() < 0.5 else _pick(rng, NAMES)
    return f"Is there a {name}?", "yes" if any(thing.name == name for thing in scene.things) else "no"


def _what_at(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    place = _pick(rng, scene.things).place if rng.random() < 0.8 else _pick(rng, PLACES)
    found = [f"{thing.color} {thing.name}" for thing in scene.things if thing.place == place]
    return f"What is at the {place}?", found[0] if found else "none"


def _color_of(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    thing = _pick(rng, scene.things)
    colors = ", ".join(other.color for other in scene.things if other.name == thing.name)
    return _asked_by_name(rng, f"Which color does the {thing.name} have?", thing, colors)


def _place_of(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    thing = _pick(rng, scene.things)
    places = ", ".join(other.place for other in scene.things if other.name == thing.name)
    return _asked_by_name(rng, f"Where is the {thing.name}?", thing, places)


def _asked_by_name(rng: np.random.Generator, question: str, thing: Thing, answer: str) -> tuple[str, str]:
    """The bare answer, or with the name before it where the question asks for it."""
    return (question, answer) if rng.random() < 0.4 else (f"{question} Name it.", f"{thing.name} {answer}")


def text_turns(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """One text-only example: a fact, or a family's question followed by a listing, reasoned and answered; then a thing
    looked up in the listing by its name.

    The question stands before the listing, as in a chain of thought (measured: otherwise relations and counts never
    leave their priors). Half of the answers say the task and the listing again first, so that reasoning over a listing
    of one's own is nothing new when chains of thought about images begin (measured: else those see and fail to reason).
    """
    asked = questions(scene, rng, 1) if rng.random() >= 0.12 else []
    if not asked:
        return [_fact(rng)]
    question = asked[0]
    thought = [question.reasoning, question.answer]
    if rng.random() < 0.5:
        thought = [question.objective, scene.listing(), *thought]
    looked_up = _place_of(scene, rng) if rng.random() < 0.6 else _color_of(scene, rng)
    return [(f"{question.text}\nScene: {scene.listing()}", "\n".join(thought)), looked_up]


def _fact(rng: np.random.Generator) -> tuple[str, str]:
    draw = rng.random()
    if draw < 0.4:
        name = _pick(rng, NAMES)
        return f"What category is a {name}?", CATEGORY_OF[name]
    if draw < 0.7:
        name, category = _pick(rng, NAMES), _pick(rng, CATEGORIES)
        if rng.random() < 0.5:
            category = CATEGORY_OF[name]
        return f"Is a {name} a {category}?", "yes" if CATEGORY_OF[name] == category else "no"
    place = _pick(rng, PLACES)
    index = PLACES.index(place)
    return f"Which row and column is {place}?", f"{ROWS[index // 3]} row, {COLUMNS[index % 3]} column"
