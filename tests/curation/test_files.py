import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sicog_exp.curation import CurationError
from sicog_exp.curation.files import _score_lines, curate_file
from sicog_exp.curation.items import CandidateScore
from sicog_exp.prompts import structured
from sicog_exp.recipe import CurationConfig

COT = structured("cot", ("Find the colour.", "A red cat.", "The cat is red.", "Red."))


def row(id: str, candidates: list[Any], kind: str = "reasoning", image: str | None = None) -> dict[str, Any]:
    return {"id": id, "kind": kind, "prompt": f"prompt {id}", "image": image, "candidates": candidates}


def run(folder: Path, lines: list[Any], **options: Any) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Write lines (bytes as they are, other values as JSON), curate them, read all outputs."""
    file = folder / "in.jsonl"
    file.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    summary = curate_file(file, folder / "out", CurationConfig(**options))
    names = ("curated", "scores", "preferences", "rejected")
    texts = {name: (folder / "out" / f"{name}.jsonl").read_text("utf-8") for name in names}
    assert json.loads((folder / "out" / "summary.json").read_text()) == summary
    assert sorted(p.name for p in (folder / "out").iterdir()) == sorted(
        [*(f"{n}.jsonl" for n in names), "summary.json"]
    )
    return summary, {name: [json.loads(line) for line in text.splitlines()] for name, text in texts.items()}


def test_all_files(tmp_path: Path) -> None:
    summary, files = run(tmp_path, [row("q", [COT, "red", "red", "blue"], image="a.png")], reasoning_threshold=0.75)
    assert files["curated"] == [
        {"id": "q", "kind": "reasoning", "prompt": "prompt q", "image": "a.png", "chosen": COT, "chosen_kind": "cot",
         "score": 0.75, "kept": True, "reason": None, "rejected": "blue"}
    ]  # fmt: skip
    assert files["scores"][3] == {"id": "q", "position": 3, "kind": "direct", "score": 0.25, "reason": None}
    assert files["preferences"] == [
        {"id": "q", "prompt": "prompt q", "image": "a.png", "chosen": COT, "rejected": "blue"}
    ]
    assert (summary["rows"], summary["items"], summary["kept"], summary["keep_rate"]) == (1, 1, 1, 1.0)
    assert (summary["encoder"], summary["thresholds"]) == ("lexical", {"caption": 0.85, "reasoning": 0.75})


def test_defect_error_object_is_not_a_caption(tmp_path: Path) -> None:
    """The error is set aside and counted; the item goes on with its other candidates."""
    error = {"error": {"code": 429, "message": "rate limit"}}
    summary, files = run(
        tmp_path, [row("1", [error, "a red cat", "a red cat"], "caption"), row("2", [error], "caption")]
    )
    assert [(r["chosen"], r["reason"]) for r in files["curated"]] == [("a red cat", None), (None, "no_valid_candidate")]
    first = files["rejected"][0]
    assert (first["file"], first["row"], first["id"], first["position"]) == ("in.jsonl", 1, "1", 0)
    assert "error" in first["reason"]
    assert first["fix"]
    assert (summary["rejected_candidates"], summary["set_aside"]) == (2, {"invalid_candidate": 2})
    assert (summary["candidates"], summary["scored"]) == (4, 2)


def test_candidates_as_objects(tmp_path: Path) -> None:
    candidates = [
        {"text": "red", "kind": "direct"},
        {"text": COT, "finish_reason": "length"},
        {"text": "red", "kind": "dd"},
    ]
    _, files = run(tmp_path, [row("q", candidates)])
    assert [r["reason"] for r in files["scores"]] == [None, "truncated", "invalid_candidate"]
    assert "use cot or direct" in files["rejected"][0]["fix"]


def test_item_of_kind_cot_wants_steps(tmp_path: Path) -> None:
    _, files = run(tmp_path, [row("q", ["red", COT], kind="cot"), row("r", ["red", COT], kind="direct")])
    assert [(r["kind"], r["reason"]) for r in files["scores"]] == [
        ("cot", "broken_format"), ("cot", None), ("direct", None), ("cot", None)]  # fmt: skip


BAD = {
    "not JSON": b'{"id": ',
    "not UTF-8": b'{"id": "\xff"}',
    "an object": b"[1, 2]",
    "missing candidates": {"id": "x", "kind": "dd", "prompt": "p", "image": None},
    "missing kind, prompt, image, candidates": {"id": "x"},
    "id is a int": {**row("x", []), "id": 3},
    "empty id": row("", []),
    "prompt is a NoneType": {**row("x", []), "prompt": None},
    "image is a list": {**row("x", []), "image": []},
    "candidates is a str": {**row("x", []), "candidates": "red"},
    "unknown kind 'text'": row("x", [], kind="text"),
    "occurs in an earlier row": row("good", []),
    "surrogate": b'{"id": "\\ud800", "kind": "dd", "prompt": "p", "image": null, "candidates": []}',
    "not JSON (": b"[" * 100_000,
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_row_is_set_aside_with_row_reason_and_fix(tmp_path: Path, reason: str) -> None:
    summary, files = run(tmp_path, [row("good", ["red"]), b"", BAD[reason], row("last", ["red"])])
    assert [r["id"] for r in files["curated"]] == ["good", "last"]
    assert [(r["file"], r["row"], r["position"]) for r in files["rejected"]] == [("in.jsonl", 3, None)]
    assert reason in files["rejected"][0]["reason"]
    assert files["rejected"][0]["fix"]
    assert (summary["rows"], summary["items"], summary["rejected_rows"]) == (3, 2, 1)


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"\n \n", "is empty"), (b"{}\n[]\n", "none of its 2 rows")]
)
def test_file_without_a_usable_row_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "in.jsonl"
    file.write_bytes(content)
    with pytest.raises(CurationError, match=message) as error:
        curate_file(file, tmp_path / "out", CurationConfig())
    assert "in.jsonl" in str(error.value)
    assert not list((tmp_path / "out").iterdir())


def test_paths_that_cannot_be_used_are_errors(tmp_path: Path) -> None:
    with pytest.raises(CurationError, match=r"nowhere\.jsonl: No such file"):
        curate_file(tmp_path / "nowhere.jsonl", tmp_path / "out", CurationConfig())
    with pytest.raises(CurationError, match="directory"):
        curate_file(tmp_path, tmp_path / "out", CurationConfig())
    (tmp_path / "in.jsonl").write_text(json.dumps(row("1", ["red"])))
    with pytest.raises(CurationError, match=r"in\.jsonl"):
        curate_file(tmp_path / "in.jsonl", tmp_path / "in.jsonl", CurationConfig())


def test_failed_run_leaves_the_earlier_outputs(tmp_path: Path) -> None:
    run(tmp_path, [row("1", ["red"])])
    before = (tmp_path / "out" / "curated.jsonl").read_bytes()
    (tmp_path / "in.jsonl").write_bytes(b"broken\n")
    with pytest.raises(CurationError):
        curate_file(tmp_path / "in.jsonl", tmp_path / "out", CurationConfig())
    assert (tmp_path / "out" / "curated.jsonl").read_bytes() == before


def test_a_killed_run_leaves_nothing_beside_the_next_one_s_outputs(tmp_path: Path) -> None:
    code = ("import os, sys; from pathlib import Path; from sicog_exp.curation.files import _Outputs; "
            "_Outputs(Path(sys.argv[1])).__enter__(); os.kill(os.getpid(), 9)")  # fmt: skip
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    assert list((tmp_path / "out").iterdir()), "the kill came while it wrote"
    run(tmp_path, [row("1", ["red"])])
    assert not list((tmp_path / "out").glob(".*"))


def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    """Python's own hash of a string changes with the process; nothing written may."""
    rows = [row(str(i), [COT, "red", "blue", "green", "two", "a red cat"], image=str(i % 3)) for i in range(40)]
    run(tmp_path, rows, reasoning_threshold=0.3)
    code = ("import sys; from pathlib import Path; from sicog_exp.recipe import CurationConfig; "
            "from sicog_exp.curation.files import curate_file; "
            "curate_file(Path(sys.argv[1]), Path(sys.argv[2]), CurationConfig(reasoning_threshold=0.3))")  # fmt: skip
    other = tmp_path / "other"
    command = [sys.executable, "-c", code, str(tmp_path / "in.jsonl"), str(other)]
    subprocess.run(command, check=True, env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(filter(None, sys.path))})
    for file in other.iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


@settings(deadline=None)
@given(st.text(), st.lists(st.builds(
    CandidateScore, st.integers(0, 99), st.sampled_from([None, "cod", "direct"]), st.none() | st.floats(-1, 1),
    st.sampled_from([None, "too_short"]), st.none() | st.dictionaries(st.sampled_from(["similarity", "lexical"]),
                                                                     st.floats(-1, 1)))))  # fmt: skip
def test_rows_of_scores_are_json_s_own(id: str, scores: list[CandidateScore]) -> None:
    rows = [asdict(score) for score in scores]
    rows = [{"id": id, **{key: value for key, value in row.items() if key != "parts" or value is not None}}
            for row in rows]  # fmt: skip
    assert _score_lines(id, scores) == "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_minilm_on_captions(tmp_path: Path) -> None:
    texts = ["A cat sleeps on a sofa.", "A sleeping cat on a couch.", "Stock markets fell sharply."]
    _, files = run(tmp_path, [row("c", texts, "caption")], encoder="minilm", caption_threshold=0.5)
    assert files["curated"][0]["chosen"] in texts[:2]
    assert files["curated"][0]["rejected"] == texts[2]


def test_byte_order_mark_and_missing_last_newline(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(row("1", ["é"]), ensure_ascii=False).encode())
    assert curate_file(file, tmp_path / "out", CurationConfig())["kept"] == 1
    assert '"chosen": "é"' in (tmp_path / "out" / "curated.jsonl").read_text("utf-8")


CANDIDATE = st.one_of(st.sampled_from(["red", "blue", COT, "", "..."]), st.just({"error": "x"}), st.integers())
LINE = st.one_of(
    st.builds(
        row, st.sampled_from("abcdef"), st.lists(CANDIDATE, max_size=4), st.sampled_from(["dd", "reasoning", "no"])
    ),
    st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"")),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(LINE, max_size=8))
def test_every_row_is_curated_or_rejected(tmp_path: Path, lines: list[Any]) -> None:
    written = [n for n, x in enumerate(lines, 1) if not isinstance(x, bytes) or x.strip()]
    try:
        summary, files = run(tmp_path, lines)
    except CurationError:
        return
    rows = [r for r in files["rejected"] if r["position"] is None]
    assert (
        len(files["curated"]) + len(rows)
        == len(written)
        == summary["rows"]
        == summary["items"] + summary["rejected_rows"]
    )
    assert len({r["id"] for r in files["curated"]}) == len(files["curated"])
    assert len(files["scores"]) == summary["candidates"] == summary["scored"] + sum(summary["set_aside"].values())
    assert len(files["rejected"]) - len(rows) == summary["rejected_candidates"]
