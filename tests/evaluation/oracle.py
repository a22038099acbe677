"""Engines that need no model: they answer from what the test gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from sicog_exp.generation.engine import Decoding, Refusal, Request, Sampled, candidate_seed
from sicog_exp.generation.requests import Batches, cut
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


@dataclass
class RefusingOracle(OracleEngine):
    """One whose batches can be kept, and that cannot carry some prompts."""

    refuses: Callable[[Request], bool] = lambda request: False
    refusals_last: bool = True

    def plan(self, requests: Sequence[Request], decoding: Decoding) -> Batches:
        return cut(requests, [len(request.messages[0].content) for request in requests], decoding.batch_size)

    def sample_batches(self, batches: Sequence[Sequence[Request]], decoding: Decoding) -> Iterator[Sampled]:
        for batch in batches:
            self.asked += batch
            refused = tuple(self._refusal(request) for request in batch if self.refuses(request))
            kept = [self._candidate(request, decoding) for request in batch if not self.refuses(request)]
            yield Sampled(kept, 5, 2.0, refused=refused)

    def log_likelihood(self, requests, continuations):
        given = super().log_likelihood(requests, continuations)
        return [self._refusal(request) if self.refuses(request) else row
                for request, row in zip(requests, given, strict=True)]  # fmt: skip

    def _refusal(self, request: Request) -> Refusal:
        return Refusal.of(request, ValueError("too wide"))
