"""The contract of a reader, run over every format: the same rows give the same records, bad rows the same reasons."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from formats import BAD, FORMATS, GOOD, ROWS, chat, parquet_shards, qa, save_images, write_shard
from PIL import Image

from sicog_exp.data.formats import DataError, Reading, default_root, found_rows
from sicog_exp.data.images import ImageFolder
from sicog_exp.data.readers import Intake, read_annotated, read_unlabeled
from sicog_exp.records import Record

LIMIT = 10**6


def read(source: Path, out: Path) -> tuple[list[Record], Intake]:
    intake = Intake()
    return list(read_annotated(source, default_root(source), ImageFolder(out, LIMIT), intake)), intake


def problems(intake: Intake) -> dict[str, str]:
    """What was set aside, by id; a shard's row that could not even be read is named shard/id."""
    return {row.id.rpartition("/")[2]: row.problem for row in intake.rejected}


def digest(records: list[Record]) -> str:
    return hashlib.sha256(json.dumps([asdict(record) for record in records]).encode()).hexdigest()


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The records' hash, by the plainest format."""
    folder = tmp_path_factory.mktemp("wanted")
    save_images(folder)
    records, _ = read(FORMATS["chat JSONL"](folder, ROWS), folder / "out")
    assert [record.id for record in records] == [row.id for row in GOOD]
    assert [len(record.images) for record in records] == [1, 2, 1, 1, 0]
    return digest(records)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_the_same_records(format: str, wanted: str, tmp_path: Path) -> None:
    save_images(tmp_path)
    source = FORMATS[format](tmp_path, ROWS)
    records, intake = read(source, tmp_path / "out")
    assert digest(records) == wanted
    assert problems(intake) == {bad.id: problem for bad, problem in BAD}
    assert all(row.reason and row.fix and row.row > 0 for row in intake.rejected)
    assert len(records) + len(intake.rejected) == intake.read[str(source)] == len(ROWS)


@pytest.mark.parametrize("format", FORMATS)
def test_a_rejection_names_the_place_of_its_row(format: str, tmp_path: Path) -> None:
    save_images(tmp_path)
    source = FORMATS[format](tmp_path, ROWS)
    _, intake = read(source, tmp_path / "out")
    held = [(found.part, found.row) for found in found_rows(source)]
    places = [held[i] for i, row in enumerate(ROWS) if row in dict(BAD)]
    assert [(row.part, row.row) for row in intake.rejected] == places
    assert all(row.file == str(source) for row in intake.rejected)


@pytest.mark.parametrize("format", FORMATS)
def test_who_watches_is_told_each_row_and_how_far_it_is(format: str, tmp_path: Path) -> None:
    save_images(tmp_path)
    source = FORMATS[format](tmp_path, ROWS)
    told: list[tuple[int, float]] = []

    def watch(reading: Reading) -> None:
        assert reading.share is not None
        told.append((reading.rows, reading.share))

    reading = Reading(watch)
    assert len(list(found_rows(source, reading))) == len(ROWS)
    rows, shares = zip(*told, strict=True)
    assert rows == tuple(range(1, len(ROWS) + 1))
    assert all(0 <= one <= other <= 1 for one, other in pairwise(shares))
    assert reading.share == 1
    if format.startswith("WebDataset shards"):
        assert shares[0] < 1 < len(set(shares)), "by shards"


def test_a_long_file_s_share_grows_with_its_rows(tmp_path: Path) -> None:
    """A list and lines, by the bytes that were read: within a reader's block of a megabyte."""
    row = {"text": "x" * 10_000}
    (tmp_path / "rows.json").write_text(json.dumps([row] * 1000))
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 1000)
    for name in ("rows.json", "rows.jsonl"):
        reading = Reading()
        for found in found_rows(tmp_path / name, reading):
            assert reading.share == pytest.approx(found.row / 1000, abs=0.25)


@pytest.mark.parametrize("format", FORMATS)
def test_unlabeled_rows_of_every_format(format: str, tmp_path: Path) -> None:
    """The same images and questions, whatever holds them; the answers are not asked for."""
    save_images(tmp_path)
    rows = [qa("1", ("a.png",), "<image>\nWhat?", "cat"), qa("2", ("b.png",), "<image>", "a dog"),
            qa("3", ("a.png",), "<image>\nWhat?", "cat"), qa("4", ("none.png",), "<image>\nWhat?", "x"),
            qa("5", ("c.jpg",), "<image>\nWhere?", "here")]  # fmt: skip
    source = FORMATS[format](tmp_path, rows)
    intake = Intake()
    found = list(read_unlabeled(source, default_root(source), ImageFolder(tmp_path / "out", LIMIT), intake))
    assert [(request.question, request.answer) for request in found] == [
        ("What?", "cat"), ("", "a dog"), ("Where?", "here")]  # fmt: skip
    assert len({request.image for request in found}) == 3
    assert Counter(row.problem for row in intake.rejected) == {"repeated": 1, "image": 1}


def test_rows_of_the_hub_are_those_of_its_files(
    wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` takes a local folder for a data set of the hub where the names are the same: its way of streaming."""
    save_images(tmp_path)
    home = tmp_path / "owner"
    home.mkdir()
    parquet_shards(tmp_path, ROWS).rename(home / "name")
    monkeypatch.chdir(tmp_path)
    records, intake = read(Path("hub:owner/name:train"), tmp_path / "out")
    assert digest(records) == wanted
    assert problems(intake) == {bad.id: problem for bad, problem in BAD}


def test_without_a_hub_the_source_and_the_way_out_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"hub:owner/absent: the hub did not give it .* download the data set"):
        read(Path("hub:owner/absent"), tmp_path / "out")
    with pytest.raises(DataError, match="write hub:OWNER/NAME"):
        read(Path("hub:https://example.org/x"), tmp_path / "out")


def test_ids_and_parts_of_shards(tmp_path: Path) -> None:
    """Rows without an id are named by shard and key; the same key in two shards is no conflict."""
    save_images(tmp_path)
    for name in ("x.tar", "y.tar"):
        write_shard(tmp_path / name, tmp_path, [qa("", ("a.png",), "<image>\nWhat?", f"cat {name}")])
    records, intake = read(tmp_path / "{x,y}.tar", tmp_path / "out")
    assert not intake.rejected
    assert [record.id for record in records] == ["x-000001", "y-000001"]


@pytest.mark.parametrize("nothing", ["", None, []])
def test_a_shard_s_row_without_an_image_may_say_so(nothing: Any, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "yo"}]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        content = json.dumps({"image": nothing, "conversations": turns}).encode()
        info = tarfile.TarInfo("1.json")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    records, intake = read(tmp_path / "x.tar", tmp_path / "out")
    assert ([record.kind for record in records], intake.rejected) == (["text"], [])


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("part", [{"path": "beside.png"}, {"image": {"path": "beside.png"}},
                                  {"type": "image_url", "image_url": {"url": "beside.png"}}])  # fmt: skip
def test_a_shard_s_row_shows_no_file_beside_it(part: dict, columns: bool, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "beside.png")
    turns: Any = [{"role": "user", "content": [{"type": "image", **part}, {"type": "text", "text": "What?"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]}]  # fmt: skip
    if columns:
        turns = {name: [turn[name] for turn in turns] for name in ("role", "content")}
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        content = json.dumps({"messages": turns}).encode()
        info = tarfile.TarInfo("1.json")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    records, intake = read(tmp_path / "x.tar", tmp_path / "out")
    assert (len(records), [row.problem for row in intake.rejected]) == (0, ["image"])
    assert "names an image in a part of a turn" in intake.rejected[0].reason


def test_a_chat_row_may_hold_a_url_and_nothing_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a network connection was opened"))
    save_images(tmp_path)
    for format in FORMATS:
        folder = tmp_path / format
        folder.mkdir()
        save_images(folder)
        rows = [qa("far", ("https://example.org/a.png",), "<image>\nWhat?", "cat"), *GOOD]
        _, intake = read(FORMATS[format](folder, rows), folder / "out")
        assert [row.problem for row in intake.rejected] == ["image"]
    assert chat(rows[0])["images"] == ["https://example.org/a.png"]
