"""Diversity: numbers by hand, independent of a pool's size and order; an alarm for a pool that collapses on purpose."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sicog_exp.curation.diversity import (
    WORDS,
    alarms,
    collapse_alarms,
    distinct_share,
    entropy,
    measure,
    metrics,
    read_diversity,
)
from sicog_exp.curation.files import curate_file
from sicog_exp.prompts import structured
from sicog_exp.recipe import CurationConfig
from sicog_exp.records import write_jsonl

NOUNS = ("dog", "cat", "pig", "car", "bus", "hat", "sock", "tree", "rose", "key", "saw", "axe")
COLORS = ("red", "blue", "green", "yellow", "purple")


def row(i: int, text: str, kind: str = "direct", kept: bool = True, reason: str | None = None) -> dict[str, Any]:
    group = "caption" if kind in ("cod", "dd") else "reasoning"
    return {"id": f"u{i}", "kind": group, "chosen": text, "chosen_kind": kind, "kept": kept, "reason": reason}


def answers(count: int, variety: int, seed: int = 0) -> list[dict[str, Any]]:
    """Chains of thought over `variety` nouns and answers."""
    rng = random.Random(seed)
    return [row(i, chain(rng, variety), "cot") for i in range(count)]


def chain(rng: random.Random, variety: int) -> str:
    things = [f"{rng.choice(COLORS[:variety])} {rng.choice(NOUNS[:variety])}" for _ in range(4)]
    return structured("cot", ("find the thing", ", ".join(things), things[-1], things[-1].split()[1]))


def test_numbers_by_hand() -> None:
    rows = [row(0, "a red dog", "dd"), row(1, "a red cat", "dd"), row(2, "a dog", "dd", False, "below_threshold"),
            row(3, "a red dog", "dd", False, "near_duplicate")]  # fmt: skip
    found = measure("caption", rows, [None, None, "truncated", "too_long"])
    assert (found.kept, found.mean_words, found.vocabulary, found.format_valid) == (2, 3, 4, 0.75)
    assert found.duplicates == pytest.approx(1 / 3)
    assert found.pairwise_similarity == pytest.approx(0.6)  # 3 of 5 words and pairs: a, red, a red
    assert (found.distinct_1, found.distinct_2, found.answer_entropy, found.embedding_spread) == (None,) * 4


def test_candidates_that_were_left_unused_are_neither_valid_nor_not() -> None:
    reasons = ["broken_format", "unused", "unused", "unused"]
    assert measure("reasoning", [row(0, "red")], reasons).format_valid == 0
    assert measure("reasoning", [row(0, "red")], [*reasons, None]).format_valid == 0.5
    assert measure("reasoning", [row(0, "red")], ["unused"]).format_valid is None


def test_nothing_kept_is_no_error() -> None:
    found = measure("reasoning", [row(0, "x", kept=False, reason="below_threshold")], [])
    assert (found.kept, found.mean_words, found.answer_entropy, found.duplicates) == (0, None, None, None)


def test_distinct_shares_compare_pools_of_different_sizes() -> None:
    words = [random.Random(1).choice(range(200)) for _ in range(WORDS)]
    rng = random.Random(2)
    small, large = ([rng.choice(range(200)) for _ in range(n * WORDS)] for n in (2, 40))
    first, second = distinct_share(small), distinct_share(large)
    assert first is not None
    assert second is not None
    assert abs(first - second) < 0.02
    assert distinct_share(words[:-1]) is None
    assert distinct_share([7] * WORDS) == 1 / WORDS


def test_entropy_is_in_bits_and_does_not_fall_with_the_sample() -> None:
    assert entropy(Counter({"yes": 500, "no": 500})) == pytest.approx(1, abs=1e-3)
    assert entropy(Counter({"yes": 9})) == 0
    rng = random.Random(0)
    means = [sum(entropy(Counter(rng.choices("abcdefgh", k=n))) for _ in range(200)) / 200 for n in (20, 500)]
    assert means == pytest.approx([3, 3], abs=0.1)


def test_answers_count_by_family() -> None:
    """Two families with one answer each hold no information, whatever both together look like."""
    rows = [row(i, "yes" if i % 2 else "dog") for i in range(40)]
    families = {f"u{i}": "existence" if i % 2 else "naming" for i in range(40)}
    assert measure("reasoning", rows, [], families).answer_entropy == 0
    assert measure("reasoning", rows, []).answer_entropy == pytest.approx(1, abs=0.1)


def test_the_order_of_rows_does_not_matter() -> None:
    rows = answers(200, 8)
    assert measure("reasoning", rows, []) == measure("reasoning", rows[::-1], [])


def test_headers_of_steps_are_no_words() -> None:
    found = measure("reasoning", [row(0, structured("cot", ("a", "b", "c", "d")), "cot")], [])
    assert found.mean_words == 4


def test_a_pool_that_collapses_alarms_and_a_healthy_one_does_not() -> None:
    def history(*varieties: tuple[int, int]) -> list:
        return [{"reasoning": measure("reasoning", answers(n, v, seed), [])} for seed, (n, v) in enumerate(varieties)]

    assert alarms(history((400, 12), (300, 12), (500, 12)), 0.2) == []
    first, second = alarms(history((400, 12), (400, 12), (400, 2)), 0.2)
    assert first.startswith("Kept answers of G2: distinct-2 fell by")
    assert second.startswith("Kept answers of G2: answer entropy fell by")
    assert alarms(history((400, 12), (400, 2)), 0) == []
    assert alarms([], 0.2) == []
    (small,) = (text for text in alarms(history((400, 12), (5, 12)), 0.2) if "too few" in text)
    assert "distinct-2" in small


def test_a_group_that_keeps_nothing_alarms() -> None:
    healthy = {"reasoning": measure("reasoning", answers(400, 12), [])}
    assert len(alarms([healthy, {}], 0.2)) == 2


def test_read_from_an_artifact(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_jsonl(data / "truth.jsonl", [{"id": f"q{i}", "answer": "dog", "family": "naming"} for i in range(60)])
    paths = []
    for name, variety in (("first", 12), ("second", 1)):
        folder = tmp_path / name
        folder.mkdir()
        rng = random.Random(0)
        rows = [{"id": f"q{i}", "kind": "reasoning", "prompt": "?", "image": f"{i}.png",
                 "candidates": [{"kind": "cot", "text": chain(rng, variety), "finish_reason": "stop"},
                                {"kind": "cot", "text": "Step 1: broken", "finish_reason": "stop"}]}
                for i in range(60)]  # fmt: skip
        write_jsonl(folder / "pool.jsonl", rows)
        curate_file(folder / "pool.jsonl", folder, CurationConfig(reasoning_threshold=0))
        paths.append(folder)
    found = read_diversity(paths[0], data)
    named = metrics(found)
    assert named["curation/reasoning/format_valid"] == 0.5
    assert 0 < named["curation/reasoning/distinct_1"] < named["curation/reasoning/distinct_2"]
    assert 2 < named["curation/reasoning/answer_entropy"] < math.log2(12) + 0.5
    assert not any("embedding" in name for name in named)
    assert len(collapse_alarms(paths, data, 0.2)) == 2
