import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sicog_exp.curation.filters import DuplicateFilter, infer_kind, parse
from sicog_exp.curation.similarity import lexical_similarity
from sicog_exp.prompts import structured
from sicog_exp.recipe import CurationConfig

COT = structured("cot", ("Find the colour.", "A red cat.", "The cat is red.", "Red."))
COD = structured("cod", ("Cats.", "A red cat.", "It sits on a mat.", "A wall.", "A red cat sits on a mat."))


def test_final_text_and_evidence_of_each_kind() -> None:
    cot, cod = parse("cot", COT, "stop", CurationConfig()), parse("cod", COD, "stop", CurationConfig())
    assert (cot.final, cot.compared, cot.evidence, cot.reason) == ("Red.", "red", "A red cat.", None)
    assert (cod.final, cod.evidence, cod.reason) == ("A red cat sits on a mat.", COD, None)
    assert parse("direct", " The red. ", None, CurationConfig()).compared == "red"


@pytest.mark.parametrize(
    ("kind", "text", "finish", "reason"),
    [
        ("cot", COT, "length", "truncated"),
        ("cot", COT.replace("Step 3", "Step 2"), "stop", "broken_format"),
        ("cot", COT.removesuffix("Red."), "stop", "broken_format"),
        ("cod", "A red cat.", "stop", "broken_format"),
        ("direct", "  ", "stop", "empty"),
        ("direct", "...", "stop", "empty"),
        ("dd", "", "stop", "empty"),
        ("dd", "a cat", "stop", "too_short"),
        ("dd", "a cat on a mat by a door", "stop", "too_long"),
    ],
)
def test_reasons(kind, text, finish, reason) -> None:
    limits = CurationConfig(min_words=3, max_words=6) if reason.startswith("too") else CurationConfig()
    assert parse(kind, text, finish, limits).reason == reason


def test_without_require_format_broken_and_cut_texts_are_compared_whole() -> None:
    config = CurationConfig(require_format=False)
    assert parse("cot", "Red", "length", config).compared == "red"
    assert parse("cot", COT, "length", config).compared == "red"
    assert parse("cod", "", "stop", config).reason == "empty"


def test_option_letter_a_is_an_answer() -> None:
    assert parse("direct", "A.", "stop", CurationConfig()).compared == "a"


def test_kind_is_inferred_from_the_steps() -> None:
    assert infer_kind(COT, "reasoning") == "cot"
    assert infer_kind(COD, "caption") == "cod"
    assert infer_kind("Red", "reasoning") == "direct"
    assert infer_kind("A cat.", "caption") == "dd"
    assert infer_kind(COD[:60], "caption") == "cod", "a description that breaks off in its steps is no DD caption"


def test_duplicates_are_those_of_the_same_prompt_and_image() -> None:
    duplicates = DuplicateFilter(0.8)
    assert duplicates.reason("p", "i", "a red cat on a mat") is None
    assert duplicates.reason("p", "i", "a red cat on a mat") == "duplicate"
    assert duplicates.reason("p", "i", "A red cat on a mat.") == "near_duplicate"
    assert duplicates.reason("p", "i", "two blue dogs") is None
    assert duplicates.reason("p", "j", "a red cat on a mat") is None
    assert duplicates.reason("q", "i", "a red cat on a mat") is None
    assert duplicates.reason("q", None, "a red cat on a mat") is None


@given(
    st.lists(st.text("abc ", min_size=1, max_size=14), max_size=14), st.sampled_from([0.0, 0.3, 0.5, 0.8, 0.95, 1.0])
)
def test_index_finds_what_comparing_all_pairs_finds(texts: list[str], threshold: float) -> None:
    duplicates, kept = DuplicateFilter(threshold), []
    for text in texts:
        expected = any(lexical_similarity(text, other) >= threshold for other in kept)
        assert (duplicates.reason("p", None, text) is not None) == expected
        if not expected:
            kept.append(text)


def test_near_duplicates_among_longer_texts() -> None:
    rng = random.Random(0)
    words = [f"w{i}" for i in range(20)]
    base = [" ".join(rng.choices(words, k=30)) for _ in range(30)]
    texts = [" ".join(w if rng.random() > 0.05 else "x" for w in text.split()) for text in base * 4]
    duplicates, kept = DuplicateFilter(0.9), []
    for text in texts:
        expected = any(lexical_similarity(text, other) >= 0.9 for other in kept)
        assert (duplicates.reason("p", None, text) is not None) == expected
        kept += [] if expected else [text]
    assert len(kept) < len(texts)
