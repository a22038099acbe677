"""The prompt table and its parsers: the same words in training and generation, and nothing lost in parsing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sicog_exp.prompts import (
    COD_STEPS,
    COT_STEPS,
    KINDS,
    PROMPTS,
    STEPS,
    Kind,
    final_text,
    normalize_answer,
    prompt,
    question_of,
    steps_of,
    structured,
)

LINES = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"]), min_size=1, max_size=30)
PARTS = st.lists(LINES, min_size=1, max_size=3).map("\n".join).map(str.strip).filter(lambda t: t and "Step" not in t)
COD = ("a dog", "a red dog", "dog left of cat", "gray background", "a red dog, left of a cat.")


@given(parts=st.tuples(PARTS, PARTS, PARTS, PARTS, PARTS))
def test_steps_of_a_structured_description_are_its_parts(parts: tuple[str, ...]) -> None:
    assert steps_of("cod", structured("cod", parts)) == parts
    assert final_text("cod", structured("cod", parts)) == parts[-1]


@given(parts=st.tuples(PARTS, PARTS, PARTS, PARTS))
def test_steps_of_a_structured_reasoning_are_its_parts(parts: tuple[str, ...]) -> None:
    assert steps_of("cot", structured("cot", parts)) == parts


@given(parts=st.tuples(*[st.sampled_from([".5", ": x", "**bold**", "-3", "1.", "Step one", "A", "..."])] * 4))
def test_punctuation_at_the_start_of_a_part_is_kept(parts: tuple[str, ...]) -> None:
    assert steps_of("cot", structured("cot", parts)) == parts


def test_the_headers_are_those_of_the_authors_data() -> None:
    begins = ("Step 1: Extract salient", "Step 2: Analyze detailed", "Step 3: Consider relational-level",
              "Step 4: Examine marginal", "Step 5: Organize all")  # fmt: skip
    assert all(header.startswith(begin) for header, begin in zip(COD_STEPS, begins, strict=True))
    assert COT_STEPS[-1] == "Step 4: Conclude the task with an answer"


def authors_style(endings: tuple[str, ...]) -> str:
    lines = zip(COD_STEPS, endings, COD, strict=True)
    return "\n\n".join(f"{header}{ending}\n{part}" for header, ending, part in lines)


@pytest.mark.parametrize("ending", [" by naming what matters most", ":", ".", " (details)", "", "**", ":**", "  "])
def test_headers_with_a_longer_wording_still_parse(ending: str) -> None:
    assert steps_of("cod", authors_style((ending,) * 5)) == COD


def test_headers_worded_otherwise_still_parse() -> None:
    text = "".join(f"**Step {i}: Another wording**\n{part}\n" for i, part in enumerate(COD, 1))
    assert steps_of("cod", text) == COD


def test_content_on_the_header_s_line() -> None:
    text = "Step 1: look\nStep 2: see: a dog\nStep 3: think\nStep 4: Conclude the task with an answer: 42"
    assert final_text("cot", text) == "42"
    assert final_text("cot", text.replace("answer: 42", "answer. two\nlines")) == "two\nlines"
    assert final_text("cot", text.replace("answer: 42", "answer")) is None


BROKEN = [
    "",
    "a dog",
    structured("cod", COD).replace("Step 3", "Step 4", 1),
    structured("cod", COD).replace("Step 5:", "Then"),
    structured("cod", COD) + "\nStep 5: Organize all observations\nagain",
    "Sure! " + structured("cod", COD),
    structured("cod", COD) + "\nStep 6: More\nx",
]


@pytest.mark.parametrize("response", BROKEN)
def test_broken_steps_give_none(response: str) -> None:
    assert steps_of("cod", response) is None
    assert final_text("cod", response) is None


def test_final_text_of_plain_kinds_is_the_whole() -> None:
    assert final_text("dd", " a dog \n") == "a dog"
    assert final_text("direct", "yes") == "yes"
    assert final_text("direct", " \n") is None
    assert final_text("cod", structured("cod", (*COD[:4], ""))) is None


def test_structured_wants_all_parts() -> None:
    with pytest.raises(ValueError, match="zip"):
        structured("cot", COD)


# Defect of the authors' code: "step by step" in training, "step-by-step" in generation.


@pytest.mark.parametrize("kind", ["cot", "direct", "text"])
@given(question=st.text(max_size=60))
def test_defect_training_and_generation_prompts_differ(kind: Kind, question: str) -> None:
    """One table: the question taken out of a prompt and put back gives the same prompt."""
    assert question_of(kind, prompt(kind, question)) == question


def test_caption_prompts_hold_no_question() -> None:
    for kind in ("cod", "dd"):
        assert prompt(kind, "What?") == prompt(kind) == PROMPTS[kind]
        assert question_of(kind, "In other words?") == "In other words?"
    assert question_of("cot", "worded otherwise") == "worded otherwise"
    assert set(PROMPTS) == set(KINDS)
    assert set(STEPS) == {"cod", "cot"}
    assert len(set(PROMPTS.values())) == len(KINDS)


@pytest.mark.parametrize(("text", "wanted"), [
    ("Yes.", "yes"), ("The Red  Dog", "red dog"), ("two", "2"), ("2", "2"), ("(B)", "b"), ("A", "a"), ("A.", "a"),
    ("an apple", "apple"), ("the", "the"), ("'dogs'", "dogs"), ("", ""), ("...", ""), ("top-left", "top-left"),
    ("0.5", "0.5"), ("ten and a half", "10 and half"),
])  # fmt: skip
def test_normalize_answer(text: str, wanted: str) -> None:
    assert normalize_answer(text) == wanted


@given(text=st.text(max_size=40))
def test_normalizing_twice_changes_nothing_more(text: str) -> None:
    once = normalize_answer(text)
    assert normalize_answer(once) == once
