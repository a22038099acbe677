"""An engine on many machines: workers of a Ray cluster, each with an engine of its own, share the batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from sicog_exp.generation.batched import BatchedEngine
from sicog_exp.generation.engine import Decoding, Likelihood, Refusal, Request, Sampled
from sicog_exp.models.loading import Work
from sicog_exp.ray_pool import RayPool

LIKELIHOOD_CHUNK = 64
"""Continuations of one call to a worker."""
LENGTHS_CHUNK = 1024
"""Prompts that one call to a worker measures."""


class EngineWorker:
    """What a worker answers, by an engine that is made in it."""

    def __init__(self, make: Callable[[], tuple[BatchedEngine, Work]]) -> None:
        self._engine, self._work = make()

    def describe(self) -> tuple[str, Work]:
        """The engine's class and its model's work."""
        return type(self._engine).__name__, self._work

    def lengths(self, requests: Sequence[Request]) -> NDArray[np.int64]:
        """See `BatchedEngine`."""
        return self._engine.lengths(requests)

    def batch(self, batch: Sequence[Request], decoding: Decoding) -> Sampled:
        """One finished batch."""
        (sampled,) = self._engine.sample_batches([batch], decoding)
        return sampled

    def log_likelihood(self, requests: Sequence[Request], continuations: Sequence[str]
                       ) -> Sequence[Likelihood | Refusal]:  # fmt: skip
        """See `Engine`."""
        return self._engine.log_likelihood(requests, continuations)


class RayEngine(BatchedEngine):
    """Batches of the inner engine's own plan, each computed whole by one worker, so that a candidate does not depend on
    how many workers there are or which of them died: a lost worker's batch is drawn again from the same seeds.

    `make` gives the inner engine and its model's work; it is called in every worker. Model and pictures are read by
    path: workers see the same folders. `name` is the inner engine's.
    """

    def __init__(self, make: Callable[[], tuple[BatchedEngine, Work]], workers: int, cpus: float = 1, gpus: float = 0,
                 address: str | None = None) -> None:  # fmt: skip
        super().__init__()
        self.pool = RayPool(partial(EngineWorker, make), workers, cpus, gpus, address)
        self.name: str
        self.work: Work
        self.name, self.work = self.pool.call("describe")

    def close(self) -> None:
        """End the workers."""
        self.pool.close()

    def lengths(self, requests: Sequence[Request]) -> NDArray[np.int64]:
        """The inner engine's, so that the batches are its own."""
        starts = range(0, len(requests), LENGTHS_CHUNK)
        chunks = self.pool.map("lengths", ((requests[start : start + LENGTHS_CHUNK],) for start in starts))
        return np.concatenate([np.zeros(0, np.int64), *chunks])

    def finished(self, batches: Sequence[Sequence[Request]], decoding: Decoding) -> Iterator[Sampled]:
        """The batches in order, spread over the workers."""
        return self.pool.map("batch", ((batch, decoding) for batch in batches))

    def log_likelihood(self, requests: Sequence[Request], continuations: Sequence[str]) -> list[Likelihood | Refusal]:
        """See the protocol; in chunks of a fixed size."""
        starts = range(0, len(requests), LIKELIHOOD_CHUNK)
        parts = [slice(start, start + LIKELIHOOD_CHUNK) for start in starts]
        scored = self.pool.map("log_likelihood", ((requests[part], continuations[part]) for part in parts))
        return [result for chunk in scored for result in chunk]
