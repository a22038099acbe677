"""Users' files, read row by row: what is usable becomes a record, what is not is set aside with reason and fix.

Accepted: LLaVA-style rows (`conversations`) and chat rows (`messages`), as JSON (a list), JSONL, Parquet or a
saved `datasets` directory; and, for unlabeled images, a plain folder or rows of `image` and `question`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sicog_exp import prompts
from sicog_exp.data.images import ImageError, ImageFolder
from sicog_exp.records import IMAGE_PLACEHOLDER, Message, Record, RecordError, user, write_jsonl

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SHORT_ANSWER_WORDS = 12
"""A longer response to a prompt without a question mark counts as a detailed description."""
SET_ASIDE = ("repeated", "held out")
"""Problems of usable rows that are left out on purpose; they don't count against `max_bad_share`."""


class DataError(ValueError):
    """Data that cannot carry a run; the message names the path, what is wrong and the fix."""


class BadRow(Exception):
    """One unusable row: its problem in a word or two, the reason and the fix."""

    def __init__(self, problem: str, reason: str, fix: str) -> None:
        super().__init__(reason)
        self.problem, self.reason, self.fix = problem, reason, fix


@dataclass(frozen=True)
class Rejection:
    """A row set aside. `row` counts from 1: the line of a JSONL file, else the position in the list or folder."""

    file: str
    row: int
    id: str
    problem: str
    reason: str
    fix: str


@dataclass
class Intake:
    """What became of the rows of every file: rows set aside, and counts of the others."""

    rejected: list[Rejection] = field(default_factory=list)
    read: Counter[str] = field(default_factory=Counter)
    """Rows or files looked at, by source."""
    unused: Counter[str] = field(default_factory=Counter)
    """Rows or files beyond the wanted number of images, by source."""
    reworded: Counter[str] = field(default_factory=Counter)
    """Rows whose prompt was replaced by the prompt table's wording, by source."""
    origin: dict[tuple[str, str], int] = field(default_factory=dict)
    """(record's source, id) -> row in its file."""

    def reject(self, file: Path, row: int, id: object, bad: BadRow) -> None:
        texts = (_printable(text) for text in (str(file), str(id or ""), bad.reason))
        name, shown, reason = texts
        self.rejected.append(Rejection(name, row, shown, bad.problem, reason, bad.fix))

    def bad(self, file: Path) -> list[Rejection]:
        """The unusable rows of one file."""
        name = _printable(str(file))
        return [row for row in self.rejected if row.file == name and row.problem not in SET_ASIDE]

    def check(self, file: Path, max_bad_share: float, listing: Path) -> None:
        """Raise DataError when a file has no row, no usable row, or too large a share of unusable ones."""
        read, bad = self.read[_printable(str(file))], self.bad(file)
        if not read:
            raise DataError(f"{file}: holds no rows or images; name a file or folder that does")
        if len(bad) == read or len(bad) > max_bad_share * read:
            self.write(listing)
            first = "".join(f"\n  row {r.row} ({r.id or 'no id'}): {r.reason}; {r.fix}" for r in bad[:3])
            raise DataError(f"{file}: {len(bad)} of {read} rows are unusable (data.max_bad_share={max_bad_share}); "
                            f"all are listed in {listing}. The first:{first}")  # fmt: skip

    def write(self, listing: Path) -> None:
        write_jsonl(listing, (asdict(row) for row in self.rejected))


def _printable(text: str, limit: int = 300) -> str:
    """Text that UTF-8 can hold, cut to a length a log line bears."""
    return text.encode("utf-8", "replace").decode()[:limit]


# Rows of a file, whatever its format.


def raw_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """(row number from 1, parsed row or the BadRow that it is) of a file or a saved `datasets` directory.

    Raises DataError where the file as a whole cannot be read.
    """
    if file.is_dir():
        return enumerate(_saved_dataset_rows(file), 1)
    if not file.is_file():
        raise DataError(f"{file}: no such file; correct the path in the recipe")
    if file.suffix == ".parquet":
        return enumerate(_parquet_rows(file), 1)
    if file.suffix not in (".json", ".jsonl", ".ndjson"):
        raise DataError(f"{file}: unknown kind of file; use .json, .jsonl, .parquet or a saved datasets directory")
    return enumerate(_list_rows(file), 1) if _is_list(file) else _line_rows(file)


def _is_list(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[") and file.suffix == ".json"


def _line_rows(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield number, _json_row(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)


def _json_row(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow("encoding", f"not UTF-8 (byte {error.start} of the row)", "save the file as UTF-8")
    except (ValueError, RecursionError) as error:
        return BadRow("json", f"malformed JSON: {error}", "write one JSON object a line")


def _list_rows(file: Path) -> Iterator[Any]:
    """The items of one big JSON list, parsed one at a time. Broken JSON inside cannot be skipped: DataError."""
    # Bytes that are no UTF-8 become lone surrogates here and reject their own row only, in `_text`.
    text = file.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    decoder, position = json.JSONDecoder(), _skip(text, text.index("[") + 1)
    while text[position : position + 1] != "]":
        try:
            item, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}: malformed JSON: {error}; repair the list or write one object a line (JSONL), "
                            "where a broken line costs that line only") from None  # fmt: skip
        yield item
        position = _skip(text, position)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "]":
            raise DataError(f"{file}: the JSON list breaks off or lacks a comma at character {position}; repair it")


def _skip(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\n", "\r", "\t"):
        position += 1
    return position


def _parquet_rows(file: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(256):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: unreadable Parquet ({error}); write it again") from None


def _saved_dataset_rows(directory: Path) -> Iterator[Any]:
    """Rows without decoding: images stay bytes or paths, so that only our own image code opens them."""
    if not any((directory / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise DataError(f"{directory}: a folder, but no saved datasets directory; name a file of rows")
    import datasets

    try:
        data = datasets.load_from_disk(str(directory))
    except Exception as error:  # the library raises whatever its readers meet
        raise DataError(f"{directory}: unreadable datasets directory ({error}); save it again") from None
    if isinstance(data, datasets.DatasetDict):
        raise DataError(f"{directory}: holds the splits {', '.join(data)}; name one of their folders")
    for table in data.with_format("arrow").iter(256):
        yield from table.to_pylist()


# One row.


@dataclass(frozen=True)
class Row:
    """A row's contents, checked for form; its images are names or a file's bytes, not opened yet."""

    id: str
    messages: tuple[Message, ...]
    images: tuple[str | bytes, ...]
    kind: str | None
    family: str


def parse_row(raw: Any, default_id: str) -> Row:
    """A LLaVA or chat row. Raises BadRow for missing keys, wrong types and text that is no UTF-8."""
    if not isinstance(raw, dict):
        raise BadRow("keys", f"the row is a {type(raw).__name__}, not an object", "write {...} with its keys")
    turns, embedded = _turns(raw)
    images = _images(raw)
    if embedded and images:
        raise BadRow("keys", "images both in content parts and in an image column", "keep one of the two")
    kind, family = (_optional_text(raw, key) for key in ("kind", "family"))
    if kind and kind not in prompts.KINDS:
        raise BadRow("keys", f"unknown kind {kind!r}", f"use one of {', '.join(prompts.KINDS)} or leave it out")
    return Row(_id(raw, default_id), turns, images or embedded, kind or None, family)


def _id(raw: dict[str, Any], default: str) -> str:
    value = raw.get("id")
    if value is None or value == "":
        return default
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRow("keys", f"id is a {type(value).__name__}", "make it a string")
    return _text(str(value), "id")


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise BadRow("keys", f"{what} is {'missing' if value is None else type(value).__name__}", "make it a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow("encoding", f"{what} is not UTF-8", "save the file as UTF-8") from None
    return value


def _optional_text(raw: dict[str, Any], key: str) -> str:
    return _text(raw[key], key) if raw.get(key) is not None else ""


def _turns(raw: dict[str, Any]) -> tuple[tuple[Message, ...], tuple[str | bytes, ...]]:
    """Messages, and the images named inside their content parts."""
    named = {key: raw[key] for key in ("conversations", "messages") if raw.get(key) is not None}
    if len(named) != 1:
        state = "both conversations and messages" if named else "neither conversations nor messages"
        raise BadRow("keys", f"the row has {state}", "write one of them")
    key, turns = next(iter(named.items()))
    if not isinstance(turns, list) or not turns:
        raise BadRow("keys", f"{key} is no list of turns", "write a list of turns")
    speaker, words = ("from", "value") if key == "conversations" else ("role", "content")
    messages, images = [], []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise BadRow("keys", f"{key}[{i}] is no object", f"write {{{speaker!r}: ..., {words!r}: ...}}")
        content, inside = _content(turn.get(words), f"{key}[{i}].{words}")
        messages.append(Message(_role(turn.get(speaker), f"{key}[{i}].{speaker}"), content))  # type: ignore[arg-type]
        images += inside
    return tuple(messages), tuple(images)


def _role(value: Any, where: str) -> str:
    if not isinstance(value, str) or value not in ROLES:
        raise BadRow("roles", f"{where} is {value!r}", f"use one of {', '.join(ROLES)}")
    return ROLES[value]


def _content(value: Any, where: str) -> tuple[str, list[str | bytes]]:
    """A turn's text with `<image>` where a part is an image, and the images that parts name."""
    if not isinstance(value, list):
        return _text(value, where), []
    texts, images = [], []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(_text(part.get("text"), f"{where}[{i}].text"))
        elif kind in ("image", "image_url"):
            texts.append(IMAGE_PLACEHOLDER)
            images += _part_images(part, f"{where}[{i}]")
        else:
            raise BadRow("keys", f"{where}[{i}] has type {kind!r}", "use text or image parts")
    return "\n".join(texts), images


def _part_images(part: dict[str, Any], where: str) -> list[str | bytes]:
    values = [part[key] for key in ("image", "path", "url", "image_url", "bytes") if part.get(key) is not None]
    return [_image(value, where) for value in values]


def _images(raw: dict[str, Any]) -> tuple[str | bytes, ...]:
    values = [raw[key] for key in ("images", "image") if raw.get(key) is not None]
    if len(values) > 1:
        raise BadRow("keys", "the row has both image and images", "write one of them")
    items = values[0] if values and isinstance(values[0], list) else values
    return tuple(_image(item, "image") for item in items)


def _image(value: Any, where: str) -> str | bytes:
    """A name or a file's bytes, also in the shapes of `datasets` ({bytes, path}) and chat services ({url})."""
    if isinstance(value, dict):
        value = next((value[key] for key in ("bytes", "path", "url") if value.get(key) is not None), None)
    return value if isinstance(value, bytes) else _text(value, where)


def check_placeholders(row: Row) -> None:
    """Raise BadRow unless the messages hold exactly one `<image>` per image; where it belongs is never guessed."""
    marks, images = sum(message.content.count(IMAGE_PLACEHOLDER) for message in row.messages), len(row.images)
    if marks < images:
        fix = f"write {IMAGE_PLACEHOLDER} in the user's message where each image belongs"
        raise BadRow("placeholder", f"{images} images but {marks} {IMAGE_PLACEHOLDER}", fix)
    if marks > images:
        fix = f"name the missing image or remove the {IMAGE_PLACEHOLDER}"
        raise BadRow("placeholder", f"{marks} {IMAGE_PLACEHOLDER} but {images} images", fix)


def make_record(row: Row, root: Path, folder: ImageFolder, source: str) -> Record:
    """The record of an annotated row, its images copied. Raises BadRow."""
    check_placeholders(row)
    _check_turns(row.messages)
    images = tuple(_add(folder, root, image) for image in row.images)
    kind = row.kind or infer_kind(row.messages, images)
    try:
        return Record(row.id, _canonical(row.messages, kind), images, kind, source, row.family)  # type: ignore[arg-type]
    except RecordError as error:
        reason, _, fix = str(error).partition("; ")
        raise BadRow("roles", reason, fix or "correct the row") from None


def _add(folder: ImageFolder, root: Path, image: str | bytes) -> str:
    try:
        return folder.add(root, image)
    except ImageError as error:
        raise BadRow("image", error.reason, error.fix) from None


def _check_turns(messages: tuple[Message, ...]) -> None:
    for message in messages:
        if message.role == "assistant" and not message.content.strip():
            raise BadRow("response", "empty response", "write the answer or remove the row")
        if message.role == "user" and not message.content.strip():
            raise BadRow("response", "empty prompt", "write the prompt or remove the row")
    if messages[-1].role != "assistant":
        raise BadRow("response", "no response after the last prompt", "write the answer or remove the row")


def words_of(message: Message) -> str:
    """A user's words without the image placeholders."""
    return message.content.replace(IMAGE_PLACEHOLDER, "").strip()


def infer_kind(messages: tuple[Message, ...], images: tuple[str, ...]) -> prompts.Kind:
    """The data kind of an annotated row that doesn't name its own, from its last prompt and response."""
    if not images:
        return "text"
    response, asked = messages[-1].content, words_of(messages[-2]) if len(messages) > 1 else ""
    for kind in ("cod", "cot"):
        if prompts.steps_of(kind, response) is not None:  # type: ignore[arg-type]
            return kind  # type: ignore[return-value]
    long = len(response.split()) > SHORT_ANSWER_WORDS
    return "dd" if asked == prompts.prompt("dd") or (long and "?" not in asked) else "direct"


def _canonical(messages: tuple[Message, ...], kind: str) -> tuple[Message, ...]:
    """A single-turn image row in the prompt table's wording, which generation and evaluation will use too.

    Left as written: conversations, long answers to a question, and text with an image in its middle.
    """
    if kind == "text" or len(messages) != 2 or messages[0].role != "user":
        return messages
    marks, words = messages[0].content.count(IMAGE_PLACEHOLDER), words_of(messages[0])
    plain = words in messages[0].content  # an image in the middle breaks the words apart
    long = kind == "direct" and len(messages[1].content.split()) > SHORT_ANSWER_WORDS
    if not marks or not plain or long or (kind in prompts.REASONING_KINDS and not words):
        return messages
    asked = prompts.prompt(kind, prompts.question_of(kind, words))  # type: ignore[arg-type]
    return user(asked, marks), messages[1]


# Whole sources.

T = TypeVar("T")


def _each(file: Path, intake: Intake, make: Callable[[Any, int], T]) -> Iterator[T]:
    """`make(raw, row number)` of every row of a file; rows that raise BadRow are set aside."""
    for number, raw in raw_rows(file):
        intake.read[_printable(str(file))] += 1
        try:
            if isinstance(raw, BadRow):
                raise raw
            yield make(raw, number)
        except BadRow as bad:
            intake.reject(file, number, raw.get("id") if isinstance(raw, dict) else "", bad)


def read_annotated(file: Path, root: Path, folder: ImageFolder, intake: Intake,
                   source: str = "annotated") -> Iterator[Record]:  # fmt: skip
    """Records with responses from a user's file; bad rows go to `intake`, whose `check` the caller runs.

    Raises DataError where the file as a whole cannot be read.
    """
    seen: dict[str, int] = {}

    def make(raw: Any, number: int) -> Record:
        row = parse_row(raw, f"{file.stem}-{number:06d}")
        if row.id in seen:
            raise BadRow("id", f"id {row.id!r} stands in row {seen[row.id]} too", "give each row its own id")
        record = make_record(row, root, folder, source)
        seen[row.id] = intake.origin[source, row.id] = number
        intake.reworded[_printable(str(file))] += record.messages != row.messages
        return record

    return _each(file, intake, make)


@dataclass(frozen=True)
class Request:
    """One unlabeled image, or one question about it. `answer`, where the row had one, is kept for diagnosis and
    upper bounds alone."""

    image: str
    question: str = ""
    answer: str = ""
    family: str = ""
    file: Path = Path()
    row: int = 0


def read_unlabeled(path: Path, root: Path, folder: ImageFolder, intake: Intake,
                   limit: int = 0, seed: int = 0) -> Iterator[Request]:  # fmt: skip
    """Requests from a folder of images or a file of rows with images and optionally questions.

    `limit` (0 for all) bounds the images: a seeded choice of a folder's files, the first ones of a file of rows.
    Raises DataError where the path as a whole cannot be read.
    """
    saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    if path.is_dir() and not saved:
        return _read_folder(path, folder, intake, limit, seed)
    return _read_requests(path, root, folder, intake, limit)


def _read_folder(path: Path, folder: ImageFolder, intake: Intake, limit: int, seed: int) -> Iterator[Request]:
    import numpy as np

    files = sorted(file for file in path.rglob("*") if file.is_symlink() or not file.is_dir())
    if not files:
        raise DataError(f"{path}: the folder is empty; name a folder of images")
    if 0 < limit < len(files):
        intake.unused[_printable(str(path))] += len(files) - limit
        files = [files[i] for i in sorted(np.random.default_rng(seed).permutation(len(files))[:limit])]
    seen: dict[str, Path] = {}
    for number, file in enumerate(files, 1):
        intake.read[_printable(str(path))] += 1
        name = str(file.relative_to(path))
        try:
            image = _add(folder, path, name)
            if image in seen:
                raise BadRow("repeated", f"image {name!r} shows the same as {str(seen[image])!r}", "nothing to do")
        except BadRow as bad:
            intake.reject(path, number, name, bad)
            continue
        seen[image] = Path(name)
        yield Request(image, file=path, row=number)


def _read_requests(path: Path, root: Path, folder: ImageFolder, intake: Intake, limit: int) -> Iterator[Request]:
    seen: dict[tuple[str, str], int] = {}
    opened: dict[str | bytes, str] = {}

    def make(raw: Any, number: int) -> Request | None:
        row = parse_row(as_chat(raw), f"{path.stem}-{number:06d}")
        question, answer = _question(row)
        if row.images[0] not in opened and 0 < limit <= len(set(opened.values())):
            intake.unused[_printable(str(path))] += 1
            return None
        image = opened[row.images[0]] = _add(folder, root, row.images[0])
        if (image, question) in seen:
            reason = f"the same image and question stand in row {seen[image, question]} too"
            raise BadRow("repeated", reason, "nothing to do")
        seen[image, question] = number
        return Request(image, question, answer, row.family, path, number)

    return (request for request in _each(path, intake, make) if request is not None)


def as_chat(raw: Any) -> Any:
    """A row of `image` and optional `question` and `answer` as a chat row; other rows unchanged."""
    if not isinstance(raw, dict) or any(raw.get(key) is not None for key in ("conversations", "messages")):
        return raw
    turns = [{"role": "user", "content": f"{IMAGE_PLACEHOLDER}\n{_optional_text(raw, 'question')}"}]
    if raw.get("answer") is not None:
        turns.append({"role": "assistant", "content": _optional_text(raw, "answer")})
    return {**raw, "messages": turns}


def _question(row: Row) -> tuple[str, str]:
    """(question, answer) of an unlabeled row, either may be empty. Raises BadRow for other shapes."""
    check_placeholders(row)
    roles = [message.role for message in row.messages if message.role != "system"]
    if len(row.images) != 1:
        raise BadRow("image", f"{len(row.images)} images in an unlabeled row", "name exactly one image")
    if roles not in (["user"], ["user", "assistant"]):
        raise BadRow("roles", f"turns {roles} in an unlabeled row", "write one question per row")
    asked = next(words_of(message) for message in row.messages if message.role == "user")
    for kind in prompts.REASONING_KINDS:
        asked = prompts.question_of(kind, asked)
    caption = row.kind in prompts.CAPTION_KINDS or asked in (prompts.prompt("cod"), prompts.prompt("dd"))
    return "" if caption else asked, row.messages[-1].content if roles[-1] == "assistant" else ""
