"""The candidate pool of an iteration: sampled batch by batch, one atomic shard each, merged into one file.

A killed generation continues with the batches whose shard is missing or damaged; the merged file has the same bytes
whatever was resumed, and holds every requested candidate exactly once or is not written at all. Requests whose prompt
the model cannot carry have none and are listed in `rejected.jsonl` beside it. Memory holds a batch, and of every
request where it stands: about 130 bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sicog_exp.generation.engine import Decoding, Engine, Refusal, Request, Sampled
from sicog_exp.generation.request_file import RequestFile
from sicog_exp.generation.requests import Batches, Key, keys_of, pool_order
from sicog_exp.records import RecordError, candidate_from, candidate_row
from sicog_exp.store import REJECTED, Progress

COSTS = ("prompt_tokens", "seconds", "image_tokens", "encoded_tokens")
"""What a batch cost, as its shard keeps it."""
UNSETTLED = -1


class PoolError(RuntimeError):
    """A pool that does not hold every requested candidate exactly once."""


class PoolEngine(Engine, Protocol):
    """What a pool needs of an engine beyond sampling. `busy_seconds` is the time for which its callers waited,
    `refusals_last` whether a prompt that it refused is not asked again."""

    busy_seconds: float
    refusals_last: bool

    def plan(self, requests: Sequence[Request], decoding: Decoding) -> Batches:
        """The batches of `sample`."""
        ...

    def sample_batches(self, batches: Sequence[Sequence[Request]], decoding: Decoding) -> Iterator[Sampled]:
        """Any batches of a plan, finished in their order."""
        ...


def generate_pool(engine: PoolEngine, requests: Iterable[Request], decoding: Decoding, scratch: Path, out: Path,
                  progress: Progress | None = None) -> dict[str, Any]:  # fmt: skip
    """Sample `requests` into the file `out` (`candidates.jsonl`), by way of shards in `scratch`.

    `scratch` belongs to one model, set of requests and decoding: shards that answer other requests are drawn again,
    but another model's cannot be told. Returns candidates, seconds, the tokens of all kinds, and the requests refused.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    with RequestFile(requests, scratch) as asked:
        order = pool_order(asked)
        if not len(asked):
            raise PoolError("nothing to sample: no request was given; check the unlabeled data and the candidate "
                            "counts")  # fmt: skip
        shards = _Shards(engine.plan(asked, decoding), len(asked), decoding, scratch)
        total = sum(request.count for request in asked)
        tell = progress or (lambda done, total: None)
        missing = []
        for number in range(len(shards.batches)):
            if shards.find(number, engine.refusals_last):
                tell(shards.settled, total)
            else:
                missing.append(number)
        drawn = engine.sample_batches(shards.batches.only(missing), decoding)
        for number, sampled in zip(missing, drawn, strict=True):
            shards.write(number, sampled)
            tell(shards.settled, total)
        shards.merge(order, out)
    return shards.facts


class _Shards:
    """The files of finished batches. What is remembered of them: how many bytes each request's lines take, in the order
    of the plan's requests, and sums."""

    def __init__(self, batches: Batches, requests: int, decoding: Decoding, folder: Path) -> None:
        self.batches, self.settled = batches, 0
        self._decoding, self._folder = decoding, folder
        self._sizes: NDArray[np.int64] = np.full(requests, UNSETTLED)
        self._refused: dict[int, Refusal] = {}
        self._sums: dict[str, Any] = dict.fromkeys(("candidates", "new_tokens", *COSTS), 0)

    @property
    def facts(self) -> dict[str, Any]:
        """What the pool holds and what it cost; `rejected` only where a request was refused."""
        return {**self._sums, **({"rejected": len(self._refused)} if self._refused else {})}

    def find(self, number: int, refusals_last: bool) -> bool:
        """Whether a batch was finished before; not where its shard is damaged or answers something else, or holds
        refusals that do not last."""
        path = self._path(number)
        if not path.exists():
            return False
        batch = self.batches[number]
        try:
            head, *lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            header = json.loads(head)
            if header["asked"] != _digest(batch, self._decoding) or header["content"] != _checksum(lines):
                return False
            candidates = [candidate_from(json.loads(line)) for line in lines]
            refused = tuple(Refusal(*row) for row in header.get("refused", ()))
            sampled = Sampled(candidates, **{name: header[name] for name in COSTS}, refused=refused)
            found = [candidate.key for candidate in candidates] == list(_wanted(batch, sampled))
            found = found and (refusals_last or not refused)
        except (ValueError, KeyError, TypeError, RecordError):
            return False
        if found:
            self._note(number, batch, sampled, lines)
        return found

    def write(self, number: int, sampled: Sampled) -> None:
        """A finished batch as a file: what was asked (as a digest), what it cost, what came out, in the order asked."""
        batch = self.batches[number]
        wanted = list(_wanted(batch, sampled))
        _check_complete(wanted, Counter(candidate.key for candidate in sampled.candidates))
        made = {candidate.key: candidate for candidate in sampled.candidates}
        lines = [_line(candidate_row(made[key])) for key in wanted]
        header = {"asked": _digest(batch, self._decoding), **{name: getattr(sampled, name) for name in COSTS}}
        if sampled.refused:
            header["refused"] = [astuple(refusal) for refusal in sampled.refused]
        with _whole_file(self._path(number)) as file:
            file.writelines(line.encode() for line in (_line({**header, "content": _checksum(lines)}), *lines))
        self._note(number, batch, sampled, lines)

    def merge(self, order: NDArray[np.int64], out: Path) -> None:
        """All candidates in one file, in this order of their requests; shard after shard, each line at its place."""
        unsettled = int((self._sizes == UNSETTLED).sum())
        if unsettled:
            raise PoolError(f"{unsettled} of {len(order)} requests are in no batch of the engine's plan")
        if not self._sums["candidates"]:
            first = min(self._refused.values(), key=lambda refusal: refusal.key)
            raise PoolError(f"none of {len(order)} prompts can be put to this model: sample {first.sample_id!r}, say: "
                            f"{first.reason}")  # fmt: skip
        starts = np.empty_like(self._sizes)
        starts[order] = np.cumsum(self._sizes[order]) - self._sizes[order]
        with _whole_file(out) as file:
            for number in range(len(self.batches)):
                self._place(number, starts, file)
        if self._refused:
            with _whole_file(out.with_name(REJECTED)) as file:
                file.writelines(_line(_rejected_row(row)).encode() for _, row in sorted(self._refused.items()))

    def _place(self, number: int, starts: NDArray[np.int64], file: IO[bytes]) -> None:
        with self._path(number).open("rb") as shard:
            shard.readline()
            for position in self.batches.positions(number):
                file.seek(int(starts[position]))
                file.write(shard.read(int(self._sizes[position])))

    def _note(self, number: int, batch: Sequence[Request], sampled: Sampled, lines: Iterable[str]) -> None:
        refused, rest = {refusal.key: refusal for refusal in sampled.refused}, iter(lines)
        for position, request in zip(self.batches.positions(number), batch, strict=True):
            refusal = refused.get(next(keys_of(request)))
            if refusal:
                self._refused[position] = refusal
            self._sizes[position] = 0 if refusal else sum(len(next(rest)) for _ in range(request.count))
            self.settled += request.count
        self._sums["candidates"] += len(sampled.candidates)
        self._sums["new_tokens"] += sum(candidate.tokens for candidate in sampled.candidates)
        for name in COSTS:
            self._sums[name] += getattr(sampled, name)

    def _path(self, number: int) -> Path:
        return self._folder / f"batch-{number:05d}.jsonl"


def _wanted(batch: Sequence[Request], sampled: Sampled) -> Iterator[Key]:
    """The candidates that a finished batch must hold, in their order."""
    refused = {refusal.key for refusal in sampled.refused}
    for request in batch:
        if next(keys_of(request)) not in refused:
            yield from keys_of(request)


def _check_complete(wanted: Sequence[Key], counts: Mapping[Key, int]) -> None:
    problems = {
        "missing": [key for key in wanted if key not in counts],
        "doubled": [key for key, times in counts.items() if times > 1],
        "not requested": list(counts.keys() - set(wanted)),
    }
    shown = [f"{len(keys)} {what}, such as {min(keys)}" for what, keys in problems.items() if keys]
    if shown:
        raise PoolError(f"of {len(wanted)} requested candidates: {'; '.join(shown)}")


def _rejected_row(refusal: Refusal) -> dict[str, Any]:
    return {"id": refusal.sample_id, "kind": refusal.kind, "reason": refusal.reason}


def _digest(batch: Sequence[Request], decoding: Decoding) -> str:
    """What a shard answers. Images count by name alone: a pool moved with its data is still the same."""
    asked = [[*keys_of(r), [asdict(m) for m in r.messages], [path.name for path in r.images]] for r in batch]
    return hashlib.sha256(json.dumps([asked, asdict(decoding)], sort_keys=True).encode()).hexdigest()


def _checksum(lines: Sequence[str]) -> str:
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _line(row: dict[str, Any]) -> str:
    # ASCII, so that no character inside a text (U+2028, say) is taken for the end of a line, and a line's length is
    # its bytes
    return json.dumps(row, allow_nan=False) + "\n"


@contextmanager
def _whole_file(path: Path) -> Iterator[IO[bytes]]:
    """The whole file or none of it, whenever the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")  # one name, so that a killed write leaves nothing behind for good
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
