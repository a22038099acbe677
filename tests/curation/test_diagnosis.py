"""Candidates against the truth, counted by hand."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from sicog_exp.curation.diagnosis import Quality, diagnose, quality
from sicog_exp.curation.files import curate_file
from sicog_exp.data.questions import chain_of_description, description
from sicog_exp.data.scenes import make_scene
from sicog_exp.prompts import structured
from sicog_exp.recipe import CurationConfig
from sicog_exp.records import write_jsonl


def cot(answer: str) -> dict[str, Any]:
    return {"kind": "cot", "text": structured("cot", ("goal", "red dog", "because", answer)), "finish_reason": "stop"}


def direct(answer: str, finish: str = "stop") -> dict[str, Any]:
    return {"kind": "direct", "text": answer, "finish_reason": finish}


def caption(text: str) -> dict[str, Any]:
    return {"kind": "dd", "text": text, "finish_reason": "stop"}


def item(id: str, kind: str, *candidates: dict[str, Any]) -> dict[str, Any]:
    return {"id": id, "kind": kind, "prompt": f"prompt {id}", "image": None, "candidates": list(candidates)}


def artifacts(folder: Path, pool: list[dict], truth: list[dict], **config: Any) -> tuple[Path, Path]:
    """A curation directory and a data directory."""
    curated, data = folder / "curated", folder / "data"
    curated.mkdir()
    data.mkdir()
    write_jsonl(curated / "pool.jsonl", pool)
    write_jsonl(data / "truth.jsonl", truth)
    curate_file(curated / "pool.jsonl", curated, CurationConfig(**config))
    return curated, data


QUESTIONS = [
    item("q0", "reasoning", cot("Red."), cot("red"), direct("red"), direct("The red")),  # unanimous and right
    item("q1", "reasoning", cot("2"), cot("two"), cot("two."), direct("3")),  # kept at 0.75, truth is 3
    item("q2", "reasoning", cot("left"), cot("right"), direct("above"), direct("below")),  # not kept
    item("q3", "reasoning", cot("dog"), direct("dog"), direct("cat", "length")),  # the cut one takes no part
    item("q4", "reasoning", direct("x", "length")),  # nothing valid
]
ANSWERS = [
    {"id": "q0", "answer": "red", "family": "attribute"},
    {"id": "q1", "answer": "3", "family": "counting"},
    {"id": "q2", "answer": "left", "family": "relation"},
    {"id": "q3", "answer": "Dog", "family": "naming"},
    {"id": "q4", "answer": "x", "family": "naming"},
]


def test_answers_by_hand(tmp_path: Path):
    found = diagnose(*artifacts(tmp_path, QUESTIONS, ANSWERS, reasoning_threshold=0.75))
    assert list(found) == ["reasoning"]
    d = found["reasoning"]
    assert (d.items, d.known, len(d.choices), d.kept, d.keep_rate) == (5, 5, 4, 3, 0.6)
    assert [c.score for c in d.choices] == [1.0, 0.75, 0.25, 1.0]
    assert [c.random for c in d.choices] == [1.0, 0.25, 0.25, 1.0]
    assert [c.quality.precision for c in d.choices if c.quality] == [1.0, 0.0, 1.0, 1.0]
    assert d.mean_score == 0.75
    assert d.precision_random == 0.625
    assert d.precision_chosen == 0.75
    assert d.precision_kept == pytest.approx(2 / 3)
    assert d.precision_by_family == {"attribute": 1.0, "counting": 0.0, "naming": 1.0}
    assert [c.unanimous for c in d.choices] == [True, False, False, True]
    assert (d.unanimous_share, d.unanimous_precision, d.quality_name) == (0.5, 1.0, "right")


def test_without_truth_only_scores_remain(tmp_path: Path):
    d = diagnose(*artifacts(tmp_path, QUESTIONS, []))["reasoning"]
    assert (d.known, d.kept, d.unanimous_share) == (0, 2, 0.5)
    assert {c.quality for c in d.choices} == {None}
    assert d.precision_random is d.precision_chosen is d.precision_kept is d.unanimous_precision
    assert d.precision_random is None
    assert d.precision_by_family == {}


def test_a_truth_for_some_counts_only_these(tmp_path: Path):
    d = diagnose(*artifacts(tmp_path, QUESTIONS, ANSWERS[1:2], reasoning_threshold=0.75))["reasoning"]
    assert (d.known, d.precision_kept, d.precision_random) == (1, 0.0, 0.25)


def test_captions_by_hand(tmp_path: Path):
    pool = [item("c", "caption", caption("red dog top, blue car left."), caption("Red dog top, blue car left"),
                 caption("green cat right, red dog top"))]  # fmt: skip
    truth = [{"id": "c", "description": "red dog top, blue car left, gray background.", "family": ""}]
    d = diagnose(*artifacts(tmp_path, pool, truth, caption_threshold=0.5))["caption"]
    (choice,) = d.choices
    assert choice.quality == Quality(1.0, pytest.approx(2 / 3))
    assert (choice.random, choice.unanimous) == (pytest.approx((1 + 1 + 0.5) / 3), None)
    assert (d.precision_kept, d.quality_name) == (1.0, "precision")
    assert (d.unanimous_share, d.precision_by_family) == (None, {})


def test_doubled_things_count_as_often_as_they_are_there():
    assert quality("caption", "red dog, red dog, red dog", "red dog, red dog, a tree") == Quality(2 / 3, 2 / 3)
    assert quality("caption", " , .", "red dog") == Quality(0.0, 0.0)


def test_built_in_descriptions_are_their_own_truth():
    scene, other = make_scene(1, "unlabeled", 0), make_scene(1, "unlabeled", 1)
    assert quality("caption", description(scene), description(scene)) == Quality(1.0, 1.0)
    assert quality("caption", description(other), description(scene)).precision < 0.5


def test_a_random_choice_is_judged_by_what_was_chosen(tmp_path: Path):
    d = diagnose(*artifacts(tmp_path, QUESTIONS, ANSWERS, select="random"))["reasoning"]
    assert (d.kept, d.precision_random, d.precision_kept) == (4, 0.625, d.precision_chosen)


def test_rows_that_curation_could_not_use_are_no_items(tmp_path: Path):
    d = diagnose(*artifacts(tmp_path, [*QUESTIONS, QUESTIONS[0]], ANSWERS))["reasoning"]
    assert d.items == 5


def test_unformatted_candidates_are_judged_whole_where_curation_took_them_so(tmp_path: Path):
    pool = [item("q", "reasoning", {"kind": "cot", "text": " red ", "finish_reason": "stop"})]
    truth = [{"id": "q", "answer": "red", "family": ""}]
    d = diagnose(*artifacts(tmp_path, pool, truth, require_format=False))["reasoning"]
    assert (d.precision_kept, d.unanimous_share) == (1.0, None)


def diagnosed_in(folder: Path, count: int) -> float:
    """Seconds of processor time for `count` captions of nine candidates."""
    scenes = [make_scene(1, "unlabeled", i) for i in range(40)]
    texts = [{"kind": "cod", "text": chain_of_description(scene), "finish_reason": "stop"} for scene in scenes]
    pool = [item(f"c{i}", "caption", *(texts[(i + k) % 40] for k in range(9))) for i in range(count)]
    truth = [{"id": f"c{i}", "description": description(scenes[i % 40]), "family": ""} for i in range(count)]
    curated, data = artifacts(folder, pool, truth)
    started = time.process_time()
    assert diagnose(curated, data)["caption"].known == count
    return time.process_time() - started


def test_six_thousand_items_take_seconds_and_time_grows_with_their_number(tmp_path: Path):
    """Beside other work 6,000 took 3.1 s, 5.2 times as long as 1,500: a busy machine slows both sizes."""
    (tmp_path / "few").mkdir()
    (tmp_path / "many").mkdir()
    few, many = diagnosed_in(tmp_path / "few", 1500), diagnosed_in(tmp_path / "many", 6000)
    assert many < 8 * few  # their square would be 16
    assert many < 10
