"""Each scorer by hand; none depends on the order of the candidates or of the items."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sicog_exp.curation import CurationError
from sicog_exp.curation.curate import Decision, Item, Response, curate
from sicog_exp.curation.files import curate_file
from sicog_exp.curation.filters import infer_kind
from sicog_exp.curation.scorers import blended, compared_by, cross_agreement, cross_similarities, listing_votes
from sicog_exp.prompts import structured
from sicog_exp.recipe import CurationConfig, RecipeError, build

BLENDS = ["similarity", "lexical", "agreement", "cross_format", "listing", "likelihood"]


def cot(answer: str, seen: str = "red dog top, blue cat left") -> str:
    return structured("cot", ("Find it.", seen, "So it follows.", answer))


def item(id: str, texts: Sequence[str], group: str = "reasoning", image: str | None = "i.png",
         logprobs: Sequence[float] = ()) -> Item:  # fmt: skip
    known = [*logprobs, *[-0.1] * (len(texts) - len(logprobs))]
    responses = tuple(Response(text, infer_kind(text, group), i, "stop", known[i]) for i, text in enumerate(texts))
    return Item(id, group, f"question {id}", image, responses)


def decided(items: Sequence[Item], **options: object) -> list[Decision]:
    return list(curate(items, CurationConfig(**{"dedup": False, **options})))  # type: ignore[arg-type]


def scores(one: Item, **options: object) -> list[float | None]:
    return [candidate.score for candidate in decided([one], **options)[0].candidates]


def test_agreement_across_formats_by_hand() -> None:
    texts = [cot("red"), cot("blue"), "red", "red", "green"]
    third = pytest.approx(1 / 3)
    assert cross_agreement(["red", "blue", "red", "red", "green"], ["cot"] * 2 + ["direct"] * 3) == pytest.approx(
        [2 / 3, 0, 1 / 2, 1 / 2, 0])  # fmt: skip
    assert scores(item("q", texts), reasoning_scorer="cross_format")[0] == pytest.approx(2 / 3)
    assert scores(item("q", [cot("red")] * 3), reasoning_scorer="cross_format") == [0.0] * 3, "no other format"
    found = scores(item("c", ["a b", structured("cod", ("x", "x", "x", "x", "a c"))], "caption"),
                   caption_scorer="cross_format")  # fmt: skip
    assert found == [third, third], "captions: similarity to those of the other kind"


def test_cross_similarities_leave_out_the_own_format() -> None:
    matrix = np.array([[1.0, 0.9, 0.2], [0.9, 1.0, 0.4], [0.2, 0.4, 1.0]])
    assert cross_similarities(matrix, ["cod", "cod", "dd"]) == pytest.approx([0.2, 0.4, 0.3])
    assert cross_similarities(matrix[:2, :2], ["dd", "dd"]) == [0.0, 0.0]


def test_likelihood_is_the_geometric_mean_probability() -> None:
    one = item("q", ["red", "blue"], logprobs=[math.log(0.5), math.log(0.25)])
    assert scores(one, reasoning_scorer="likelihood") == pytest.approx([0.5, 0.25])
    assert scores(item("q", ["red"], logprobs=[1e-9]), reasoning_scorer="likelihood") == [1.0], "never above 1"


@pytest.mark.parametrize(("options", "compared"), [
    ({}, ("similarity",)),
    ({"caption_scorer": "cross_format"}, ("similarity",)),
    ({"caption_scorer": "lexical"}, ("lexical",)),
    ({"caption_scorer": "lexical", "caption_blend": {"cross_format": 1.0}}, ("similarity", "lexical")),
    ({"caption_scorer": "likelihood"}, ()),
])  # fmt: skip
def test_matrices_that_scorers_read_are_known_ahead(options: dict, compared: tuple[str, ...]) -> None:
    assert compared_by(CurationConfig(**options), "caption") == compared
    assert "similarity" not in compared_by(CurationConfig(reasoning_scorer="cross_format"), "reasoning")


def test_lexical_and_encoder_similarity_blend() -> None:
    """Lexical similarity is that of the encoder `lexical`, whatever the encoder."""
    texts = ["a b", "a c", "a d"]
    alone = scores(item("c", texts, "caption"))
    assert scores(item("c", texts, "caption"), caption_scorer="lexical") == alone
    assert scores(item("c", texts, "caption"), caption_blend={"lexical": 2.0}) == alone


def test_a_blend_is_the_weighted_mean_and_keeps_its_parts() -> None:
    assert blended({"a": [1.0, 0.0], "b": [0.5, 0.5]}, {"a": 1.0, "b": 3.0}) == [0.625, 0.375]
    one = item("q", ["red", "red", "blue"], logprobs=[math.log(0.4), math.log(0.2), math.log(0.9)])
    first = decided([one], reasoning_blend={"likelihood": 0.5})[0].candidates[0]
    assert first.parts == {"agreement": pytest.approx(2 / 3), "likelihood": pytest.approx(0.4)}
    assert first.score == pytest.approx((2 / 3 + 0.5 * 0.4) / 1.5)
    assert decided([one])[0].candidates[0].parts is None


def test_a_chain_votes_as_much_as_its_listing_agrees_with_the_image_s_others() -> None:
    """Two of three chains say blue, with listings that nobody shares; the caption and another question support red."""
    here = "red dog top, blue cat left"
    items = [item("caption", [here + ", gray background.", here], "caption"),
             item("other", [cot("two", here), cot("two", here)]),
             item("q", [cot("red", here), cot("blue", "a tree"), cot("blue", "one shoe")])]  # fmt: skip
    plain, weighted = (decided(items, reasoning_scorer=name)[2] for name in ("agreement", "listing"))
    assert plain.chosen is not None
    assert weighted.chosen is not None
    assert (plain.chosen.text, weighted.chosen.text) == (cot("blue", "a tree"), cot("red", here))
    assert weighted.score == 1.0, "the two strange listings have no vote"
    elsewhere = decided([*items[:2], item("q", [c.text for c in items[2].candidates], image="j.png")],
                        reasoning_scorer="listing")[2]  # fmt: skip
    assert elsewhere.score == pytest.approx(2 / 3), "another image's listings say nothing: equal votes"


def test_listing_votes_by_hand() -> None:
    answers, kinds, support = ["a", "b", "b"], ["cot", "cot", "direct"], [0.9, 0.3, 0.0]
    assert listing_votes(answers, kinds, support, True) == pytest.approx([0.9 / 1.8, 0.9 / 1.8, 0.9 / 1.8])
    assert listing_votes(answers, kinds, support, False) == pytest.approx([0.0, 0.6 / 1.5, 0.3 / 1.2])
    assert listing_votes(["a"], ["cot"], [0.5], False) == [0.0]
    assert listing_votes([], [], [], True) == []


def test_a_caption_s_listing_score_is_its_support_by_the_image() -> None:
    items = [item("c", ["a b", "a c"], "caption"), item("q", [cot("x", "a b")])]
    found = [c.score for c in decided(items, caption_scorer="listing")[0].candidates]
    assert found == [pytest.approx((1 / 3 + 1) / 2), pytest.approx(1 / 3)]
    assert scores(item("c", ["a b"], "caption"), caption_scorer="listing") == [0.0], "the only listing"


def test_ties_go_to_the_chain_with_the_best_listing_of_the_image() -> None:
    items = [item("c", ["red dog top"] * 3, "caption"),
             item("q", [cot("x", "blue car left"), cot("x", "blue car left"), cot("x", "red dog top")])]  # fmt: skip
    alone, known = (decided(items, reasoning_scorer=name)[1].chosen for name in ("agreement", "listing"))
    assert alone is not None
    assert known is not None
    assert (alone.position, known.position) == (0, 2)


@pytest.mark.parametrize("numbers", [
    {}, {"logprob": -1.0}, {"logprob": None, "tokens": 3}, {"logprob": -1, "tokens": 0},
    {"logprob": float("nan"), "tokens": 2}, {"logprob": [-1.0], "tokens": 1},
])  # fmt: skip
def test_rows_without_log_probabilities_are_an_error_for_a_likelihood_alone(numbers: dict, tmp_path: Path) -> None:
    row = {"id": "q", "kind": "reasoning", "prompt": "p", "image": None, "candidates": [{"text": "red", **numbers}]}
    file = tmp_path / "in.jsonl"
    file.write_text(json.dumps(row) + "\n")
    assert curate_file(file, tmp_path / "out", CurationConfig())["scored"] == 1
    for options in ({"reasoning_scorer": "likelihood"}, {"reasoning_blend": {"likelihood": 0.1}}):
        with pytest.raises(CurationError, match=r"item 'q', candidate 0: .*`logprob`.*or use another scorer"):
            curate_file(file, tmp_path / "out", CurationConfig(**options))  # type: ignore[arg-type]


def test_log_probabilities_of_a_file_are_per_token(tmp_path: Path) -> None:
    numbers = ({"logprob": 4 * math.log(0.5), "tokens": 4}, {"logprob": 0, "tokens": 1})
    candidates = [{"text": "red", **both} for both in numbers]
    row = {"id": "q", "kind": "reasoning", "prompt": "p", "image": None, "candidates": candidates}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    curate_file(tmp_path / "in.jsonl", tmp_path / "out", CurationConfig(reasoning_blend={"likelihood": 1.0}))
    rows = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    assert [row["parts"] for row in rows] == [{"agreement": 1.0, "likelihood": p} for p in (0.5, 1.0)]
    assert [row["score"] for row in rows] == [0.75, 1.0]


@pytest.mark.parametrize(("values", "message"), [
    ({"reasoning_blend": {"agreement": 1.0}}, r"curation\.reasoning_blend\.agreement=1\.0: .*_scorer=agreement"),
    ({"reasoning_blend": {"likelihood": 0.0}}, "weight above 0"),
    ({"caption_blend": {"agreement": 1.0}}, r"_scorer=similarity \(lexical, cross_format, listing, likelihood\)"),
    ({"caption_scorer": "agreement"}, "allowed: similarity, lexical"),
])  # fmt: skip
def test_impossible_scorers_are_errors_at_the_start(values: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build(CurationConfig, values, "curation")


WORDS = st.sampled_from(["red", "blue dog", "a red dog", "top, left"])
TEXTS = st.one_of(WORDS, st.builds(cot, WORDS, WORDS))
LOGPROBS = st.floats(-9, 0)
MIXED = st.dictionaries(st.sampled_from(BLENDS[1:]), st.sampled_from([0.3, 1.0]), max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXTS, LOGPROBS), min_size=1, max_size=5), st.sampled_from(BLENDS), MIXED, st.booleans(),
       st.randoms())  # fmt: skip
def test_scores_lie_in_range_and_do_not_depend_on_the_order(candidates, scorer, blend, include_self, random) -> None:
    blend = {name: weight for name, weight in blend.items() if name != scorer}
    options = {"reasoning_scorer": scorer, "reasoning_blend": blend, "include_self": include_self}
    order = random.sample(range(len(candidates)), len(candidates))
    shuffled = [candidates[i] for i in order]
    both = []
    for given_ in (candidates, shuffled):
        others = [item("c", ["red dog top, left", "blue dog"], "caption"), item("o", [cot("red"), "blue dog"])]
        mine = item("q", [text for text, _ in given_], logprobs=[value for _, value in given_])
        items = [mine, *others] if given_ is candidates else [*reversed(others), mine]
        both.append(next(d for d in decided(items, **options) if d.item.id == "q"))
    first, second = ([c.score for c in d.candidates] for d in both)
    assert [first[i] for i in order] == second
    assert all(score is not None and 0 <= score <= 1 for score in first)
    assert both[0].score == both[1].score == max(first)
