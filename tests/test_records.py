"""Records and candidates are validated when made, so that what is on disk was valid."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sicog_exp.prompts import KINDS
from sicog_exp.records import (
    Candidate,
    Message,
    Record,
    RecordError,
    RecordFile,
    RecordsById,
    candidate_from,
    candidate_row,
    conversation,
    read_jsonl,
    read_records,
    user,
    write_jsonl,
    write_records,
)

ASKED = Message("user", "<image>\nWhat is it?")
ANSWERED = Message("assistant", "a cat")
WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda text: text.strip() != "" and "<image>" not in text
)


def record(**changes: Any) -> Record:
    values = {"id": "a", "messages": (ASKED, ANSWERED), "images": ("a.png",), "kind": "direct", "source": "annotated"}
    return Record(**{**values, **changes})


def candidate(**changes: Any) -> Candidate:
    values = {"sample_id": "a", "kind": "cot", "index": 0, "text": "x", "seed": 1, "logprob": -1.5, "tokens": 3,
              "finish_reason": "stop"}  # fmt: skip
    return Candidate(**{**values, **changes})


@st.composite
def records(draw: st.DrawFn) -> list[Record]:
    made = []
    for i in range(draw(st.integers(0, 4))):
        turns = draw(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
        images = tuple(f"{j}.png" for j in range(draw(st.integers(0, 2))))
        messages = [Message("system", draw(WORDS))] if draw(st.booleans()) else []
        for j, (asked, answered) in enumerate(turns):
            messages += [user(asked, 0 if j else len(images)), Message("assistant", answered)]
        messages = messages[:-1] if draw(st.booleans()) else messages
        made.append(Record(f"{i}-é", tuple(messages), images, draw(st.sampled_from(KINDS)), draw(WORDS), draw(WORDS)))
    return made


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(made=records())
def test_records_are_read_as_they_were_written(made: list[Record], tmp_path: Path) -> None:
    assert write_records(tmp_path / "records.parquet", made) == len(made)
    assert read_records(tmp_path / "records.parquet") == made


def test_parquet_is_read_by_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    write_records(tmp_path / "records.parquet", [record(), record(id="b")])
    rows = datasets.Dataset.from_parquet(str(tmp_path / "records.parquet"), cache_dir=str(tmp_path / "cache"))
    assert rows["id"][:] == ["a", "b"]
    assert rows[0]["messages"][1] == {"role": "assistant", "content": "a cat"}


WRONG = [
    ({"id": ""}, "empty id"),
    ({"kind": "poem"}, r"unknown kind 'poem'; use one of cod, dd"),
    ({"images": ()}, "1 <image> placeholders for 0 images"),
    ({"images": ("a.png", "b.png")}, "1 <image> placeholders for 2 images"),
    ({"messages": ()}, "must alternate"),
    ({"messages": (ANSWERED, ASKED)}, "must alternate"),
    ({"messages": (ASKED, ASKED)}, "must alternate"),
    ({"messages": (ASKED, Message("tool", "x"))}, "must alternate"),  # type: ignore[arg-type]
    ({"messages": (ASKED, Message("assistant", " \n"))}, "empty response"),
    ({"messages": (Message("user", "What?"), Message("assistant", "<image>"))}, "images belong to the user"),
    ({"messages": (ASKED, ANSWERED, Message("system", "Be brief."))}, "system message after the first"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_a_record_that_breaks_its_contract_is_never_made(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        record(**changes)


def test_doubled_ids_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"records\.parquet: id 'b' occurs more than once"):
        write_records(tmp_path / "records.parquet", [record(), record(id="b"), record(id="b")])
    assert not (tmp_path / "records.parquet").exists()


def test_prompt_and_response() -> None:
    whole = record(messages=(Message("system", "Be brief."), ASKED, ANSWERED, Message("user", "Sure?"), ANSWERED))
    assert whole.response == "a cat"
    assert whole.prompt == whole.messages[:-1]
    open_ended = record(messages=(ASKED,))
    assert open_ended.response is None
    assert open_ended.prompt == (ASKED,)
    assert conversation("What?", "It.", ("a", "b"))[0].content == "<image>\n<image>\nWhat?"
    assert conversation("What?", None, ()) == (Message("user", "What?"),)


BROKEN = [{"text": {"error": "rate limit"}}, {"text": None}, {"finish_reason": "error"}, {"kind": "poem"},
          {"index": -1}, {"sample_id": ""}, {"logprob": math.nan}, {"tokens": -1}]  # fmt: skip


@pytest.mark.parametrize("changes", BROKEN)
def test_defect_an_error_object_is_saved_as_a_caption(changes: dict[str, Any]) -> None:
    with pytest.raises(RecordError, match="candidate"):
        candidate(**changes)


def test_candidates_are_read_as_they_were_written(tmp_path: Path) -> None:
    made = [candidate(index=i, text=text) for i, text in enumerate(["", "a\nb", "\u2028 \x85 é", '"'])]
    assert write_jsonl(tmp_path / "c.jsonl", map(candidate_row, made)) == 4
    assert [candidate_from(row) for row in read_jsonl(tmp_path / "c.jsonl")] == made
    assert {one.key for one in made} == {("a", "cot", i) for i in range(4)}


def test_jsonl_never_holds_what_json_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_jsonl(tmp_path / "c.jsonl", [{"logprob": math.nan}])
    write_jsonl(tmp_path / "d.jsonl", [{"b": 1, "a": "é"}])
    assert json.loads((tmp_path / "d.jsonl").read_text()) == {"b": 1, "a": "é"}


def test_a_record_file_is_walked_through_and_written_as_it_comes(tmp_path: Path, monkeypatch: Any) -> None:
    """More rows than are written or read together; the file on its way is no file."""
    monkeypatch.setattr("sicog_exp.records.ROWS_PER_GROUP", 8)
    monkeypatch.setattr("sicog_exp.records.ROWS_READ", 3)
    made = [record(id=str(i)) for i in range(20)]
    assert write_records(tmp_path / "r.parquet", iter(made)) == 20
    file = RecordFile(tmp_path / "r.parquet")
    assert list(file) == list(file) == read_records(tmp_path / "r.parquet") == made
    assert len(file) == 20
    with pytest.raises(RecordError, match="'3' occurs more than once"):
        write_records(tmp_path / "bad.parquet", iter([*made, made[3]]))
    assert not (tmp_path / "bad.parquet").exists()
    assert write_records(tmp_path / "none.parquet", iter(())) == 0
    assert list(RecordFile(tmp_path / "none.parquet")) == []


def test_records_are_found_in_any_order_and_in_one_walk_in_theirs() -> None:
    walks = []

    class Counted:
        def __iter__(self) -> Any:
            walks.append(1)
            return iter(record(id=str(i)) for i in range(6))

    known = RecordsById(Counted())
    assert [known[id].id for id in "013355"] == list("013355")
    assert len(walks) == 1
    assert [known[id].id for id in "20521"] == list("20521")
    with pytest.raises(KeyError):
        known["absent"]
