"""Records (training and evaluation examples) and candidates (sampled outputs): typed, validated, stored.

Records are Parquet (read with `datasets.load_dataset("parquet", ...)` or pyarrow), candidates JSONL keyed by
(sample id, kind, index). Both are validated when made, so what is on disk was valid.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from sicog_exp.prompts import KINDS, Kind

IMAGE_PLACEHOLDER = "<image>"
ROWS_PER_GROUP = 16_384
"""Records that are written together: a row group of Parquet."""
ROWS_READ = 1024
"""Records that are read together."""


class RecordError(ValueError):
    """A record or candidate that breaks its contract; the message names what is wrong and the fix."""


@dataclass(frozen=True)
class Message:
    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Record:
    """One example. `images` are paths relative to the data root; `<image>` marks each one's place in the messages.

    `family` is a question family where the source knows one, `source` says where the record comes from
    (annotated, self, instruction, text, ...). The last assistant message may be missing: an unlabeled record.
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[str, ...]
    kind: Kind
    source: str
    family: str = ""

    def __post_init__(self) -> None:
        if not self.id:
            raise RecordError("empty id; give every record a unique id")
        if self.kind not in KINDS:
            raise RecordError(f"unknown kind {self.kind!r}; use one of {', '.join(KINDS)}")
        self._check_roles()
        placeholders = sum(message.content.count(IMAGE_PLACEHOLDER) for message in self.messages)
        if placeholders != len(self.images):
            raise RecordError(f"{placeholders} {IMAGE_PLACEHOLDER} placeholders for {len(self.images)} images; "
                              "write one placeholder per image")  # fmt: skip

    def _check_roles(self) -> None:
        turns = [m.role for m in self.messages if m.role != "system"]
        expected = ["user" if i % 2 == 0 else "assistant" for i in range(len(turns))]
        if not turns or turns != expected:
            raise RecordError(f"roles {turns}; messages must alternate user, assistant, ... starting with user")
        for message in self.messages:
            if message.role == "assistant" and not message.content.strip():
                raise RecordError("empty response; remove the record or write its answer")
            if message.role == "system" and message is not self.messages[0]:
                raise RecordError("a system message after the first message; put it in front")
            if message.role != "user" and IMAGE_PLACEHOLDER in message.content:
                raise RecordError(f"{IMAGE_PLACEHOLDER} in a {message.role} message; images belong to the user")

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages up to the last assistant turn."""
        return self.messages[:-1] if self.messages[-1].role == "assistant" else self.messages

    @property
    def response(self) -> str | None:
        """The last assistant turn; None for an unlabeled record."""
        return self.messages[-1].content if self.messages[-1].role == "assistant" else None


def user(text: str, images: int = 0) -> Message:
    """A user's message with its images in front, as everywhere in this project."""
    return Message("user", (IMAGE_PLACEHOLDER + "\n") * images + text)


def conversation(prompt_text: str, response: str | None, images: tuple[str, ...]) -> tuple[Message, ...]:
    first = (user(prompt_text, len(images)),)
    return first if response is None else (*first, Message("assistant", response))


def turns_conversation(turns: Sequence[tuple[str, str]], images: int) -> tuple[Message, ...]:
    """(question, answer) turns as one conversation, its images in front."""
    pairs = ((user(asked, 0 if i else images), Message("assistant", answer)) for i, (asked, answer) in enumerate(turns))
    return tuple(message for pair in pairs for message in pair)


@dataclass(frozen=True)
class Candidate:
    """One sampled output. `logprob` is the sum over its `tokens` new tokens, in nats, of the untempered model; None
    where an engine cannot say it."""

    sample_id: str
    kind: Kind
    index: int
    text: str
    seed: int
    logprob: float | None
    tokens: int
    finish_reason: Literal["stop", "length"]

    def __post_init__(self) -> None:
        if not self.sample_id or self.kind not in KINDS or self.index < 0:
            raise RecordError(f"candidate {self.key}: needs a sample id, a kind of {', '.join(KINDS)}, an index")
        if not isinstance(self.text, str) or self.finish_reason not in ("stop", "length"):
            raise RecordError(f"candidate {self.key}: text {self.text!r:.80}, finish reason {self.finish_reason!r}; "
                              "an engine must give a string and stop or length")  # fmt: skip
        if not math.isfinite(self.logprob or 0.0) or self.tokens < 0:
            raise RecordError(f"candidate {self.key}: logprob {self.logprob}, {self.tokens} tokens; needs a finite "
                              "number and 0 or more")  # fmt: skip

    @property
    def key(self) -> tuple[str, str, int]:
        return self.sample_id, self.kind, self.index


def _flat(record: Record) -> dict[str, Any]:
    """By hand: `asdict` copies every part, and made up most of the time of writing."""
    messages = [{"role": message.role, "content": message.content} for message in record.messages]
    return {"id": record.id, "messages": messages, "images": list(record.images), "kind": record.kind,
            "source": record.source, "family": record.family}  # fmt: skip


def record_from(row: dict[str, Any]) -> Record:
    messages = tuple(Message(m["role"], m["content"]) for m in row["messages"])
    return Record(row["id"], messages, tuple(row["images"]), row["kind"], row["source"], row.get("family") or "")


def write_records(path: Path, records: Iterable[Record]) -> int:
    """Write Parquet as the records come; raise on a doubled id. Returns the number of rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema([("id", pa.string()), ("messages", pa.list_(message)), ("images", pa.list_(pa.string())),
                        ("kind", pa.string()), ("source", pa.string()), ("family", pa.string())])  # fmt: skip
    rows = _unique(path, map(_flat, records))
    count = 0
    try:
        with pq.ParquetWriter(path, schema) as writer:
            for batch in iter(lambda: list(islice(rows, ROWS_PER_GROUP)), []):
                writer.write_table(pa.Table.from_pylist(batch, schema=schema))
                count += len(batch)
            if not count:
                writer.write_table(schema.empty_table())
    except BaseException:
        path.unlink(missing_ok=True)  # what was written so far would read as a whole file
        raise
    return count


def _unique(path: Path, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    for row in rows:
        if row["id"] in seen:
            raise RecordError(f"{path.name}: id {row['id']!r} occurs more than once; ids must be unique")
        seen.add(row["id"])
        yield row


class RecordFile:
    """The records of a Parquet file, read as a stream each time they are walked through."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        import pyarrow.parquet as pq

        return pq.read_metadata(self.path).num_rows

    def __iter__(self) -> Iterator[Record]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.path) as file:
            for batch in file.iter_batches(ROWS_READ):
                yield from map(record_from, batch.to_pylist())


class RecordsById:
    """Records found by id on a walk through them that goes on from the last one found.

    Ids asked for in the order of the records cost one walk, and one record is held; out of order, each may cost one.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self._records = records
        self._ahead = iter(records)
        self._last: Record | None = None

    def __getitem__(self, id: str) -> Record:
        if self._last is None or self._last.id != id:
            self._last = self._find(id) or self._find_from_start(id)
        return self._last

    def _find(self, id: str) -> Record | None:
        return next((record for record in self._ahead if record.id == id), None)

    def _find_from_start(self, id: str) -> Record:
        self._ahead = iter(self._records)
        found = self._find(id)
        if found is None:
            raise KeyError(id)
        return found


def read_records(path: Path) -> list[Record]:
    """All records of a file at once; a large one is better walked through (`RecordFile`)."""
    return list(RecordFile(path))


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL file that this project wrote (users' files go through `data.sources`)."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def candidate_row(candidate: Candidate) -> dict[str, Any]:
    return {field.name: getattr(candidate, field.name) for field in fields(Candidate)}


def candidate_from(row: dict[str, Any]) -> Candidate:
    return Candidate(**row)
