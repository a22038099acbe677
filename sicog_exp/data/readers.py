"""Users' files, read row by row: what is usable becomes a record, what is not is set aside with reason and fix.

Accepted: LLaVA-style and ShareGPT rows (`conversations`) and chat rows (`messages`), in every format of
`data/formats.py`; and, for unlabeled images, a plain folder or rows of `image` and `question`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from sicog_exp import prompts
from sicog_exp.data.formats import (
    NOTHING,
    BadRow,
    DataError,
    Found,
    Reading,
    found_rows,
    is_hidden,
    is_hub,
    is_saved,
    is_shard_folder,
    pictures_in,
    suffix_of,
)
from sicog_exp.data.images import ImageError, Images
from sicog_exp.records import IMAGE_PLACEHOLDER, Message, Record, RecordError, user, write_jsonl

TURNS = ("conversations", "conversation", "messages")
SPEAKERS, WORDS = ("from", "role"), ("value", "content", "text")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
         "model": "assistant", "bot": "assistant", "system": "system"}  # fmt: skip
UNREAD = {"video": "show frames as images", "videos": "show frames as images",
          "audio": "write down what is said", "audios": "write down what is said",
          "tools": "remove the tools, and the turns that call them"}  # fmt: skip
"""Keys that change what a row means and that no model here is shown -> the fix."""
FOREIGN_MARK = re.compile(r"<img>.*?</img>|<(video|audio)>(?!.*</\1>)", re.DOTALL)
"""How other formats show something inside a user's words; HTML has an end."""
SHORT_ANSWER_WORDS = 12
"""A longer response to a prompt without a question mark counts as a detailed description."""
SET_ASIDE = ("repeated", "held out")
"""Problems of usable rows that are left out on purpose; they don't count against `max_bad_share`."""


__all__ = ["BadRow", "DataError", "Intake", "Rejection", "Request", "read_annotated", "read_unlabeled"]


@dataclass(frozen=True)
class Rejection:
    """A row set aside. `row` counts from 1: the line of a JSONL file, else the position in the list, shard or folder.

    `part` is the shard that holds the row, "" where the file is one.
    """

    file: str
    row: int
    id: str
    problem: str
    reason: str
    fix: str
    part: str = ""


@dataclass
class Intake:
    """What became of the rows of every file: rows set aside, and counts of the others."""

    rejected: list[Rejection] = field(default_factory=list)
    read: Counter[str] = field(default_factory=Counter)
    """Rows or files looked at, by source."""
    unused: Counter[str] = field(default_factory=Counter)
    """Rows or files beyond the wanted number of images, by source."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """Files in a folder of images that are none, by their suffix, or as hidden."""
    reworded: Counter[str] = field(default_factory=Counter)
    """Rows whose prompt was replaced by the prompt table's wording, by source."""
    renamed: Counter[str] = field(default_factory=Counter)
    """Rows whose id other rows have too, and which got a number behind it, by source."""
    reading: Reading = field(default_factory=Reading)
    """How far the source is, whose rows are being looked at."""
    origin: dict[tuple[str, str], tuple[str, int]] = field(default_factory=dict)
    """(record's source, id) -> part and row of its file."""

    def reject(self, file: Path, place: tuple[str, int], id: object, bad: BadRow) -> None:
        """Set aside the row at `place`: its part of the file ("" for the only one) and its number there."""
        texts = (_printable(text) for text in (str(file), str(id or ""), bad.reason, place[0]))
        name, shown, reason, part = texts
        self.rejected.append(Rejection(name, place[1], shown, bad.problem, reason, bad.fix, part))

    def bad(self, file: Path) -> list[Rejection]:
        """The unusable rows of one file."""
        name = _printable(str(file))
        return [row for row in self.rejected if row.file == name and row.problem not in SET_ASIDE]

    def check(self, file: Path, max_bad_share: float, listing: Path) -> None:
        """Raise DataError when a file has no row, no usable row, or too large a share of unusable ones."""
        read, bad = self.read[_printable(str(file))], self.bad(file)
        if not read:
            raise no_rows(file)
        if len(bad) == read or len(bad) > max_bad_share * read:
            self.write(listing)
            first = "".join(f"\n  {_place(r.part, r.row)} ({r.id or 'no id'}): {r.reason}; {r.fix}" for r in bad[:3])
            raise DataError(f"{file}: {len(bad)} of {read} rows are unusable (data.max_bad_share={max_bad_share}); "
                            f"all are listed in {listing}. The first:{first}")  # fmt: skip

    def write(self, listing: Path) -> None:
        rows = (asdict(row) for row in self.rejected)
        write_jsonl(listing, ({k: v for k, v in row.items() if v or k != "part"} for row in rows))


def no_rows(file: Path) -> DataError:
    """What is raised for a source in which there is nothing to read."""
    return DataError(f"{file}: holds no rows or images; name a file or folder that does")


def _place(part: str, row: int) -> str:
    return f"row {row} of {part}" if part else f"row {row}"


def _printable(text: str, limit: int = 300) -> str:
    """Text that UTF-8 can hold, cut to a length a log line bears."""
    return text.encode("utf-8", "replace").decode()[:limit]


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
    _check_keys(raw)
    turns, embedded = _turns(raw)
    images = _images(raw)
    if embedded and images:
        raise BadRow("keys", "images both in content parts and in an image column", "keep one of the two")
    kind, family = (_optional_text(raw, key) for key in ("kind", "family"))
    if kind and kind not in prompts.KINDS:
        raise BadRow("keys", f"unknown kind {kind!r}", f"use one of {', '.join(prompts.KINDS)} or leave it out")
    _check_marks(turns)
    images = images or embedded
    return Row(_id(raw, default_id), _in_front(turns) if len(images) == 1 else turns, images, kind or None, family)


def _check_keys(raw: dict[str, Any]) -> None:
    for key, fix in UNREAD.items():
        if raw.get(key) and raw[key] != "[]":  # some write tools as text
            raise BadRow("keys", f"the row has {key}, which no model here is shown", fix)


def _check_marks(turns: tuple[Message, ...]) -> None:
    """A mark that is not ours would train as plain words, and what it shows would be lost."""
    for mark in (FOREIGN_MARK.search(turn.content) for turn in turns if turn.role == "user"):
        if mark:
            fix = UNREAD[mark[1]] if mark[1] else f"write {IMAGE_PLACEHOLDER} there and name the file under image"
            raise BadRow("placeholder", f"{mark[0]!r:.80} in a user's words shows nothing here", fix)


def _in_front(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """A row's only image in front of the turn that shows it, as in sampling and evaluation, and as LLaVA's own training
    code puts it; one in the middle of the words stays, since they may speak of its place."""
    return tuple(user(words_of(turn), 1) if _is_out_of_place(turn) else turn for turn in turns)


def _is_out_of_place(turn: Message) -> bool:
    """Whether an image stands behind a user's words, or white space in front of it."""
    shows = turn.role == "user" and IMAGE_PLACEHOLDER in turn.content
    return shows and not turn.content.startswith(IMAGE_PLACEHOLDER) and words_of(turn) in turn.content


def _id(raw: dict[str, Any], default: str) -> str:
    value = raw.get("id")
    return default if value is None or value == "" else _text(value, "id")


def _text(value: Any, what: str) -> str:
    text = value if isinstance(value, str) else _spelled(value)
    if text is None:
        raise BadRow("keys", f"{what} is {'missing' if value is None else type(value).__name__}", "make it a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow("encoding", f"{what} is not UTF-8", "save the file as UTF-8") from None
    return text


def _spelled(value: Any) -> str | None:
    """A number as text, a whole one without the .0 that tables give it; None for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return str(int(value) if value == int(value) else value)


def _optional_text(raw: dict[str, Any], key: str) -> str:
    return _text(raw[key], key) if raw.get(key) is not None else ""


def _turns(raw: dict[str, Any]) -> tuple[tuple[Message, ...], tuple[str | bytes, ...]]:
    """Messages, and the images named inside their content parts."""
    named = {key: raw[key] for key in TURNS if raw.get(key) is not None}
    if len(named) != 1:
        state = f"both {' and '.join(named)}" if named else "neither conversations nor messages"
        raise BadRow("keys", f"the row has {state}", "write one of them")
    key, turns = next(iter(named.items()))
    messages, images = _system(raw), []
    for i, turn in enumerate(_listed(key, turns)):
        if not isinstance(turn, dict):
            raise BadRow("keys", f"{key}[{i}] is no object", "write {'from': ..., 'value': ...} or role and content")
        speaker, words = (_one_of(turn, names, f"{key}[{i}]") for names in (SPEAKERS, WORDS))
        content, inside = _content(turn.get(words), f"{key}[{i}].{words}")
        messages.append(Message(_role(turn.get(speaker), f"{key}[{i}].{speaker}"), content))  # type: ignore[arg-type]
        images += inside
    return tuple(messages), tuple(images)


def _listed(key: str, turns: Any) -> list[Any]:
    """Turns as a list; a sequence of objects in Parquet may come as one object of lists."""
    if isinstance(turns, dict) and turns and all(isinstance(column, list) for column in turns.values()):
        lengths = {len(column) for column in turns.values()}
        turns = [dict(zip(turns, row)) for row in zip(*turns.values())] if len(lengths) == 1 else None
    if not isinstance(turns, list) or not turns:
        raise BadRow("keys", f"{key} is no list of turns", "write a list of turns")
    return turns


def _system(raw: dict[str, Any]) -> list[Message]:
    """ShareGPT rows may keep the system message beside the turns."""
    text = _optional_text(raw, "system")
    return [Message("system", text)] if text else []


def _one_of(turn: dict[str, Any], names: tuple[str, ...], where: str) -> str:
    """Which of the names a turn uses; the first one where it uses none."""
    used = [name for name in names if turn.get(name) is not None]
    if len(used) > 1:
        raise BadRow("keys", f"{where} has both {' and '.join(used)}", "write one of them")
    return used[0] if used else names[0]


def _role(value: Any, where: str) -> str:
    role = ROLES.get(value.strip().lower()) if isinstance(value, str) else None
    if role is None:
        raise BadRow("roles", f"{where} is {value!r}", f"use one of {', '.join(ROLES)}")
    return role


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
    values = [raw[key] for key in ("images", "image") if raw.get(key) not in NOTHING]
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


def make_record(row: Row, root: Path, folder: Images, source: str) -> Record:
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


def _add(folder: Images, root: Path, image: str | bytes) -> str:
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


def _each(file: Path, intake: Intake, make: Callable[[Any, Found], T]) -> Iterator[T]:
    """`make(raw, found)` of every row of a source; rows that raise BadRow are set aside."""
    for found in found_rows(file, intake.reading):
        intake.read[_printable(str(file))] += 1
        raw = found.raw
        try:
            if isinstance(raw, BadRow):
                raise raw
            yield make(raw, found)
        except BadRow as bad:
            id = raw.get("id") if isinstance(raw, dict) else bad.id
            intake.reject(file, (found.part, found.row), id, bad)


def _default_id(file: Path, found: Found) -> str:
    return f"{Path(found.part).stem if found.part else file.stem}-{found.row:06d}"


class _Ids:
    """Ids of the records made from one source. LLaVA's own files give one id to several rows: it names the image."""

    def __init__(self) -> None:
        self._used: Counter[str] = Counter()
        self._content: dict[int, tuple[str, int]] = {}

    def free(self, row: Row) -> str:
        """The row's id, with a number behind it where other rows have it. Raises BadRow where one says the same."""
        same = self._content.get(hash(row))
        if same:
            raise BadRow("repeated", f"the same row stands in {_place(*same)} too", "nothing to do")
        if row.id not in self._used:
            return row.id
        number = self._used[row.id] + 1
        while f"{row.id}#{number}" in self._used:
            number += 1
        return f"{row.id}#{number}"

    def take(self, row: Row, id: str, found: Found) -> None:
        self._content[hash(row)] = found.part, found.row
        self._used[row.id] += 1
        self._used[id] += id != row.id


def read_annotated(file: Path, root: Path, folder: Images, intake: Intake,
                   source: str = "annotated") -> Iterator[Record]:  # fmt: skip
    """Records with responses from a user's source; bad rows go to `intake`, whose `check` the caller runs.

    Raises DataError where the source as a whole cannot be read.
    """
    ids = _Ids()

    def make(raw: Any, found: Found) -> Record:
        row = parse_row(raw, _default_id(file, found))
        id = ids.free(row)
        record = make_record(replace(row, id=id), root, folder, source)
        ids.take(row, id, found)
        intake.origin[source, id] = found.part, found.row
        intake.reworded[_printable(str(file))] += record.messages != row.messages
        intake.renamed[_printable(str(file))] += id != row.id
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
    place: tuple[str, int] = "", 0
    """Part and row of the file."""


def read_unlabeled(path: Path, root: Path, folder: Images, intake: Intake,
                   limit: int = 0, seed: int = 0) -> Iterator[Request]:  # fmt: skip
    """Requests from a folder of images or a source of rows with images and optionally questions.

    `limit` (0 for all) bounds the images: a seeded choice of a folder's files, the first ones of a source of rows.
    Raises DataError where the path as a whole cannot be read.
    """
    if holds_images(path):
        return _read_folder(path, folder, intake, limit, seed)
    return _read_requests(path, root, folder, intake, limit)


def holds_images(path: Path) -> bool:
    """Whether an unlabeled source is a plain folder of images, and not one of rows."""
    return not is_hub(path) and path.is_dir() and not is_saved(path) and not is_shard_folder(path)


def _read_folder(path: Path, folder: Images, intake: Intake, limit: int, seed: int) -> Iterator[Request]:
    import numpy as np

    files, others = pictures_in(path)
    if not files:
        held = f"none of its {len(others)} files is a picture" if others else "the folder is empty"
        raise DataError(f"{path}: {held}; name a folder of images")
    intake.passed_over.update("hidden" if is_hidden(file, path) else suffix_of(file) for file in others)
    if 0 < limit < len(files):
        intake.unused[_printable(str(path))] += len(files) - limit
        files = [files[i] for i in sorted(np.random.default_rng(seed).permutation(len(files))[:limit])]
    seen: dict[str, Path] = {}
    intake.reading.expect(len(files))
    for number, file in enumerate(files, 1):
        intake.reading.at(number)
        intake.read[_printable(str(path))] += 1
        name = str(file.relative_to(path))
        try:
            image = _add(folder, path, name)
            if image in seen:
                raise BadRow("repeated", f"image {name!r} shows the same as {str(seen[image])!r}", "nothing to do")
        except BadRow as bad:
            intake.reject(path, ("", number), name, bad)
            continue
        seen[image] = Path(name)
        yield Request(image, place=("", number))


def _read_requests(path: Path, root: Path, folder: Images, intake: Intake, limit: int) -> Iterator[Request]:
    seen: dict[int, tuple[str, int]] = {}
    named: set[str | bytes] = set()
    opened: set[str] = set()

    def make(raw: Any, found: Found) -> Request | None:
        row = parse_row(as_chat(raw), _default_id(path, found))
        question, answer = _question(row)
        name = row.images[0] if isinstance(row.images[0], str) else hashlib.sha256(row.images[0]).digest()
        if name not in named and 0 < limit <= len(opened):
            intake.unused[_printable(str(path))] += 1
            return None
        image = _add(folder, root, row.images[0])
        named.add(name)
        opened.add(image)
        place, asked = (found.part, found.row), hash((image, question))
        if asked in seen:
            reason = f"the same image and question stand in {_place(*seen[asked])} too"
            raise BadRow("repeated", reason, "nothing to do")
        seen[asked] = place
        return Request(image, question, answer, row.family, place)

    return (request for request in _each(path, intake, make) if request is not None)


def as_chat(raw: Any) -> Any:
    """A row of `image` and optional `question` and `answer` as a chat row; other rows unchanged."""
    if not isinstance(raw, dict) or any(raw.get(key) is not None for key in TURNS):
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
