"""What all engines share: batches in, their results in order, timed and counted."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from sicog_exp.data.chat import ChatError
from sicog_exp.data.images import ImageError, open_image
from sicog_exp.generation.engine import Decoding, Likelihood, Refusal, Request, Sampled, candidate_seed
from sicog_exp.generation.requests import Batches, EngineError, check_decoding, check_requests, cut
from sicog_exp.records import Candidate

if TYPE_CHECKING:
    from PIL.Image import Image

Prompt = TypeVar("Prompt")
SEED_BITS = 31
"""What every server takes for a seed."""


class BatchedEngine:
    """An engine that gives `finished`, the batches' results in order; see `generation.engine.Engine` for the rest.

    `busy_seconds` is the time for which callers waited, `counted` what was computed for them (`Sampled.counted`),
    `refused` the reason for every sample that has none.
    """

    refusals_last = True
    """Whether a prompt that was refused stays so: what a model's processor says does, what a server says may not."""

    def __init__(self) -> None:
        self.busy_seconds = 0.0
        self.counted: Counter[str] = Counter()
        self.refused: dict[str, str] = {}

    def plan(self, requests: Sequence[Request], decoding: Decoding) -> Batches:
        """The batches of `sample`, in order: every request once, of like prompt length."""
        return cut(requests, self.lengths(requests), decoding.batch_size)

    def lengths(self, requests: Sequence[Request]) -> NDArray[np.int64]:
        """The prompts' lengths where batches are padded to them; else all alike, which leaves requests in order."""
        return np.zeros(len(requests), np.int64)

    def sample(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[list[Candidate]]:
        """One list of candidates per batch of `plan`; see the protocol."""
        check_requests(requests)
        check_decoding(decoding)
        return (sampled.candidates for sampled in self.sample_batches(self.plan(requests, decoding), decoding))

    def sample_batches(self, batches: Sequence[Sequence[Request]], decoding: Decoding) -> Iterator[Sampled]:
        """Each batch when it is finished, in order; see `generation.pool.PoolEngine`."""
        started = time.perf_counter()
        for made in self.finished(batches, decoding):
            seconds = time.perf_counter() - started
            self.busy_seconds += seconds
            sampled = replace(made, seconds=seconds)
            self.counted.update(sampled.counted)
            self.refused.update({refusal.sample_id: refusal.reason for refusal in sampled.refused})
            yield sampled
            started = time.perf_counter()

    def log_likelihood(self, requests: Sequence[Request], continuations: Sequence[str]
                       ) -> Sequence[Likelihood | Refusal]:  # fmt: skip
        """See the protocol."""
        raise NotImplementedError

    def finished(self, batches: Sequence[Sequence[Request]], decoding: Decoding) -> Iterator[Sampled]:
        """The batches' results in order; their seconds are measured by the caller."""
        raise NotImplementedError


def carried(batch: Sequence[Request], prepare: Callable[[Request], Prompt]
            ) -> tuple[dict[int, Prompt], dict[int, Refusal]]:  # fmt: skip
    """What `prepare` makes of the requests of a batch, and those for which it raises ChatError, both by position: one
    prompt that the model cannot carry never costs the rest of a run."""
    made: dict[int, Prompt] = {}
    refused: dict[int, Refusal] = {}
    for place, request in enumerate(batch):
        try:
            made[place] = prepare(request)
        except ChatError as error:
            refused[place] = Refusal.of(request, error)
    return made, refused


def sampled_once(request: Request, decoding: Decoding) -> int:
    """Continuations to draw for a request: greedy ones are all the same, and libraries refuse to draw several."""
    return request.count if decoding.temperature > 0 else 1


def request_seed(request: Request, decoding: Decoding) -> int:
    """The seed behind a request's first candidate, from which libraries and servers count up, one a candidate.

    Candidate i of a sample and kind has the same seed whether it is asked with others or alone.
    """
    return (candidate_seed(decoding.seed, request.sample_id, request.kind, 0) + request.first_index) % (1 << SEED_BITS)


def opened_images(request: Request, max_pixels: int) -> list[Image]:
    """A request's images, in order. One that cannot be opened names the sample: raises EngineError."""
    try:
        paths = [path.resolve() for path in request.images]
        return [open_image(path.parent, path.name, max_pixels) for path in paths]
    except ImageError as error:
        raise EngineError(f"sample {request.sample_id!r}: {error}") from error
