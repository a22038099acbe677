"""Curation of any JSONL file of candidates, behind `sicog curate`.

A row is `{"id", "kind", "prompt", "image", "candidates": [...]}`. `kind` is caption or reasoning, or one of cod, dd,
cot, direct; `image` may be null, a question's `family` may be named; a candidate is a string, or an object with `text`
and optionally `kind`, `finish_reason`, and `logprob` with `tokens`, which a likelihood scorer needs. What cannot be
used is listed in `rejected.jsonl`: a bad row is set aside whole (`position` null), a bad candidate alone, its row goes
on with the others.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from sicog_exp.curation import CurationError
from sicog_exp.curation.curate import Tally, curate
from sicog_exp.curation.filters import infer_kind
from sicog_exp.curation.items import GROUPS, ITEM_KINDS, CandidateScore, Decision, Group, Item, Response, group_of
from sicog_exp.curation.selection import Judge, row_thresholds, threshold_of
from sicog_exp.curation.similarity import Encoder, build_encoder
from sicog_exp.prompts import CAPTION_KINDS, REASONING_KINDS, STEPS, Kind
from sicog_exp.recipe import CurationConfig
from sicog_exp.row_index import RowIndex

OUTPUTS = ("curated", "scores", "preferences", "rejected")
_NUMBERS = (int, float)  # made once: isinstance is called for every candidate
_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
"""One encoder for all rows, where `json.dumps` would make a new one for each."""


class _BadInput(ValueError):
    """A row or candidate that cannot be used: its reason and the fix."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(reason)
        self.reason, self.fix = reason, fix


def curate_file(candidates: Path, out: Path, config: CurationConfig, encoder: Encoder | None = None,
                upper_bound: Judge | None = None) -> dict[str, Any]:  # fmt: skip
    """Curate a file into the folder `out`; returns what it writes to `summary.json`. `encoder` is the one that the
    config names, where it has been built already.

    Writes `curated.jsonl` (a row per usable input row), `scores.jsonl` (a row per candidate), `preferences.jsonl`
    (chosen and rejected responses of kept items), `rejected.jsonl` and `summary.json`, together: a killed run leaves
    the files of an earlier one as they were. The same input and config give the same bytes. Raises CurationError,
    naming file and fix, when no row is usable, a file cannot be read or written, or the encoder cannot be used.
    `upper_bound` decides for `config.select` oracle and truth, which look at what no file of candidates holds.
    """
    candidates, out = Path(candidates), Path(out)
    encoder = encoder or build_encoder(config.encoder)
    try:
        with candidates.open("rb") as source, _Outputs(out) as outputs:
            reader, tally = _Reader(candidates.name, source, outputs.files["rejected"]), Tally()
            for decision in curate(reader.items(), config, encoder, upper_bound, out):
                tally.add(decision)
                _write_decision(outputs.files, decision)
            if not reader.usable:
                raise CurationError(_nothing_usable(candidates, reader))
            summary = {**reader.summary(), **tally.summary(), **_settings(config, tally)}
            outputs.publish(summary)
    except OSError as error:
        raise CurationError(f"{error.filename or candidates}: {error.strerror or error}; check the paths of the "
                            "candidates and of the output folder") from error  # fmt: skip
    return summary


class ItemsById(RowIndex):
    """The usable rows of a file of candidates, as `curate_file` takes them, read when they are asked for."""

    def __init__(self, candidates: Path) -> None:
        try:
            super().__init__([candidates])
        except OSError as error:
            raise CurationError(f"{candidates}: {error.strerror or error}; name the file that was curated") from error

    def _id_of(self, line: bytes) -> str:
        """"" of what is no row: no item has it."""
        try:
            found = super()._id_of(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            return ""
        return found if isinstance(found, str) else ""

    def get(self, id: str) -> Item | None:
        """None of an unknown id, and where no row of it can be used."""
        return next(_Reader(id, self.lines(id), io.StringIO()).items(), None)


def _settings(config: CurationConfig, tally: Tally) -> dict[str, Any]:
    """`thresholds`: the scores from which items were kept, by group."""
    by_score = config.threshold_by == "score"
    thresholds = {group: _lowest_threshold(config, group) if by_score else tally.lowest_kept(group) for group in GROUPS}
    return {"encoder": config.encoder, "thresholds": thresholds, "config": asdict(config)}


def _lowest_threshold(config: CurationConfig, group: Group) -> float:
    return min(row_thresholds(config, group).values(), default=threshold_of(config, group))


def _nothing_usable(path: Path, reader: _Reader) -> str:
    if not reader.rows:
        return f"{path}: the file is empty; write one JSON object a line with id, kind, prompt, image, candidates"
    return f"{path}: none of its {reader.rows} rows can be used; the first: {reader.first_problem}"


class _Outputs:
    """The output files, written beside their final names and renamed when all of them are whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.files: dict[str, IO[str]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> _Outputs:
        self._folder.mkdir(parents=True, exist_ok=True)
        for name in OUTPUTS:
            file = self._temporary(f"{name}.jsonl").open("w", encoding="utf-8", newline="\n")
            self.files[name] = self._stack.enter_context(file)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        for name in (*(f"{name}.jsonl" for name in OUTPUTS), "summary.json"):
            self._temporary(name).unlink(missing_ok=True)

    def _temporary(self, name: str) -> Path:
        return self._folder / f".{name}.part"  # one name, so that a killed run leaves nothing behind for good

    def publish(self, summary: dict[str, Any]) -> None:
        """Make all files visible, the summary last: where it is new, the others are."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        text = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False)
        self._temporary("summary.json").write_text(text + "\n", encoding="utf-8")
        for name in (*(f"{name}.jsonl" for name in OUTPUTS), "summary.json"):
            self._temporary(name).replace(self._folder / name)


def _write(file: IO[str], row: dict[str, Any]) -> None:
    file.write(_json(row) + "\n")


def _write_decision(files: dict[str, IO[str]], decision: Decision) -> None:
    item, chosen = decision.item, decision.chosen
    what = {"id": item.id, "kind": item.kind, "prompt": item.prompt, "image": item.image}
    texts = {"chosen": chosen.text if chosen else None}
    rejected = decision.rejected.text if decision.rejected else None
    verdict = {"score": decision.score, "kept": decision.kept, "reason": decision.reason, "rejected": rejected}
    kind = {"chosen_kind": chosen.kind if chosen else None}
    _write(files["curated"], {**what, **texts, **kind, **verdict, **_training(decision)})
    files["scores"].write(_score_lines(item.id, decision.candidates))
    if decision.kept and rejected is not None:
        pair = {"id": item.id, "prompt": item.prompt, "image": item.image, **texts, "rejected": rejected}
        _write(files["preferences"], pair)


def _training(decision: Decision) -> dict[str, Any]:
    """What differs from training on the chosen response whole, once, with its final text; usually nothing."""
    rows = {} if decision.rows is None else {"rows": [asdict(row) for row in decision.rows]}
    return rows if decision.weight is None else {**rows, "weight": decision.weight}


def _score_lines(id: str, candidates: Sequence[CandidateScore]) -> str:
    """A row of `scores.jsonl` for each. Spelt out, since there are more of them than of all other rows together; a
    hypothesis test holds the bytes to those of `_json`."""
    identity = _json(id)
    rows = [f'"position": {c.position}, "kind": {_word(c.kind)}, "score": {_number(c.score)}, '
            f'"reason": {_word(c.reason)}{_parts(c)}' for c in candidates]  # fmt: skip
    return "".join([f'{{"id": {identity}, {row}}}\n' for row in rows])


def _word(name: str | None) -> str:
    """A kind or a reason, which hold no sign that JSON escapes."""
    return "null" if name is None else f'"{name}"'


def _number(score: float | None) -> str:
    return repr(score) if score.__class__ is float and math.isfinite(score) else _json(score)


def _parts(c: CandidateScore) -> str:
    return "" if c.parts is None else f', "parts": {_json(c.parts)}'


@dataclass
class _Reader:
    """Items of a JSONL stream; what cannot be used goes to `rejected` and is counted."""

    name: str
    source: Iterable[bytes]
    rejected: IO[str]
    rows: int = 0
    usable: int = 0
    rejected_candidates: int = 0
    first_problem: str = ""
    _ids: set[str] = field(default_factory=set)

    def summary(self) -> dict[str, Any]:
        """rows = items + rejected_rows."""
        counts = {"rows": self.rows, "rejected_rows": self.rows - self.usable}
        return {"file": self.name, **counts, "rejected_candidates": self.rejected_candidates}

    def items(self) -> Iterator[Item]:
        """The usable rows. Blank lines are no rows; row numbers count lines from 1."""
        for number, line in enumerate(self.source, start=1):
            if not line.strip():
                continue
            self.rows += 1
            row: dict[str, Any] = {}
            try:
                row = _object_of(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
                self._check_id(row)
                item = self._item(row, number)
            except _BadInput as error:
                self._set_aside(number, row, None, error)
                continue
            self._ids.add(item.id)
            self.usable += 1
            yield item

    def _check_id(self, row: dict[str, Any]) -> None:
        _check_types(row)
        if row["id"] in self._ids:
            raise _BadInput(f"id {row['id']!r} occurs in an earlier row", "give every row an id of its own")

    def _item(self, row: dict[str, Any], number: int) -> Item:
        responses, invalid = [], []
        for position, value in enumerate(row["candidates"]):
            try:
                responses.append(_response(value, row["kind"], position))
            except _BadInput as error:
                self._set_aside(number, row, position, error)
                invalid.append(position)
        family = row.get("family")
        return Item(row["id"], row["kind"], row["prompt"], row["image"], tuple(responses), tuple(invalid),
                    family if isinstance(family, str) else "")  # fmt: skip

    def _set_aside(self, number: int, row: dict[str, Any], position: int | None, error: _BadInput) -> None:
        identity = row.get("id") if isinstance(row.get("id"), str) else None
        where = {"file": self.name, "row": number, "id": identity, "position": position}
        _write(self.rejected, {**where, "reason": error.reason, "fix": error.fix})
        self.first_problem = self.first_problem or f"row {number}: {error.reason}; {error.fix}"
        self.rejected_candidates += position is not None


def _object_of(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
        if b"\\u" in line:  # an escaped half of a surrogate pair is valid JSON and no text: it cannot be written
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise _BadInput(f"not UTF-8 (byte {error.start} of the line)", "save the file as UTF-8") from None
    except UnicodeEncodeError:
        raise _BadInput("an escaped surrogate without its other half", "write the text as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise _BadInput(f"not JSON ({error})", "write one whole JSON object a line") from None
    if not isinstance(row, dict):
        raise _BadInput(f"a JSON {type(row).__name__}, not an object", "write one JSON object a line")
    return row


def _check_types(row: dict[str, Any]) -> None:
    wanted: dict[str, type | tuple[type, ...]] = {
        "id": str,
        "kind": str,
        "prompt": str,
        "image": (str, type(None)),
        "candidates": list,
    }
    missing = [key for key in wanted if key not in row]
    if missing:
        raise _BadInput(f"missing {', '.join(missing)}", "add the missing keys (image may be null)")
    for key, types in wanted.items():
        if not isinstance(row[key], types):
            allowed = {"image": "a string or null", "candidates": "a list"}.get(key, "a string")
            raise _BadInput(f"{key} is a {type(row[key]).__name__}", f"make {key} {allowed}")
    if not row["id"]:
        raise _BadInput("empty id", "give every row an id of its own")
    if row["kind"] not in ITEM_KINDS:
        raise _BadInput(f"unknown kind {row['kind']!r}", f"use one of {', '.join(ITEM_KINDS)}")


def _response(value: Any, item_kind: str, position: int) -> Response:
    if isinstance(value, str):
        return Response(value, _kind_of(value, item_kind), position)
    if not isinstance(value, dict):
        raise _BadInput(f"the candidate is a {type(value).__name__}", "write a string or an object with text")
    text, finish = value.get("text"), value.get("finish_reason")
    if not isinstance(text, str):
        keys = ", ".join(sorted(value)[:5]) or "none"
        raise _BadInput(f"the candidate has no text (keys: {keys})", "an error is no response: sample it again")
    if finish is not None and not isinstance(finish, str):
        raise _BadInput(f"finish_reason is a {type(finish).__name__}", "write stop, length or null")
    kind, likely = value.get("kind"), _mean_logprob(value)
    if kind is None:
        return Response(text, _kind_of(text, item_kind), position, finish, likely)
    allowed = CAPTION_KINDS if group_of(item_kind) == "caption" else REASONING_KINDS
    if kind not in allowed:
        raise _BadInput(f"kind {kind!r} in an item of kind {item_kind}", f"use {' or '.join(allowed)}")
    return Response(text, kind, position, finish, likely)


def _mean_logprob(value: dict[str, Any]) -> float | None:
    """Per token; None where either number is missing or none. Only a likelihood scorer minds."""
    total, tokens = value.get("logprob"), value.get("tokens")
    if isinstance(total, _NUMBERS) and isinstance(tokens, int) and tokens > 0 and math.isfinite(total):
        return total / tokens
    return None


def _kind_of(text: str, item_kind: str) -> Kind:
    """An item that says cod or cot wants steps of every candidate; else the text shows its kind."""
    structured: dict[str, Kind] = {"cod": "cod", "cot": "cot"}
    assert structured.keys() == STEPS.keys()
    return structured.get(item_kind) or infer_kind(text, group_of(item_kind))
