"""Engines that need no model: they answer from what the test gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from sicog_exp.generation.engine import Decoding, Request, candidate_seed
from sicog_exp.records import Candidate


@dataclass
class OracleEngine:
    """Answers with `answer(request)`, in batches, longest prompt first as real engines do."""

    answer: Callable[[Request], str]
    asked: list[Request] = field(default_factory=list)
    decodings: list[Decoding] = field(default_factory=list)

    def sample(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[list[Candidate]]:
        self.asked += requests
        self.decodings.append(decoding)
        ordered = sorted(requests, key=lambda r: (-len(r.messages[0].content), r.sample_id))
        for start in range(0, len(ordered), decoding.batch_size):
            yield [self._candidate(r, decoding) for r in ordered[start : start + decoding.batch_size]]

    def _candidate(self, request: Request, decoding: Decoding) -> Candidate:
        seed = candidate_seed(decoding.seed, request.sample_id, request.kind, 0)
        return Candidate(request.sample_id, request.kind, 0, self.answer(request), seed, -1.0, 3, "stop")

    def log_likelihood(
        self, requests: Sequence[Request], continuations: Sequence[str]
    ) -> list[tuple[float, int, bool]]:
        self.asked += requests
        return [(-float(len(c)), 2, len(c) < 3) for c in continuations]
