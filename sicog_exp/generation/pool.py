"""The candidate pool of an iteration: sampled batch by batch, one atomic shard each, merged into one file.

A killed generation continues with the batches whose shard is missing or damaged; the merged file has the same bytes
whatever was resumed, and holds every requested candidate exactly once or is not written at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Protocol

from sicog_exp.generation.engine import Decoding, Engine, Request, Sampled
from sicog_exp.generation.requests import Key, check_requests, keys_of
from sicog_exp.records import Candidate, RecordError, candidate_from, candidate_row

Progress = Callable[[int, int], None]
"""Called with (candidates present, candidates requested) after each batch, sampled or found."""
COSTS = ("prompt_tokens", "seconds", "image_tokens", "encoded_tokens")
"""What a batch cost, as its shard keeps it."""


class PoolError(RuntimeError):
    """A pool that does not hold every requested candidate exactly once."""


class PoolEngine(Engine, Protocol):
    """What a pool needs of an engine beyond sampling. `busy_seconds` is the time for which its callers waited."""

    busy_seconds: float

    def plan(self, requests: Sequence[Request], decoding: Decoding) -> list[list[Request]]:
        """The batches of `sample`."""
        ...

    def sample_batches(self, batches: Sequence[Sequence[Request]], decoding: Decoding) -> Iterator[Sampled]:
        """Any batches of a plan, finished in their order."""
        ...


def generate_pool(engine: PoolEngine, requests: Sequence[Request], decoding: Decoding, scratch: Path, out: Path,
                  progress: Progress | None = None) -> dict[str, Any]:  # fmt: skip
    """Sample `requests` into the file `out` (`candidates.jsonl`), by way of shards in `scratch`.

    `scratch` belongs to one model, set of requests and decoding: shards that answer other requests are drawn again,
    but another model's cannot be told. Requests and keys of candidates are held, and the texts of one batch. Returns
    samples, candidates, seconds, and the tokens of all kinds.
    """
    check_requests(requests)
    if not requests:
        raise PoolError("nothing to sample: no request was given; check the unlabeled data and the candidate counts")
    scratch.mkdir(parents=True, exist_ok=True)
    batches = engine.plan(requests, decoding)
    paths = [scratch / f"batch-{number:05d}.jsonl" for number in range(len(batches))]
    found = [_facts_of(_read_shard(path, _digest(batch, decoding))) for path, batch in zip(paths, batches, strict=True)]
    missing = [batch for batch, facts in zip(batches, found, strict=True) if not facts]
    sampled = engine.sample_batches(missing, decoding)
    total, done = sum(request.count for request in requests), 0
    for number, (path, batch) in enumerate(zip(paths, batches, strict=True)):
        facts = found[number] or _facts_of(_write_shard(path, batch, decoding, next(sampled)))
        found[number] = facts
        done += facts["candidates"]
        if progress:
            progress(done, total)
    merge(requests, (candidate for path in paths for candidate in _candidates(path)), out)
    facts = {name: sum(facts[name] for facts in found) for name in ("candidates", "new_tokens", *COSTS)}
    return {"samples": len({request.sample_id for request in requests}), **facts}


def merge(requests: Sequence[Request], candidates: Iterable[Candidate], out: Path) -> int:
    """Write all candidates in the order of requests, kinds and indices. Raises PoolError unless each occurs once.

    Keys are held, and where each candidate stands in a nameless file beside `out`; what it says is not.
    """
    wanted = [key for request in requests for key in keys_of(request)]
    places: dict[Key, int] = {}
    counts: Counter[Key] = Counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=out.parent) as waiting:
        for candidate in candidates:
            key = candidate.key
            places[key] = waiting.tell()
            counts[key] += 1
            waiting.write(_line(candidate_row(candidate)).encode())
        _check_complete(wanted, counts)
        _write_atomic(out, (_line_at(waiting, places[key]) for key in _ordered(requests)))
    return len(wanted)


def _line_at(file: IO[bytes], place: int) -> str:
    file.seek(place)
    return file.readline().decode()


def _check_complete(wanted: Sequence[Key], counts: Mapping[Key, int]) -> None:
    if not wanted or not counts:
        raise PoolError(f"{len(counts)} candidates for {len(wanted)} requested: an empty pool is never written")
    problems = {
        "missing": [key for key in wanted if key not in counts],
        "doubled": [key for key, times in counts.items() if times > 1],
        "not requested": list(counts.keys() - set(wanted)),
    }
    shown = [f"{len(keys)} {what}, such as {min(keys)}" for what, keys in problems.items() if keys]
    if shown:
        raise PoolError(f"of {len(wanted)} requested candidates: {'; '.join(shown)}")


def _ordered(requests: Sequence[Request]) -> list[Key]:
    """Keys by first mention of their sample, then kind, then index."""
    place = {sample_id: i for i, sample_id in reversed(list(enumerate(request.sample_id for request in requests)))}
    keys = (key for request in requests for key in keys_of(request))
    return sorted(keys, key=lambda key: (place[key[0]], key[1], key[2]))


def _write_shard(path: Path, batch: Sequence[Request], decoding: Decoding, sampled: Sampled) -> Sampled:
    """A finished batch as a file: what was asked (as a digest), what it cost, what came out."""
    _check_complete([key for r in batch for key in keys_of(r)], Counter(c.key for c in sampled.candidates))
    lines = [_line(candidate_row(candidate)) for candidate in sampled.candidates]
    header = {"asked": _digest(batch, decoding), **{name: getattr(sampled, name) for name in COSTS}}
    _write_atomic(path, [_line({**header, "content": _checksum(lines)}), *lines])
    return sampled


def _read_shard(path: Path, asked: str) -> Sampled | None:
    """A finished batch, or None where it is missing, damaged or answers something else."""
    if not path.exists():
        return None
    try:
        head, *lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        header = json.loads(head)
        if header["asked"] != asked or header["content"] != _checksum(lines):
            return None
        candidates = [candidate_from(json.loads(line)) for line in lines]
        return Sampled(candidates, **{name: header[name] for name in COSTS})
    except (ValueError, KeyError, TypeError, RecordError):
        return None


def _digest(batch: Sequence[Request], decoding: Decoding) -> str:
    """What a shard answers. Images count by name alone: a pool moved with its data is still the same."""
    asked = [[*keys_of(r), [asdict(m) for m in r.messages], [path.name for path in r.images]] for r in batch]
    return hashlib.sha256(json.dumps([asked, asdict(decoding)], sort_keys=True).encode()).hexdigest()


def _candidates(path: Path) -> Iterator[Candidate]:
    """Of a whole shard."""
    with path.open(encoding="utf-8") as file:
        next(file)
        yield from (candidate_from(json.loads(line)) for line in file)


def _checksum(lines: Sequence[str]) -> str:
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _line(row: dict[str, Any]) -> str:
    # ASCII, so that no character inside a text (U+2028, say) is taken for the end of a line
    return json.dumps(row, allow_nan=False) + "\n"


def _write_atomic(path: Path, lines: Iterable[str]) -> None:
    """The whole file or none of it, whenever the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")  # one name, so that a killed write leaves nothing behind for good
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _facts_of(shard: Sampled | None) -> dict[str, Any]:
    """What is counted of a shard; nothing of none."""
    if shard is None:
        return {}
    return {"candidates": len(shard.candidates), "new_tokens": sum(candidate.tokens for candidate in shard.candidates),
            **{name: getattr(shard, name) for name in COSTS}}  # fmt: skip
