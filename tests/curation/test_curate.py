import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sicog_exp.curation import CurationError
from sicog_exp.curation.curate import Decision, Item, Response, Tally, curate
from sicog_exp.curation.filters import infer_kind
from sicog_exp.prompts import structured
from sicog_exp.recipe import CurationConfig


def cot(answer: str, evidence: str = "A red cat.") -> str:
    return structured("cot", ("Find the colour.", evidence, "So it follows.", answer))


def item(id: str, group: str, texts: Sequence[str], image: str | None = "i.png") -> Item:
    responses = tuple(Response(text, infer_kind(text, group), i) for i, text in enumerate(texts))
    return Item(id, group, "prompt", image, responses)


def one(asked: Item, **options: object) -> Decision:
    return next(curate([asked], CurationConfig(**options)))  # type: ignore[arg-type]


def test_defect_cot_chain_is_kept_whole() -> None:
    """The authors' curated reasoning set keeps the answer only."""
    chain = cot("red")
    decision = one(item("q", "reasoning", ["red", chain, "Red."]))
    assert decision.chosen is not None
    assert (decision.chosen.text, decision.chosen.kind, decision.score, decision.kept) == (chain, "cot", 1.0, True)


def test_defect_ragged_candidates_are_normal() -> None:
    """The authors read N off the first item; another number kills the stage."""
    items = [item(str(n), "reasoning", ["red"] * n, image=str(n)) for n in (3, 0, 1, 9, 2)]
    decisions = list(curate(items, CurationConfig()))
    assert [d.item.id for d in decisions] == ["3", "0", "1", "9", "2"]
    assert [d.kept for d in decisions] == [True, False, True, True, True]
    assert decisions[1].reason == "no_candidates"
    assert one(item("lone", "reasoning", ["red"]), include_self=False).reason == "below_threshold"


def test_captions_are_compared_by_their_final_description() -> None:
    final = "A red cat sits on a mat."
    cod = [structured("cod", (f"noise {i}", f"other {i}", f"more {i}", f"else {i}", final)) for i in range(2)]
    decision = one(item("c", "caption", [*cod, final]))
    assert decision.score == 1.0
    assert decision.chosen is not None
    assert decision.chosen.text in cod


def test_similarity_threshold_by_hand() -> None:
    """'a b' to 'a c': 1 shared of 3 and 3 grams, F1 = 1/3. Scores: (1 + 1/3 + 1/3) / 3 = 5/9 each."""
    texts = ["a b", "a c", "a d"]
    assert one(item("c", "caption", texts), caption_threshold=0.5).kept
    assert one(item("c", "caption", texts), caption_threshold=0.5).score == pytest.approx(5 / 9)
    without = one(item("c", "caption", texts), caption_threshold=0.5, include_self=False)
    assert (without.kept, without.score) == (False, pytest.approx(1 / 3))


def test_reasoning_scorers_differ() -> None:
    texts = ["two red cats", "two red dogs"]
    assert one(item("q", "reasoning", texts)).score == 0.5
    assert one(item("q", "reasoning", texts), reasoning_scorer="similarity").score == pytest.approx((1 + 6 / 10) / 2)


def test_invalid_candidates_neither_vote_nor_win_and_are_counted() -> None:
    broken = cot("blue").replace("Step 3", "Step 2")
    cut = Response(cot("blue"), "cot", 3, "length")
    base = item("q", "reasoning", ["red", broken, "red"])
    decision = one(Item("q", "reasoning", "prompt", None, (*base.candidates, cut), invalid=(4,)))
    assert [(c.score, c.reason) for c in decision.candidates] == [
        (1.0, None), (None, "broken_format"), (1.0, None), (None, "truncated"), (None, "invalid_candidate"),
    ]  # fmt: skip
    assert one(item("q", "reasoning", [broken])).reason == "no_valid_candidate"


def test_defect_rejected_choice_is_seeded() -> None:
    """A whole response of the lower half, another answer than the chosen one's, drawn by the sample id alone."""
    texts = [cot("red")] * 3 + [cot("blue"), cot("green"), cot("black")]
    drawn = [one(item(str(i), "reasoning", texts), reasoning_threshold=0.5).rejected for i in range(40)]
    again = [one(item(str(i), "reasoning", texts[::-1]), reasoning_threshold=0.5).rejected for i in range(40)]
    assert [r.text for r in drawn if r] == [r.text for r in again if r]
    assert {r.text for r in drawn if r} == {cot("blue"), cot("green"), cot("black")}
    assert [texts.index(r.text) for r in drawn[:8] if r] == [4, 3, 5, 3, 5, 3, 5, 4], (
        "the same in every process and release"
    )


def test_no_rejected_where_all_say_the_same() -> None:
    assert one(item("q", "reasoning", ["red", "Red.", "the red"])).rejected is None


def test_direct_agreement() -> None:
    chains = [cot("red")] * 4
    agree = item("q", "reasoning", [*chains, "red", "red", "blue"])
    differ = item("q", "reasoning", [*chains, "blue", "blue", "red"])
    rule = {"require_direct_agreement": True, "reasoning_threshold": 0.5}
    assert one(agree, **rule).kept
    assert one(differ, **rule).reason == "direct_disagreement"
    assert one(item("q", "reasoning", chains), **rule).reason == "no_direct_answer"
    assert one(differ, reasoning_threshold=0.5).kept


def test_duplicates_among_kept_items() -> None:
    texts = ["a red cat sits on the mat"] * 2
    items = [item("1", "caption", texts), item("2", "caption", texts), item("3", "caption", texts, image="other")]
    assert [d.reason for d in curate(items, CurationConfig())] == [None, "duplicate", None]
    assert [d.kept for d in curate(items, CurationConfig(dedup=False))] == [True] * 3


def test_control_keeps_every_item_with_a_valid_candidate() -> None:
    texts = ["red", "blue", "green", cot("black").replace("Step 4", "Step 5")]
    items = [item(str(i), "reasoning", texts) for i in range(60)] + [item("none", "reasoning", [])]
    config = CurationConfig(select="random", reasoning_threshold=1.0)
    decisions = list(curate(items, config))
    assert [d.kept for d in decisions] == [True] * 60 + [False]
    assert {d.chosen.text for d in decisions if d.chosen} == {"red", "blue", "green"}
    assert decisions == list(curate(items, config))


def test_control_trains_on_the_kinds_that_curation_trains_on() -> None:
    texts = ["red", "blue", cot("green"), cot("black")]
    items = [item(str(i), "reasoning", texts) for i in range(40)]
    for select in ("random", "best"):
        chosen = [d.chosen for d in curate(items, CurationConfig(select=select, dedup=False))]
        assert {response.kind for response in chosen if response} == {"cot"}


def test_double_id_is_an_error() -> None:
    with pytest.raises(CurationError, match="comes twice"):
        list(curate([item("1", "caption", []), item("1", "caption", [])], CurationConfig()))


def test_wrong_kinds_are_errors() -> None:
    with pytest.raises(CurationError, match="use one of caption, reasoning"):
        Item("1", "text", "p", None, ())
    with pytest.raises(CurationError, match="use cod or dd"):
        Item("1", "caption", "p", None, (Response("red", "direct", 0),))


WORDS = st.lists(st.sampled_from(["red", "cat", "a", "mat", "dog", "..."]), max_size=5).map(" ".join)
TEXTS = st.one_of(WORDS, WORDS.map(cot), WORDS.map(lambda w: cot(w).replace("Step 2", "Step 7")))
CONFIGS = st.builds(
    CurationConfig,
    include_self=st.booleans(),
    reasoning_threshold=st.sampled_from([-1.0, 0.0, 0.5, 0.85, 1.0]),
    caption_threshold=st.sampled_from([-1.0, 0.0, 0.5, 0.85, 1.0]),
    reasoning_scorer=st.sampled_from(["similarity", "agreement"]),
    select=st.sampled_from(["best", "random"]),
    require_direct_agreement=st.booleans(),
    require_format=st.booleans(),
    dedup=st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["caption", "reasoning"]), st.lists(TEXTS, max_size=7)), max_size=8), CONFIGS)
def test_every_item_is_decided_once_and_the_counts_add_up(pool, config) -> None:
    items = [item(str(i), group, texts) for i, (group, texts) in enumerate(pool)]
    decisions, tally = list(curate(items, config)), Tally()
    for decision in decisions:
        tally.add(decision)
        check(decision, config)
    assert [d.item for d in decisions] == items
    total = tally.summary()
    assert total["items"] == total["kept"] + sum(total["not_kept"].values()) == len(items)
    assert total["candidates"] == total["scored"] + sum(total["set_aside"].values())
    assert total["candidates"] == sum(len(texts) for _, texts in pool)
    assert sum(group["kept"] for group in total["by_kind"].values()) == total["kept"]


def check(decision: Decision, config: CurationConfig) -> None:
    threshold = config.caption_threshold if decision.item.group == "caption" else config.reasoning_threshold
    scores = [c.score for c in decision.candidates if c.score is not None]
    assert all(0 <= score <= 1 for score in scores)
    assert all((c.score is None) != (c.reason is None) for c in decision.candidates)
    assert decision.kept == (decision.reason is None)
    assert (decision.chosen is None) == (not scores)
    if config.select == "best" and scores:
        assert decision.score == max(scores)
        assert not decision.kept or decision.score >= threshold
    if decision.rejected:
        assert decision.rejected in decision.item.candidates
        assert decision.chosen is not None
        assert decision.rejected.text != decision.chosen.text


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=5), CONFIGS, st.sampled_from(["caption", "reasoning"]))
def test_order_of_candidates_does_not_change_the_best_score(texts, config, group) -> None:
    orders = itertools.islice(itertools.permutations(texts), 0, None, 7)
    best = {max((c.score for c in next(curate([item("q", group, order)], config)).candidates if c.score is not None),
                default=None) for order in orders}  # fmt: skip
    assert len(best) == 1


@given(kinds=st.lists(st.booleans(), max_size=8), limit=st.integers(1, 4))
@settings(deadline=None)
def test_fewer_candidates_of_a_pool_are_those_sampled_first(kinds: list[bool], limit: int) -> None:
    """Using N of a pool is what a pool of N would have given; the others are listed as unused."""
    texts = [cot(f"answer {i % 3}") if chain else f"answer {i % 2}" for i, chain in enumerate(kinds)]
    first = [i for i, chain in enumerate(kinds) if sum(other == chain for other in kinds[:i]) < limit]
    whole = item("q", "reasoning", texts)
    small = Item("q", "reasoning", "prompt", "i.png", tuple(whole.candidates[i] for i in first))
    limited, alone = one(whole, candidates=limit), one(small)
    assert (limited.chosen, limited.score, limited.kept) == (alone.chosen, alone.score, alone.kept)
    assert {c.position for c in limited.candidates if c.reason == "unused"} == set(range(len(kinds))) - set(first)
