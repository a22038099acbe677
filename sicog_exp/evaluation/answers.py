"""A model's answers, kept as they come, so that a killed evaluation asks only for what is missing.

An answer is found by what was asked (the words, the pictures' content, the decoding) and by the model's weights; no
path is part of it. A batch is kept whole or not at all and asked again as it was: padding moves the last bits of a
computation, and a resumed evaluation gives the scores of an undisturbed one.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sicog_exp.generation.engine import Decoding, Likelihood, Refusal, Request, Sampled
from sicog_exp.generation.pool import PoolEngine
from sicog_exp.generation.requests import keys_of
from sicog_exp.records import Candidate, candidate_from, candidate_row
from sicog_exp.store import digest_of, file_checksum

ANSWERS, PICTURES = "answers.jsonl", "pictures"
REFUSED = "refused"
"""Key of what is kept of a request without an answer."""
LIKELIHOOD_CHUNK = 512
"""Continuations that are computed and kept together."""


class KeptAnswers:
    """An engine behind a file of its answers, one line per finished batch.

    `weights` is a fingerprint of the model's files. `kept_seconds` is what the answers took that were found in
    `scratch` instead of computed; `counted` are the tokens of all answers, found or computed (`Sampled.counted`).
    `refused` holds the reason for every request that has none. `heard` is told the sample ids of each batch, found or
    computed. `scratch` also keeps the pictures that tasks hand over, which take long to encode.
    """

    def __init__(self, engine: PoolEngine, scratch: Path, weights: str) -> None:
        self.engine = engine
        self.scratch = scratch
        self.kept_seconds = 0.0
        self.counted: Counter[str] = Counter()
        self.refused: dict[str, str] = {}
        self.heard: Callable[[Iterable[str]], None] = lambda ids: None
        self._weights = weights
        self._file = scratch / ANSWERS
        self._digests: dict[Path, str] = {}
        scratch.mkdir(parents=True, exist_ok=True)
        self._known = dict(_read(self._file))

    def sample(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[list[Candidate]]:
        """See `Engine`; batches that were finished before come from the file."""
        batches = self.engine.plan(requests, decoding)
        asked = [[self._key(request, asdict(decoding)) for request in batch] for batch in batches]
        missing = [batch for batch, keys in zip(batches, asked, strict=True) if not self._has(keys)]
        computed = self.engine.sample_batches(missing, decoding)
        for batch, keys in zip(batches, asked, strict=True):
            if self._has(keys):
                values = self._values(keys)
            else:
                done = next(computed)
                values = _answers(batch, done)
                self._keep(keys, values, done.seconds, done.counted)
            self.refused |= {request.sample_id: value[REFUSED] for request, value in zip(batch, values, strict=True)
                             if REFUSED in value}  # fmt: skip
            self.heard(request.sample_id for request in batch)
            yield [candidate_from(row) for value in values if REFUSED not in value for row in value]

    def log_likelihood(self, requests: Sequence[Request], continuations: Sequence[str]) -> list[Likelihood | Refusal]:
        """See `Engine`; chunks that were finished before come from the file."""
        results: list[Likelihood | Refusal] = []
        for start in range(0, len(requests), LIKELIHOOD_CHUNK):
            part = slice(start, start + LIKELIHOOD_CHUNK)
            keys = [self._key(request, text) for request, text in zip(requests[part], continuations[part], strict=True)]
            if not self._has(keys):
                started, before = time.perf_counter(), self._engine_counted
                scored = self.engine.log_likelihood(requests[part], continuations[part])
                values: list[Any] = [{REFUSED: row.reason} if isinstance(row, Refusal) else row for row in scored]
                self._keep(keys, values, time.perf_counter() - started, self._engine_counted - before)
            else:
                values = self._values(keys)
            results += [_likelihood(request, value) for request, value in zip(requests[part], values, strict=True)]
            self.heard(request.sample_id for request in requests[part])
        return results

    @property
    def _engine_counted(self) -> Counter[str]:
        """What the engine says that it computed, if it counts at all."""
        return Counter(getattr(self.engine, "counted", {}))

    def _key(self, request: Request, how: Any) -> str:
        """What is asked of whom: the request with its pictures' content, the decoding or the continuation."""
        pictures = [self._digest(path) for path in request.images]
        asked = [list(keys_of(request)), [asdict(message) for message in request.messages], pictures]
        return digest_of([self._weights, asked, how])

    def _digest(self, picture: Path) -> str:
        if picture not in self._digests:
            self._digests[picture] = file_checksum(picture)
        return self._digests[picture]

    def _has(self, keys: Sequence[str]) -> bool:
        """A batch counts when all of it is there; not with refusals that do not last."""
        if not all(key in self._known for key in keys):
            return False
        return not any(REFUSED in self._known[key][0] for key in keys) or self.engine.refusals_last

    def _values(self, keys: Sequence[str]) -> list[Any]:
        for _, seconds, counted in (self._known[key] for key in keys):
            self.kept_seconds += seconds
            self.counted.update(counted)
        return [self._known[key][0] for key in keys]

    def _keep(self, keys: Sequence[str], values: Sequence[Any], seconds: float, counted: Mapping[str, int]) -> None:
        self.counted.update(counted)
        row = {"keys": keys, "values": values, "seconds": seconds, "counted": counted,
               "content": digest_of([keys, values])}  # fmt: skip
        line = json.dumps(row, allow_nan=False)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())


def _answers(batch: Sequence[Request], done: Sampled) -> list[Any]:
    """What is kept of each request: the rows of its candidates, or why it has none."""
    found = {candidate.key: candidate_row(candidate) for candidate in done.candidates}
    refused = {refusal.key: {REFUSED: refusal.reason} for refusal in done.refused}
    return [refused.get(next(keys_of(request))) or [found[key] for key in keys_of(request)] for request in batch]


def _likelihood(request: Request, value: Any) -> Likelihood | Refusal:
    if isinstance(value, Mapping):
        return Refusal(request.sample_id, request.kind, request.first_index, value[REFUSED])
    logprob, tokens, greedy = value
    return logprob, tokens, greedy


def _read(file: Path) -> Iterator[tuple[str, tuple[Any, float, dict[str, int]]]]:
    """(key, (value, seconds, tokens)) of all kept answers; the tokens of a batch stand with its first one. A line torn
    by a kill is cut off, a damaged one left out."""
    if not file.exists():
        return
    whole, newline, torn = file.read_bytes().rpartition(b"\n")
    if torn:
        os.truncate(file, len(whole) + len(newline))
    for line in whole.splitlines():
        try:
            row = json.loads(line)
            intact = row["content"] == digest_of([row["keys"], row["values"]])
            each = float(row["seconds"]) / len(row["keys"])
            counted = [row["counted"], *({} for _ in row["keys"][1:])]
        except (ValueError, KeyError, TypeError, ZeroDivisionError):
            continue
        if intact:
            yield from ((key, (value, each, tokens))
                        for key, value, tokens in zip(row["keys"], row["values"], counted, strict=True))  # fmt: skip
