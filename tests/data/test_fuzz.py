"""200 damaged files a format: a clear error or every row accounted for, never a crash and never a loss in silence."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from formats import FORMATS, GOOD, save_images
from PIL import Image

from sicog_exp.data.formats import DataError, default_root
from sicog_exp.data.images import ImageError, ImageFolder, ImageHeaders, Images
from sicog_exp.data.readers import Intake, read_annotated, read_unlabeled

FILES = 200
DECODED = 10**6
TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|\btrue\b|\bnull\b|-?\d+')
JUNK = (b"null", b"3", b"-1e999", b"true", b"[]", b"{}", b'""', b'"\\ud800"', b'{"a":[1]}', b"[[[[]]]]", b'"../../x"',
        b"NaN", b"9" * 5000)  # fmt: skip
GARBAGE = (b"\x00" * 64, b"\xff\xfe", b"{", b"]", b'"', b"\n", b"\\", b"PAR1", b"PK\x03\x04", b"\x80\x04\x95.",
           b"#" * 512)  # fmt: skip


def flip(content: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 2, 8, 64))):
        content[rng.randrange(len(content))] = rng.randrange(256)


def cut(content: bytearray, rng: random.Random) -> None:
    del content[rng.randrange(len(content)) :]


def lose(content: bytearray, rng: random.Random) -> None:
    """A piece of the middle is gone."""
    start = rng.randrange(len(content))
    del content[start : start + rng.choice((1, 7, 512, 3000))]


def insert(content: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(content) + 1)
    content[start:start] = rng.choice((*GARBAGE, rng.randbytes(rng.randrange(1, 600))))


def double(content: bytearray, rng: random.Random) -> None:
    """A piece is there twice, as after a failed append."""
    start, end = sorted(rng.randrange(len(content)) for _ in range(2))
    content[end:end] = content[start:end]


def swap(content: bytearray, rng: random.Random) -> None:
    """A JSON value of another type; formats without JSON inside lose their bits instead."""
    tokens = list(TOKEN.finditer(bytes(content)))
    if not tokens:
        return flip(content, rng)
    token = rng.choice(tokens)
    content[token.start() : token.end()] = rng.choice(JUNK)


DAMAGE: tuple[Callable[[bytearray, random.Random], None], ...] = (flip, cut, lose, insert, double, swap)
FUZZED = ("LLaVA JSON", "LLaVA JSONL", "chat JSONL", "ShareGPT", "Parquet", "Parquet shards with bytes",
          "datasets directory", "WebDataset shard")  # fmt: skip


def read(source: Path, annotated: bool, images: Images | None = None) -> tuple[int, Intake]:
    """Usable rows and the intake, over the real readers; damaged pictures inside are decoded."""
    intake, images = Intake(), images or ImageHeaders(DECODED, decode=True)
    reader = read_annotated if annotated else read_unlabeled
    return sum(1 for _ in reader(source, default_root(source), images, intake)), intake


def attempt(source: Path, annotated: bool = True, images: Images | None = None) -> tuple[int, Intake] | str:
    """`read`, or the error's message where it is one of ours; any other one ends the test."""
    try:
        return read(source, annotated, images)
    except DataError as error:
        return str(error)


def files_of(source: Path) -> list[Path]:
    return sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]


@pytest.mark.parametrize("format", FUZZED)
def test_damaged_files(format: str, tmp_path: Path) -> None:
    """Every usable and rejected row is counted; a file that cannot be read whole is named in the error.

    Pictures go the way of a run, into a data set's folder.
    """
    save_images(tmp_path)
    (tmp_path / "kept").mkdir()
    source = FORMATS[format](tmp_path, GOOD)
    files = files_of(source)
    good = {file: file.read_bytes() for file in files}
    outcomes = {"rows": 0, "error": 0}
    for number in range(FILES):
        rng = random.Random(f"{format} {number}")
        file = rng.choice(files)
        content = bytearray(good[file])
        rng.choice(DAMAGE)(content, rng)
        file.write_bytes(content)
        found = attempt(source, number % 4 > 0, ImageFolder(tmp_path / "kept", DECODED))
        if isinstance(found, str):
            assert str(source) in found or str(file) in found, number
            assert ";" in found, "no fix is named"
            outcomes["error"] += 1
        else:
            usable, intake = found
            seen = intake.read[str(source)]
            assert usable + len(intake.rejected) == seen, number
            assert all(row.reason and row.fix for row in intake.rejected), number
            intake.write(tmp_path / "rejected.jsonl")
            if file.suffix == ".jsonl":
                assert seen == sum(1 for line in bytes(content).split(b"\n") if line.strip()), number
            outcomes["rows"] += 1
        file.write_bytes(good[file])
    assert sum(outcomes.values()) == FILES
    assert read(source, annotated=True)[0] == len(GOOD), "the undamaged file"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF"])
def test_damaged_pictures(format: str, tmp_path: Path) -> None:
    """Who decodes and who keeps a picture refuse the same ones for the same reasons; headers alone refuse no others."""

    def refused(images: Images) -> str:
        try:
            images.add(tmp_path, "x")
        except ImageError as error:
            return str(error)
        return ""

    picture, other = (Image.effect_noise((24, 24), sigma) for sigma in (50, 90))
    picture.save(tmp_path / "x", format, **({"save_all": True, "append_images": [other]} if format == "MPO" else {}))
    good = (tmp_path / "x").read_bytes()
    assert not refused(ImageFolder(tmp_path / "kept", DECODED))
    for number in range(FILES):
        rng = random.Random(f"{format} {number}")
        content = bytearray(good)
        rng.choice(DAMAGE)(content, rng)
        (tmp_path / "x").write_bytes(content)
        kept = refused(ImageFolder(tmp_path / "kept", DECODED))
        assert refused(ImageHeaders(DECODED, decode=True)) == kept, number
        assert kept or not refused(ImageHeaders(DECODED)), number


@pytest.mark.parametrize("format", ["LLaVA JSON", "Parquet", "WebDataset shard"])
def test_a_file_cut_anywhere_is_an_error(format: str, tmp_path: Path) -> None:
    """These formats have an end: without it rows are lacking, and nobody would know."""
    save_images(tmp_path)
    source = FORMATS[format](tmp_path, GOOD)
    content = source.read_bytes()
    end = len(content.rstrip(b"\0")) if format == "WebDataset shard" else len(content)
    rng = random.Random(format)
    for size in {0, 1, end - 1, *(rng.randrange(end) for _ in range(60)), *range(0, end, 512)}:
        source.write_bytes(content[:size])
        found = attempt(source)
        if isinstance(found, str):
            assert source.name in found
            continue
        usable, intake = found
        assert not usable, size
        assert len(intake.rejected) == intake.read[str(source)], size
        with pytest.raises(DataError):  # as a run would end
            intake.check(source, 0.1, tmp_path / "rejected.jsonl")


def test_shards_that_go_on_behind_their_end(tmp_path: Path) -> None:
    """`cat a.tar b.tar` hides the second one from every tar reader."""
    save_images(tmp_path)
    source = FORMATS["WebDataset shard"](tmp_path, GOOD)
    source.write_bytes(source.read_bytes() * 2)
    with pytest.raises(DataError, match="goes on behind its end"):
        read(source, annotated=True)


def test_two_lists_in_one_file(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([]) * 2)
    with pytest.raises(DataError, match="follows the end"):
        read(tmp_path / "rows.json", annotated=True)


def hostile_members() -> dict[str, Any]:
    import tarfile

    link, hard, big, name = (tarfile.TarInfo(f"{i}.json") for i in range(4))
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard.type, hard.linkname = tarfile.LNKTYPE, "../secret.json"
    big.size = 1 << 50
    name.name = "../../../outside.json"
    return {"link": link, "hard link": hard, "too large": big, "path out of the folder": name}


@pytest.mark.parametrize("name", hostile_members())
def test_hostile_members_of_a_shard(name: str, tmp_path: Path) -> None:
    """Nothing is extracted, followed or believed."""
    member = hostile_members()[name]
    (tmp_path / "in").mkdir()
    file = tmp_path / "in" / "rows.tar"
    file.write_bytes(member.tobuf() + b"\0" * 1024)
    before = sorted(tmp_path.rglob("*"))
    found = attempt(file)
    assert "rows.tar" in found if isinstance(found, str) else (found[0], len(found[1].rejected)) == (0, 1)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_negative_size_does_not_walk_back_for_ever(tmp_path: Path) -> None:
    import tarfile

    info = tarfile.TarInfo("a.json")
    info.pax_headers = {"size": "-1024"}
    (tmp_path / "rows.tar").write_bytes(info.tobuf(tarfile.PAX_FORMAT) + b"\0" * 1024)
    with pytest.raises(DataError, match=r"rows\.tar"):
        read(tmp_path / "rows.tar", annotated=True)


def test_pickles_stay_closed(tmp_path: Path) -> None:
    """A member that would run code on loading is passed over, and so is everything else that is no row."""
    import io
    import tarfile

    touched = tmp_path / "touched"
    code = f"cposix\nsystem\n(S'touch {touched}'\ntR.".encode()
    with tarfile.open(tmp_path / "rows.tar", "w") as tar:
        for name in ("a.pkl", "a.pyd", "a.json"):
            content = code if name != "a.json" else json.dumps({"conversations": [
                {"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "yo"}]}).encode()  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert read(tmp_path / "rows.tar", annotated=True)[0] == 1
    assert not touched.exists()


def test_readers_write_nothing_beside_the_data(tmp_path: Path) -> None:
    for format in FUZZED:
        folder = tmp_path / format
        folder.mkdir()
        save_images(folder)
        source = FORMATS[format](folder, GOOD)
        before = sorted(folder.rglob("*"))
        read(source, annotated=True)
        assert sorted(folder.rglob("*")) == before


def other_columns() -> dict[str, Any]:
    import datetime
    import decimal

    import pyarrow as pa

    far = pa.array([2**62] * 5, pa.timestamp("us"))  # no Python date can hold it
    return {
        "integers": pa.array(range(5)), "not a number": pa.array([float("nan")] * 5), "nulls": pa.nulls(5),
        "far dates": far, "dates": pa.array([datetime.date(2026, 1, 1)] * 5), "booleans": pa.array([True] * 5),
        "decimals": pa.array([decimal.Decimal("1.5")] * 5), "bytes": pa.array([b"\xff\x00"] * 5),
        "numbers in lists": pa.array([[1, 2]] * 5), "empty lists": pa.array([[]] * 5, pa.list_(pa.string())),
        "maps": pa.array([[("a", 1)]] * 5, pa.map_(pa.string(), pa.int64())),
        "words of a dictionary": pa.array(["x"] * 5).dictionary_encode(), "structs": pa.array([{"a": None}] * 5),
        "lists in structs": pa.array([{"from": ["human"], "value": []}] * 5),
    }  # fmt: skip


@pytest.mark.parametrize("name", other_columns())
@pytest.mark.parametrize("column", ["id", "images", "conversations"])
def test_columns_of_other_types(column: str, name: str, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    save_images(tmp_path)
    source = FORMATS["Parquet"](tmp_path, GOOD)
    table = pq.read_table(source)
    pq.write_table(table.set_column(table.column_names.index(column), column, other_columns()[name]), source)
    found = attempt(source)
    assert "rows.parquet" in found if isinstance(found, str) else found[0] + len(found[1].rejected) == len(GOOD)
