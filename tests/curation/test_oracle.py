"""Upper bounds look at the truth, and nothing else does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sicog_exp.curation import CurationError, consistency, curate, filters, items, scorers, selection
from sicog_exp.curation.curate import Decision, Item, Response
from sicog_exp.curation.diagnosis import Choice, Diagnosis, Truth, quality
from sicog_exp.curation.files import curate_file
from sicog_exp.curation.filters import infer_kind
from sicog_exp.curation.oracle import upper_bound
from sicog_exp.prompts import structured
from sicog_exp.recipe import CurationConfig


def cot(answer: str) -> str:
    return structured("cot", ("Find it.", "red dog top", "So it follows.", answer))


def item(id: str, texts: list[str], group: str = "reasoning") -> Item:
    return Item(id, group, "p", f"{id}.png", tuple(Response(t, infer_kind(t, group), i) for i, t in enumerate(texts)))


def one(what: Item, truth: Truth | None, **options: Any) -> Decision:
    config = CurationConfig(**{"select": "oracle", **options})
    judge = upper_bound(config, {} if truth is None else {what.id: truth})
    return next(curate.curate([what], config, upper_bound=judge))


def said(decision: Decision) -> str | None:
    return decision.chosen.text if decision.chosen else None


def test_the_oracle_keeps_a_right_answer_whatever_the_vote() -> None:
    texts = [cot("blue"), cot("blue"), "red", cot("red")]
    found = one(item("q", texts), Truth("Red."), reasoning_threshold=1.0)
    assert (said(found), found.score, found.kept) == (cot("red"), 0.5, True), "in steps where there is a right chain"
    assert said(one(item("q", texts[:3]), Truth("red"))) == "red"


def test_the_oracle_drops_what_no_candidate_answers_right() -> None:
    lost = one(item("q", [cot("blue"), "green"]), Truth("red"))
    assert (said(lost), lost.kept, lost.reason) == (cot("blue"), False, "no_correct_candidate")
    unknown = one(item("q", ["blue"]), None)
    assert (unknown.kept, unknown.reason) == (False, "no_truth")
    assert one(item("q", []), Truth("red")).reason == "no_candidates"
    assert one(item("q", ["..."]), Truth("red")).reason == "no_valid_candidate"


def test_the_oracle_s_caption_is_the_one_with_most_truth() -> None:
    truth = Truth("red dog top, blue car left.")
    right, short, half = "red dog top, blue car left", "red dog top", "red dog top, green cat"
    assert said(one(item("c", [half, short, right], "caption"), truth)) == right
    found = one(item("c", [half, short], "caption"), truth)
    assert (said(found), found.kept) == (short, True)
    assert one(item("c", [half], "caption"), truth, caption_threshold=0.5).kept
    assert one(item("c", [half], "caption"), truth, caption_threshold=0.6).reason == "no_correct_candidate"


def test_ground_truth_stands_in_for_any_candidate() -> None:
    whole = one(item("q", ["blue"]), Truth("red", chain=cot("red")), select="truth")
    assert (said(whole), whole.score, whole.kept, whole.rejected) == (cot("red"), None, True, None)
    assert [c.score for c in whole.candidates] == [1.0], "the candidates keep their scores"
    plain = one(item("q", []), Truth("red"), select="truth")
    assert plain.chosen is not None
    assert (plain.chosen.text, plain.chosen.kind) == ("red", "direct")
    caption = one(item("c", ["x"], "caption"), Truth("red dog."), select="truth")
    assert caption.chosen is not None
    assert (caption.chosen.text, caption.chosen.kind) == ("red dog.", "dd")
    assert one(item("q", ["blue"]), None, select="truth").reason == "no_truth"


def test_a_file_of_candidates_holds_no_truth(tmp_path: Path) -> None:
    row = {"id": "q", "kind": "reasoning", "prompt": "p", "image": None, "candidates": ["red"]}
    (tmp_path / "in.jsonl").write_text(json.dumps(row))
    for select in ("oracle", "truth"):
        with pytest.raises(CurationError, match=f"select={select} looks at the truth.*Use best or random"):
            curate_file(tmp_path / "in.jsonl", tmp_path / "out", CurationConfig(select=select))  # type: ignore[arg-type]


def test_no_selection_but_the_upper_bounds_takes_a_judge() -> None:
    judge = upper_bound(CurationConfig(select="oracle"), {})
    with pytest.raises(CurationError, match="select=best"):
        curate.curate([], CurationConfig(), upper_bound=judge)


def test_what_scores_and_selects_never_imports_a_truth() -> None:
    for module in (consistency, curate, filters, items, scorers, selection):
        lines = [line for line in Path(str(module.__file__)).read_text().splitlines() if "import" in line]
        assert lines
        assert not [line for line in lines if "oracle" in line or "diagnosis" in line]


TEXTS = st.one_of(st.sampled_from(["red", "blue"]), st.sampled_from(["red", "blue"]).map(cot))
CAPTIONS = st.lists(st.sampled_from(["red dog", "blue car", "green cat"]), min_size=1, max_size=3).map(", ".join)


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.tuples(st.just("reasoning"), st.lists(TEXTS, min_size=1, max_size=5)),
                 st.tuples(st.just("caption"), st.lists(CAPTIONS, min_size=1, max_size=5))))  # fmt: skip
def test_no_choice_is_better_than_the_oracle_s(pool) -> None:
    group, texts = pool
    truth = Truth("red" if group == "reasoning" else "red dog, blue car")
    found = one(item("q", texts, group), truth)
    best = next(curate.curate([item("q", texts, group)], CurationConfig()))
    assert found.chosen is not None
    assert best.chosen is not None
    qualities = [quality(group, filters.parse(infer_kind(t, group), t, "stop", CurationConfig()).final, truth.text)
                 for t in texts]  # fmt: skip
    assert qualities[found.chosen.position].precision == max(q.precision for q in qualities)
    assert qualities[best.chosen.position].precision <= qualities[found.chosen.position].precision


def test_the_share_of_the_ceiling_by_hand() -> None:
    def diagnosed(*rows: tuple[float | None, float, float, float]) -> Diagnosis:
        choices = (Choice(s, True, "", quality("reasoning", "a" if c else "b", "a"), r, None, o) for s, r, c, o in rows)
        return Diagnosis("reasoning", len(rows), len(rows), tuple(choices))

    found = diagnosed((0.5, 0.5, 1, 1), (0.5, 0.25, 0, 1), (0.5, 0.0, 0, 0), (0.5, 0.25, 1, 1))
    assert (found.precision_random, found.precision_chosen, found.precision_oracle) == (0.25, 0.5, 0.75)
    assert found.ceiling_share == 0.5
    assert diagnosed((1.0, 1.0, 1, 1)).ceiling_share is None, "no choice is left"
    assert diagnosed((None, 0.5, 1, 1)).ceiling_share is None, "a ground truth is no choice"
