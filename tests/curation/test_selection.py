"""Thresholds by rank, rows decided apart, quotas and weights."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sicog_exp.curation.curate import Decision, Item, Response, Tally, curate
from sicog_exp.curation.files import curate_file
from sicog_exp.curation.filters import infer_kind
from sicog_exp.curation.selection import family_of
from sicog_exp.curation.spool import Spool
from sicog_exp.prompts import structured
from sicog_exp.recipe import CurationConfig, RecipeError, build


def cot(answer: str) -> str:
    return structured("cot", ("Find it.", "red dog top", "So it follows.", answer))


def cod(text: str) -> str:
    return structured("cod", ("a", "b", "c", "d", text))


def item(id: str, texts: Sequence[str], group: str = "reasoning", prompt: str = "How many dogs?",
         family: str = "") -> Item:  # fmt: skip
    responses = tuple(Response(text, infer_kind(text, group), i) for i, text in enumerate(texts))
    return Item(id, group, prompt, f"{id}.png", responses, family=family)


def decided(items: Sequence[Item], **options: object) -> list[Decision]:
    return list(curate(items, CurationConfig(**{"dedup": False, **options})))  # type: ignore[arg-type]


def voted(votes: Sequence[int], **options: object) -> list[Item]:
    """Items in which the given number of four candidates agree."""
    return [item(str(i), ["red"] * n + [f"no{k}" for k in range(4 - n)], **options)  # type: ignore[arg-type]
            for i, n in enumerate(votes)]  # fmt: skip


def kept(decisions: Sequence[Decision]) -> set[str]:
    return {decision.item.id for decision in decisions if decision.kept}


def test_a_quantile_keeps_the_best_share_of_each_group() -> None:
    captions = [item(f"c{i}", ["a b"] * n + ["c d"] * (4 - n), "caption") for i, n in enumerate([4, 3, 2, 2])]
    questions = voted([1, 4, 2, 3, 3])
    rule = {"threshold_by": "quantile", "caption_threshold": 0.5, "reasoning_threshold": 0.4}
    decisions = decided([*captions, *questions], **rule)
    assert kept(decisions) == {"c0", "c1", "1", "3", "4"}
    assert {d.reason for d in decisions if not d.kept} == {"below_threshold"}


def test_a_quantile_is_met_to_the_item_among_equal_scores() -> None:
    items = voted([4] * 10)
    chosen = {share: kept(decided(items, threshold_by="quantile", reasoning_threshold=share)) for share in (0.3, 0.7)}
    assert [len(found) for found in chosen.values()] == [7, 3]
    assert chosen[0.7] < chosen[0.3]
    backwards = kept(decided(items[::-1], threshold_by="quantile", reasoning_threshold=0.7))
    assert backwards == chosen[0.7], "whatever the order of the rows"


def test_thresholds_by_rank_are_written_as_scores(tmp_path: Path) -> None:
    rows = [{"id": d.id, "kind": "reasoning", "prompt": "p", "image": f"{d.id}.png",
             "candidates": [c.text for c in d.candidates]} for d in voted([4, 3, 2, 1])]  # fmt: skip
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = CurationConfig(threshold_by="quantile", reasoning_threshold=0.5)
    summary = curate_file(tmp_path / "in.jsonl", tmp_path / "out", config)
    assert (summary["kept"], summary["thresholds"]["reasoning"]) == (2, 0.75)
    assert summary["config"]["reasoning_threshold"] == 0.5
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "curated.jsonl", "preferences.jsonl", "rejected.jsonl", "scores.jsonl", "summary.json"]  # fmt: skip


VOTES = st.lists(st.integers(1, 4), max_size=12)
LEVELS = st.sampled_from([0.0, 0.2, 0.25, 0.5, 0.75, 1.0])
BY = st.sampled_from(["score", "quantile"])


@settings(max_examples=60, deadline=None)
@given(VOTES, BY, LEVELS, LEVELS)
def test_a_higher_threshold_keeps_a_subset(votes, by, one, other) -> None:
    low, high = sorted((one, other))
    items = voted(votes)
    few, many = (kept(decided(items, threshold_by=by, reasoning_threshold=value)) for value in (high, low))
    assert few <= many
    if by == "quantile":
        assert len(many) == len(votes) - int(low * len(votes) + 1e-9)


# Rows of one item.


def rows(decision: Decision) -> dict[str, str]:
    assert decision.rows is not None
    return {row.kind: row.text for row in decision.rows}


def test_kinds_of_rows_have_thresholds_of_their_own() -> None:
    sure = item("1", [cot("red"), "red", "red", "blue"])
    unsure = item("2", [cot("red"), "red", "blue", "green"])
    first, second = decided([sure, unsure], cot_threshold=0.5, direct_threshold=0.75)
    assert rows(first) == {"cot": cot("red"), "direct": "red"}
    assert rows(second) == {"cot": cot("red")}
    assert (second.kept, second.score) == (True, 0.5)
    (direct_only,) = decided([unsure], cot_threshold=0.9, direct_threshold=0.5)
    assert rows(direct_only) == {"direct": "red"}
    (neither,) = decided([unsure], cot_threshold=0.9, direct_threshold=0.9)
    assert (neither.kept, neither.reason, neither.rows) == (False, "below_threshold", ())


def test_one_threshold_leaves_the_other_kind_with_its_group_s() -> None:
    one = item("1", [cot("red"), "red", "blue", "green"])
    assert rows(decided([one], cot_threshold=0.4, reasoning_threshold=0.9)[0]) == {"cot": cot("red")}
    assert rows(decided([one], direct_threshold=0.4, reasoning_threshold=0.9)[0]) == {"direct": "red"}
    assert decided([one], cod_threshold=0.4)[0].rows is None, "the other group is decided as a whole"


def test_answers_that_contradict_each_other_are_never_both_kept() -> None:
    one = item("1", [cot("blue"), cot("green"), "red", "red"])
    (decision,) = decided([one], cot_threshold=0.0, direct_threshold=0.0)
    assert rows(decision) == {"direct": "red"}
    (chain,) = decided([one], cot_threshold=0.0, direct_threshold=0.9)
    assert rows(chain) == {"cot": cot("blue")}


def test_captions_may_give_steps_and_another_description() -> None:
    one = item("c", ["a b c", "a b c", cod("a b d")], "caption")
    (decision,) = decided([one], cod_threshold=0.0, dd_threshold=0.0)
    assert rows(decision) == {"cod": cod("a b d"), "dd": "a b c"}
    assert decision.chosen is not None
    assert decision.chosen.kind == "cod"


def test_broken_steps_give_no_plain_row() -> None:
    broken = cot("red").replace("Step 2", "Step 3")
    (decision,) = decided([item("1", [broken])], require_format=False, direct_threshold=0.0, cot_threshold=0.0)
    assert rows(decision) == {"cot": broken}
    (left,) = decided([item("1", [broken, "blue"])], require_format=False, direct_threshold=0.0, cot_threshold=1.0)
    assert (left.kept, left.reason) == (False, "broken_format")


def test_rows_are_ranked_by_kind() -> None:
    items = [item(str(n), [cot("red")] + ["red"] * n + [f"no{k}" for k in range(4 - n)]) for n in range(4)]
    decisions = decided(items, threshold_by="quantile", cot_threshold=0.25, direct_threshold=0.5)
    assert [sorted(rows(decision)) for decision in decisions] == [[], ["cot"], ["cot", "direct"], ["cot", "direct"]]


TEXTS = st.one_of(st.sampled_from(["red", "blue"]), st.sampled_from(["red", "blue"]).map(cot))


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=6), LEVELS, LEVELS, st.randoms())
def test_rows_agree_reach_their_thresholds_and_do_not_depend_on_the_order(texts, chain, plain, random) -> None:
    found = [decided([item("q", order)], cot_threshold=chain, direct_threshold=plain)[0]
             for order in (texts, random.sample(texts, len(texts)))]  # fmt: skip
    first, second = ([(row.kind, row.score) for row in decision.rows or ()] for decision in found)
    assert first == second
    for decision in found:
        assert decision.kept == bool(decision.rows)
        assert decision.kept == (decision.reason is None)
        assert all(row.score >= {"cot": chain, "direct": plain}[row.kind] for row in decision.rows or ())
        answers = {row.text.split("\n")[-1] for row in decision.rows or ()}
        assert len(answers) <= 1


# Quotas and weights.


def test_a_family_is_named_by_its_source_else_by_the_question_s_first_words() -> None:
    assert family_of(item("1", [], prompt="How many  dogs are there?")) == "how many"
    assert family_of(item("1", [], prompt="How many dogs?", family="counting")) == "counting"
    assert family_of(item("1", [], "caption", family="ignored")) == ""
    assert family_of(item("1", [], prompt="")) == ""


FAMILIES = st.lists(st.tuples(st.integers(1, 4), st.sampled_from(["counting", "", "relation"])), max_size=14)


@settings(max_examples=60, deadline=None)
@given(FAMILIES, BY, LEVELS, st.sampled_from([0.1, 0.4, 0.5, 0.99, 1.0]), st.randoms())
def test_quotas_are_respected_and_keep_the_best(families, by, threshold, quota, random) -> None:
    items = [item(str(i), ["red"] * n + [f"no{k}" for k in range(4 - n)], family=family)
             for i, (n, family) in enumerate(families)]  # fmt: skip
    options = {"threshold_by": by, "reasoning_threshold": threshold}
    before, after = decided(items, **options), decided(items, **options, family_quota=quota)
    assert kept(after) <= kept(before)
    assert kept(decided(random.sample(items, len(items)), **options, family_quota=quota)) == kept(after)
    sizes = Counter(family_of(one) for one in items)
    for family, size in sizes.items():
        mine = [d for d in after if family_of(d.item) == family]
        allowed = -int(-quota * size // 1)  # rounded up
        assert sum(d.kept for d in mine) == min(allowed, sum(d.kept for d in before if family_of(d.item) == family))
        dropped = [d.score for d in mine if d.reason == "over_quota"]
        assert not dropped or max(dropped) <= min(d.score for d in mine if d.kept)


def test_captions_have_no_quota() -> None:
    items = [item(str(i), ["a b"] * 2, "caption") for i in range(4)]
    assert len(kept(decided(items, family_quota=0.25))) == 4


def test_weights_are_high_where_a_sure_vote_contradicts_the_direct_answers() -> None:
    sure = item("1", [cot("red")] * 8 + ["blue", "green"])
    agreed = item("2", [cot("red")] * 8 + ["red", "red"])
    chains = item("3", [cot("red")] * 8)
    found = decided([sure, agreed, chains], disagreement_weight=3.0, reasoning_threshold=0.5)
    assert [decision.weight for decision in found] == [1 + 2 * 0.8, 1.0, 1.0]
    assert {decision.weight for decision in decided([sure, agreed])} == {None}
    assert decided([sure], disagreement_weight=3.0, select="random")[0].weight is None


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=6), st.sampled_from([1.5, 4.0]),
       st.sampled_from(["similarity", "agreement"]))  # fmt: skip
def test_weights_lie_between_one_and_the_most(texts, most, scorer) -> None:
    (decision,) = decided([item("q", texts)], disagreement_weight=most, reasoning_scorer=scorer)
    assert decision.weight is not None
    assert 1 <= decision.weight <= most


THRESHOLDS = st.sampled_from([None, 0.0, 0.5, 1.0])
CONFIGS = st.builds(
    CurationConfig, threshold_by=BY, reasoning_threshold=LEVELS, caption_threshold=LEVELS, cod_threshold=THRESHOLDS,
    dd_threshold=THRESHOLDS, cot_threshold=THRESHOLDS, direct_threshold=THRESHOLDS,
    reasoning_scorer=st.sampled_from(["agreement", "cross_format", "listing", "similarity", "lexical"]),
    caption_scorer=st.sampled_from(["similarity", "cross_format", "listing"]),
    family_quota=st.sampled_from([0.3, 1.0]), disagreement_weight=st.sampled_from([1.0, 3.0]), dedup=st.booleans(),
    require_format=st.booleans(), require_direct_agreement=st.booleans(), select=st.sampled_from(["best", "random"]),
)  # fmt: skip
ANY = st.one_of(st.sampled_from(["red", "red dog", "..."]), st.sampled_from(["red", "a red dog"]).map(cot),
                st.just(cot("red").replace("Step 2", "Step 7")))  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["caption", "reasoning"]), st.lists(ANY, max_size=5)), max_size=8), CONFIGS)
def test_with_all_options_every_item_is_decided_once_and_the_counts_add_up(pool, config) -> None:
    items = [item(str(i), texts, group) for i, (group, texts) in enumerate(pool)]
    decisions, tally = list(curate(items, config)), Tally()
    for decision in decisions:
        tally.add(decision)
        assert decision.kept == (decision.reason is None)
        assert decision.rows is None or decision.kept == bool(decision.rows)
        assert (decision.chosen is None) == (decision.score is None)
        assert not decision.kept or decision.chosen is not None
    assert [decision.item for decision in decisions] == items
    total = tally.summary()
    assert total["items"] == total["kept"] + sum(total["not_kept"].values()) == len(items)
    assert total["candidates"] == total["scored"] + sum(total["set_aside"].values())


def test_the_random_control_ignores_thresholds_ranks_quotas_and_rows() -> None:
    items = voted([1, 2, 3, 4])
    plain = decided(items, select="random")
    assert plain == decided(items, select="random", threshold_by="quantile", family_quota=0.1, cot_threshold=1.0)
    assert len(kept(plain)) == 4


@pytest.mark.parametrize(("values", "message"), [
    ({"threshold_by": "quantile", "caption_threshold": -0.5}, "caption_threshold=-0.5: must lie between 0 and 1"),
    ({"cot_threshold": 1.5}, r"curation\.cot_threshold=1\.5: must lie between -1 and 1"),
    ({"family_quota": 0.0}, "family_quota=0.0: must be above 0"),
    ({"family_quota": 1.5}, "family_quota=1.5"),
    ({"disagreement_weight": 0.5}, "disagreement_weight=0.5: must be 1 or more"),
])  # fmt: skip
def test_impossible_values_are_errors_at_the_start(values: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build(CurationConfig, values, "curation")


def test_a_spool_is_read_again_and_again(tmp_path: Path) -> None:
    with Spool(iter(voted([1, 2] * 300)), tmp_path) as spool:
        assert list(spool) == list(spool) == voted([1, 2] * 300)
        assert list(tmp_path.iterdir()) == [], "its file has no name"
    with Spool(iter([]), tmp_path) as empty:
        assert list(empty) == []
