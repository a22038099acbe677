"""Rows of a source, whatever its format: every format has one reader, and every reader is a stream.

A reader maps a file to (row number from 1, parsed row or the BadRow that it is); what it cannot read as a whole is a
DataError. A source is what a recipe names: a file, a folder or brace pattern of shards, a saved `datasets` directory,
or `hub:OWNER/NAME`. No reader unpickles, extracts, follows a link or fetches an address that data name.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sicog_exp import prompts
from sicog_exp.data.images import SUFFIXES
from sicog_exp.records import IMAGE_PLACEHOLDER

if TYPE_CHECKING:
    import tarfile

HUB = "hub:"
SHARDS = (".tar", ".parquet")
"""Files that a folder of shards is made of."""
IMAGE_ENDINGS = (*(suffix[1:] for suffix in SUFFIXES.values()), "jpeg")
IMAGE_SUFFIXES = tuple(f".{ending}" for ending in IMAGE_ENDINGS)
OTHER_PICTURES = (".avif", ".heic", ".heif", ".ico", ".jfif", ".jp2", ".jpe", ".jxl", ".mpo", ".pgm", ".ppm", ".svg",
                  ".tga", ".tif", ".tiff")  # fmt: skip
"""Further suffixes of pictures: such a file is opened, and a format that is not decoded is said."""
NOTHING: tuple[Any, ...] = (None, "", [], {})
"""Values of a key that says nothing, as rows of a table have that lack what others hold."""
MOST_SHARDS = 1_000_000
"""Numbers that a brace pattern may count."""
PIECE = 1 << 20
"""Characters of a JSON list read at a time."""
LONGEST_ITEM = 64 << 20
"""Characters that one item of a JSON list may take."""
LARGEST_MEMBER = 256 << 20
"""Bytes that one member of a shard may take."""
ROWS_PER_BATCH = 64
"""Rows with their images that an Arrow reader holds."""


class DataError(ValueError):
    """Data that cannot carry a run; the message names the path, what is wrong and the fix."""


class BadRow(Exception):
    """One unusable row: its problem in a word or two, the reason and the fix; its id where a reader knows one."""

    def __init__(self, problem: str, reason: str, fix: str, id: str = "") -> None:
        super().__init__(reason)
        self.problem, self.reason, self.fix, self.id = problem, reason, fix, id


@dataclass
class Reading:
    """How far a source has been read; who watches is told at each row."""

    watch: Callable[[Reading], None] | None = None
    rows: int = 0
    """Of all parts so far."""
    row: int = 0
    """Number of the latest row in its part."""
    _passed: float = 0.0
    _part: float = 1.0
    _of_part: Callable[[], float] | None = None

    @property
    def share(self) -> float | None:
        """Of the whole source, by bytes; None where that is unknown."""
        if self._of_part:
            return self._passed + self._part * self._of_part()
        return self._passed or None

    def enter(self, passed: float, part: float) -> None:
        """The next part: the shares of all bytes that lie before it, and that are its own."""
        self._passed, self._part, self._of_part = passed, part, None

    def follow(self, stream: IO[bytes]) -> None:
        """The part is read from this stream."""
        size = max(os.fstat(stream.fileno()).st_size, 1)
        self._of_part = lambda: stream.tell() / size

    def expect(self, rows: int) -> None:
        """The part has so many rows."""
        self._of_part = lambda: self.row / max(rows, 1)

    def at(self, row: int) -> None:
        """The reader has come to this row of its part."""
        self.row, self.rows = row, self.rows + 1
        if self.watch:
            self.watch(self)


Reader = Callable[[Path, Reading], Iterator[tuple[int, Any]]]
"""The protocol: (row number from 1, parsed row or BadRow) of a file, in order, holding a few rows at a time.

Raises DataError, naming file and fix, where the file as a whole cannot be read; no row is passed over in silence.
A reader says by what it is known how far it is: its stream, or the number of its rows. Every one passes
`tests/contract/test_readers.py`.
"""


@dataclass(frozen=True)
class Found:
    """A row where it stands. `part` is the shard that holds it, "" where the source is one file; `row` counts in it."""

    part: str
    row: int
    raw: Any


def found_rows(source: Path, reading: Reading | None = None) -> Iterator[Found]:
    """All rows of a source. Raises DataError where it, or one of its parts, cannot be read as a whole."""
    reading = reading or Reading()
    parts = [(part, path, path.stat().st_size if path.is_file() else 1) for part, path in parts_of(source)]
    passed, total = 0, max(sum(size for _, _, size in parts), 1)
    for part, path, size in parts:
        reading.enter(passed / total, size / total)
        for row, raw in _reader_of(path)(path, reading):
            reading.at(row)
            yield Found(part, row, raw)
        passed += size
    reading.enter(1.0, 0.0)


def _reader_of(path: Path) -> Reader:
    if is_hub(path):
        return hub_rows
    if path.is_dir():
        return saved_rows
    if suffix_of(path) not in READERS:
        raise DataError(f"{path}: unknown kind of file; use {', '.join(READERS)}, a saved datasets directory, a folder "
                        "or brace pattern of shards, or hub:OWNER/NAME")  # fmt: skip
    return READERS[suffix_of(path)]


# Sources.


def suffix_of(path: Path) -> str:
    """In lower case: cameras and Windows write .JPG and .JSONL."""
    return path.suffix.lower()


def is_hub(source: Path) -> bool:
    return str(source).startswith(HUB)


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `datasets`' save_to_disk."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def is_shard_folder(folder: Path) -> bool:
    """Whether an unlabeled folder is one of shards: with an image file in it, it is a folder of images."""
    files = [path for path in folder.rglob("*") if suffix_of(path) in (*SHARDS, *IMAGE_SUFFIXES)
             and not is_hidden(path, folder)]  # fmt: skip
    return bool(files) and all(suffix_of(path) in SHARDS for path in files)


def exists(source: Path) -> bool:
    """Whether a source is there; a hub is not asked."""
    return is_hub(source) or source.exists() or any(path.exists() for path in expand(source))


def default_root(source: Path) -> Path:
    """The folder that image names are relative to: the file's own, the shards' own. A hub's rows have none."""
    if is_hub(source) or (source.is_dir() and not is_saved(source)):
        return source
    fixed, brace, _ = str(source).partition("{")
    return Path(f"{fixed}x").parent if brace and not source.exists() else source.parent


def parts_of(source: Path) -> list[tuple[str, Path]]:
    """(name, path) of the files that make up a source, in order; the name is "" for a source of one file."""
    if is_hub(source) or source.is_file() or (source.is_dir() and is_saved(source)):
        return [("", source)]
    if source.is_dir():
        return [(str(path.relative_to(source)), path) for path in _shards_in(source)]
    paths = expand(source)
    missing = [path for path in paths if not path.is_file()]
    if missing:
        where = f"{source}: {len(missing)} of its {len(paths)} shards are missing, such as {missing[0]}"
        raise DataError(f"{where if len(paths) > 1 else f'{source}: no such file'}; correct the path")
    root = default_root(source)
    return [(str(path.relative_to(root)), path) for path in paths]


def _shards_in(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if suffix_of(path) in SHARDS and path.is_file()
                   and not is_hidden(path, folder))  # fmt: skip
    kinds = {suffix_of(path) for path in found}
    if len(kinds) != 1:
        held = "both .parquet and .tar shards" if kinds else "neither shards (.tar, .parquet) nor a saved dataset"
        raise DataError(f"{folder}: a folder with {held}; name a file of rows or a pattern such as "
                        "part-{000..009}.tar")  # fmt: skip
    return found


def pictures_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of a folder of images that may be pictures, and those that are none: hidden, or of another suffix."""
    files = sorted(file for file in folder.rglob("*") if file.is_symlink() or not file.is_dir())
    pictures = [file for file in files if not is_hidden(file, folder)
                and (not file.suffix or suffix_of(file) in (*IMAGE_SUFFIXES, *OTHER_PICTURES))]  # fmt: skip
    return pictures, sorted(set(files).difference(pictures))


def is_hidden(path: Path, folder: Path) -> bool:
    """Whether the name of a file, or of a folder on the way to it, begins with a dot."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def expand(pattern: Path) -> list[Path]:
    """Paths of a brace pattern: `{000..009}` counts with as many digits, `{a,b}` lists; itself without braces."""
    pieces = re.split(r"\{([^{}]*)\}", str(pattern))
    choices = [_choices(piece) if i % 2 else [piece] for i, piece in enumerate(pieces)]
    return [Path("".join(words)) for words in product(*choices)]


def _choices(inside: str) -> list[str]:
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if not bounds:
        return inside.split(",")
    first, last = bounds.groups()
    if int(last) - int(first) >= MOST_SHARDS:
        raise DataError(f"{{{inside}}}: counts more than {MOST_SHARDS:,} shards; correct the pattern")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


# JSON.


def line_rows(file: Path, reading: Reading) -> Iterator[tuple[int, Any]]:
    """One JSON object a line; the row number is the line's, blank lines are no rows."""
    with file.open("rb") as stream:
        reading.follow(stream)
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield number, _json_row(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line)


def _json_row(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow("encoding", f"not UTF-8 (byte {error.start} of the row)", "save the file as UTF-8")
    except (ValueError, RecursionError) as error:
        return BadRow("json", f"malformed JSON: {error}", "write one JSON object a line")


def json_rows(file: Path, reading: Reading) -> Iterator[tuple[int, Any]]:
    """The items of one big list, or, where the file does not begin with one, its lines."""
    with file.open("rb") as stream:
        is_list = stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    return _list_rows(file, reading) if is_list else line_rows(file, reading)


def _list_rows(file: Path, reading: Reading) -> Iterator[tuple[int, Any]]:
    """Broken JSON inside a list cannot be skipped: DataError."""
    with file.open("rb") as stream:
        reading.follow(stream)
        text, number = _JsonText(file, stream), 0
        text.take("[")
        while text.next_sign() != "]":
            number += 1
            yield number, text.item()
            if text.next_sign() != "]" and not text.take(","):
                raise text.broken("it breaks off or lacks a comma")
        text.take("]")
        if text.next_sign():
            raise text.broken("something follows the end of the list")


@dataclass
class _JsonText:
    """The text of a JSON file, read as far as the next item needs it."""

    file: Path
    stream: IO[bytes]
    text: str = ""
    at: int = 0
    passed: int = 0
    """Characters before `text`."""
    ended: bool = False

    def __post_init__(self) -> None:
        # Bytes that are no UTF-8 become lone surrogates here and reject their own row only, where it is parsed.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._json = json.JSONDecoder()
        self._grow()
        self.at = len(self.text) - len(self.text.removeprefix("\ufeff"))

    def _grow(self) -> None:
        """Read on, at least as much as is unread: an item that takes n reads is scanned 2n characters in all."""
        content = self.stream.read(max(PIECE, len(self.text) - self.at))
        self.ended = not content
        self.passed += self.at
        self.text, self.at = self.text[self.at :] + self._decoder.decode(content, final=self.ended), 0

    def next_sign(self) -> str:
        """The next character that is no white space, "" at the end; it stays."""
        while True:
            while self.text[self.at : self.at + 1] in (" ", "\n", "\r", "\t"):
                self.at += 1
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._grow()

    def take(self, sign: str) -> bool:
        found = self.next_sign() == sign
        self.at += found
        return found

    def item(self) -> Any:
        while True:
            try:
                item, end = self._json.raw_decode(self.text, self.at)
                if end < len(self.text) or self.ended:  # a number goes on behind the end of what was read
                    self.at = end
                    return item
            except RecursionError as error:
                raise self.broken(str(error)) from None
            except ValueError as error:
                if self.ended or len(self.text) - self.at > LONGEST_ITEM:
                    raise self.broken(f"malformed JSON, {getattr(error, 'msg', error)}") from None
            self._grow()

    def broken(self, why: str) -> DataError:
        return DataError(f"{self.file}: {why}, in the item at character {self.passed + self.at}; repair the JSON list "
                         "or write one object a line (JSONL), where a broken line costs that line only")  # fmt: skip


# Arrow.


def parquet_rows(file: Path, reading: Reading) -> Iterator[tuple[int, Any]]:
    """Rows of a Parquet file; images stay bytes or names, so that only our own image code opens them."""
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            reading.expect(table.metadata.num_rows)
            yield from enumerate(_arrow_rows(table.iter_batches(ROWS_PER_BATCH)), 1)
    except Exception as error:  # the library raises whatever its readers meet
        raise DataError(f"{file}: unreadable Parquet ({_short(error)}); write it again") from None


def saved_rows(directory: Path, reading: Reading) -> Iterator[tuple[int, Any]]:
    """Rows of a saved `datasets` directory, undecoded."""
    import datasets

    try:
        data = datasets.load_from_disk(str(directory))
        if isinstance(data, datasets.DatasetDict):
            raise DataError(f"{directory}: holds the splits {', '.join(data)}; name one of their folders")
        reading.expect(len(data))
        yield from enumerate(_arrow_rows(data.with_format("arrow").iter(ROWS_PER_BATCH)), 1)
    except DataError:
        raise
    except Exception as error:  # the library raises whatever its readers meet
        raise DataError(f"{directory}: unreadable datasets directory ({_short(error)}); save it again") from None


def _arrow_rows(batches: Any) -> Iterator[Any]:
    for batch in batches:
        batch.validate(full=True)  # damaged offsets would be read outside the file's memory
        yield from batch.to_pylist()


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


# The hub.


def hub_rows(source: Path, reading: Reading) -> Iterator[tuple[int, Any]]:
    """Rows of `hub:OWNER/NAME[/CONFIG][@REVISION][:SPLIT]` as they arrive, undecoded; the split is train. How many will
    come is not known."""
    owner_and_name, config, revision, split = hub_parts(source)
    try:
        yield from enumerate(streamed(owner_and_name, config, revision, split), 1)
    except Exception as error:  # network, hub, formats and features: all errors of their own kinds
        raise _unreachable(source, error) from None


def streamed(name: str, config: str | None, revision: str | None, split: str) -> Iterator[Any]:
    """Rows of what `datasets` knows under a name; code that comes with data is never run."""
    import datasets

    data = datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)
    yield from data.decode(False)


def hub_parts(source: Path) -> tuple[str, str | None, str | None, str]:
    """(owner/name, config, revision, split). Raises DataError for another form."""
    form = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?:@([\w./-]+))?(?::([\w.-]+))?", str(source))
    if not form:
        raise DataError(f"{source}: write hub:OWNER/NAME, with /CONFIG, @REVISION and :SPLIT behind it where needed")
    name, config, revision, split = form.groups()
    return name, config, revision, split or "train"


def hub_commit(source: Path) -> str:
    """The commit that a hub's data set stands at. Raises DataError where the hub does not say."""
    from huggingface_hub import HfApi

    name, _, revision, _ = hub_parts(source)
    try:
        return str(HfApi().dataset_info(name, revision=revision).sha)
    except Exception as error:  # no network, offline mode, no such data set, no right to see it
        raise _unreachable(source, error) from None


def _unreachable(source: Path, error: Exception) -> DataError:
    return DataError(f"{source}: the hub did not give it ({type(error).__name__}: {_short(error)}); where no hub is "
                     "reachable, download the data set elsewhere and name its folder")  # fmt: skip


# WebDataset shards.


def shard_rows(file: Path, reading: Reading) -> Iterator[tuple[int, Any]]:
    """Rows of a .tar shard: neighbouring members whose paths agree up to the name's first dot make up one row.

    Raises DataError where the archive breaks off or goes on behind its end: the rows there would be lost in silence.
    """
    import tarfile

    try:
        with file.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            reading.follow(stream)
            for number, (key, members) in enumerate(groupby(_members(tar), lambda member: member.key), 1):
                yield number, _shard_row(f"{file.stem}/{key}", key, list(members))
            _check_end(stream, tar.offset)
    except Exception as error:  # damaged headers make it raise half a dozen kinds
        raise DataError(f"{file}: unreadable shard ({_short(error)}); get or write it again") from None


@dataclass(frozen=True)
class _Member:
    """One file of a shard. `name` is what follows the key's dot; only contents of use are read."""

    key: str
    name: str
    content: bytes = b""
    problem: str = ""

    @property
    def is_image(self) -> bool:
        return self.name.rpartition(".")[2] in IMAGE_ENDINGS


def _members(tar: tarfile.TarFile) -> Iterator[_Member]:
    behind = 0
    while (info := tar.next()) is not None:
        if not behind <= info.offset or info.size < 0:
            raise ValueError(f"member {info.name!r:.80} has an impossible size")
        behind, tar.members = info.offset_data, []  # type: ignore[attr-defined] # or it would remember them all
        if not info.isdir():
            yield _member(tar, info)


def _member(tar: tarfile.TarFile, info: tarfile.TarInfo) -> _Member:
    folder, slash, base = info.name.rpartition("/")
    stem, _, name = base.partition(".")
    member = _Member(folder + slash + stem, name.lower())
    if not info.isreg() or info.issparse():
        return _Member(member.key, member.name, problem="is no plain file (links are not followed)")
    if not member.is_image and member.name not in ("json", "txt"):
        return member
    if info.size > LARGEST_MEMBER:
        return _Member(member.key, member.name, problem=f"has {info.size:,} bytes, more than {LARGEST_MEMBER:,}")
    opened = tar.extractfile(info)
    content = opened.read() if opened else b""
    if len(content) != info.size:
        raise ValueError(f"member {info.name!r:.80} is cut")
    return _Member(member.key, member.name, content)


def _check_end(stream: IO[bytes], offset: int) -> None:
    """`tarfile` takes a damaged header, or the end of a torn file, for the end of the archive."""
    stream.seek(offset)
    end = stream.read(512)
    if len(end) < 512 or any(end):
        raise ValueError(f"it breaks off at byte {offset}")
    while rest := stream.read(PIECE):
        if any(rest):
            raise ValueError(f"it goes on behind its end at byte {offset}")


def _shard_row(id: str, key: str, members: list[_Member]) -> Any:
    """A row as another format would hold it: `json` is the row, `txt` a caption, image members are its images."""
    try:
        return {"id": id, **_row_of(key, members)}
    except BadRow as bad:
        return BadRow(bad.problem, bad.reason, bad.fix, id)


def _row_of(key: str, members: list[_Member]) -> dict[str, Any]:
    for member in members:
        if member.problem:
            raise BadRow("member", f"member {key}.{member.name} {member.problem}", "write it as a file of its own")
    named = {member.name: member for member in members}
    if len(named) < len(members):
        raise BadRow("member", f"{key} has two members of the same name", "give each member its own name")
    images = [member for member in members if member.is_image]
    row = _json_object(key, named["json"].content) if "json" in named else {}
    if not images and not row:
        held = ", ".join(named) or "nothing"
        raise BadRow("member", f"{key} holds {held}; no image, no json", "add the row's .json and image files")
    worded = any(row.get(name) is not None for name in ("conversations", "conversation", "messages", "question"))
    caption = None if worded else _caption(key, row, named.get("txt"), len(images))
    return {**row, **(caption or {}), **_shard_images(key, row, images)}


def _json_object(key: str, content: bytes) -> dict[str, Any]:
    row = _json_row(content)
    if isinstance(row, BadRow):
        raise BadRow(row.problem, f"{key}.json: {row.reason}", "write one JSON object")
    if not isinstance(row, dict):
        raise BadRow("keys", f"{key}.json holds a {type(row).__name__}, not an object", "write {...} with its keys")
    return row


def _caption(key: str, row: dict[str, Any], text: _Member | None, images: int) -> dict[str, Any] | None:
    """The turns of an image with a caption (`txt`, or `caption` in json); None where there is none."""
    if text is None:
        said = row.get("caption")
    else:
        try:
            said = text.content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRow("encoding", f"{key}.txt is not UTF-8 (byte {error.start})", "save it as UTF-8") from None
    if said is None or not images:
        return None
    asked = (IMAGE_PLACEHOLDER + "\n") * images + prompts.prompt("dd")
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}], "kind": "dd"}


def _shard_images(key: str, row: dict[str, Any], images: list[_Member]) -> dict[str, Any]:
    """The row's images: members of the shard alone, never files beside it.

    Where json names them, the names decide about their order; one name for one member needs no match.
    """
    _check_parts(key, row)
    values = [row[name] for name in ("images", "image") if row.get(name) not in NOTHING]
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    if len(names) > 1 or (names and len(images) != 1):
        known = {name: member.content for member in images for name in _names_of(key, member)}
        absent = [name for name in names if not isinstance(name, str) or name not in known]
        if absent:
            raise BadRow("image", f"{key}.json names image {absent[0]!r:.80}, which is no member of its group",
                         "put the image into the shard beside the json")  # fmt: skip
        return {"image": None, "images": [known[name] for name in names]}
    return {"image": None, "images": [member.content for member in images]}


def _check_parts(key: str, row: dict[str, Any]) -> None:
    """Raise BadRow where a part of a turn brings an image of its own: it would be a file beside the shard."""
    lists = [value for value in row.values() if isinstance(value, list)]
    turns: list[Iterable[Any]] = [turn.values() for turns in lists for turn in turns if isinstance(turn, dict)]
    turns += [column for value in row.values() if isinstance(value, dict) for column in value.values()
              if isinstance(column, list)]  # fmt: skip
    for part in (part for turn in turns for content in turn if isinstance(content, list) for part in content):
        shown = isinstance(part, dict) and part.get("type") in ("image", "image_url")
        if shown and any(part.get(name) is not None for name in ("image", "path", "url", "image_url", "bytes")):
            raise BadRow("image", f"{key}.json names an image in a part of a turn: {part!r:.80}", "put the image into "
                         "the shard beside the json, and write {\"type\": \"image\"} where it stands")  # fmt: skip


def _names_of(key: str, member: _Member) -> Iterator[str]:
    base = key.rpartition("/")[2]
    yield from (member.name, f"{base}.{member.name}", f"{key}.{member.name}")


READERS: dict[str, Reader] = {".json": json_rows, ".jsonl": line_rows, ".ndjson": line_rows, ".parquet": parquet_rows,
                              ".tar": shard_rows}  # fmt: skip
