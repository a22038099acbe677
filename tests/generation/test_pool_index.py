"""Pools are joined by sample id, whatever their order, without holding their texts."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sicog_exp.generation.pool_index import PoolIndex
from sicog_exp.records import write_jsonl

ROWS = st.lists(st.tuples(st.sampled_from("abcd"), st.text(st.characters(exclude_categories=["Cs"]), max_size=6)),
                max_size=12)  # fmt: skip


def row(sample_id: str, text: str) -> dict[str, Any]:
    return {"sample_id": sample_id, "text": text}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pools=st.lists(ROWS, min_size=1, max_size=3))
def test_every_candidate_lands_on_its_sample(tmp_path: Path, pools: list[list[tuple[str, str]]]) -> None:
    files, wanted = [], {}
    for i, pool in enumerate(pools):
        files.append(tmp_path / f"{i}.jsonl")
        write_jsonl(files[-1], (row(*pair) for pair in pool))
        for sample_id, text in pool:
            wanted.setdefault(sample_id, []).append(row(sample_id, text))
    index = PoolIndex(files)
    assert list(index) == list(index) == list(wanted.items())
    assert len(index) == len(wanted)


def test_memory_does_not_grow_with_the_texts(tmp_path: Path) -> None:
    peaks = []
    for length in (10, 4000):
        write_jsonl(tmp_path / "pool.jsonl", (row(f"s{i // 3}", "x" * length) for i in range(3000)))
        tracemalloc.start()
        count = sum(len(candidates) for _, candidates in PoolIndex([tmp_path / "pool.jsonl"]))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert count == 3000
    assert peaks[0] < 800 * 1000  # 1,000 samples
    assert peaks[1] < peaks[0] + 200_000  # 12 MB of text more
