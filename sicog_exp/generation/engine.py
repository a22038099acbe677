"""The engine protocol: requests in, candidates out, each carrying its sample id.

One contract test (`tests/contract/test_engine.py`) runs over every implementation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sicog_exp.prompts import Kind
from sicog_exp.records import Candidate, Message

MAX_PIXELS = 50_000_000
"""Of an image, where a recipe says nothing else."""


@dataclass(frozen=True)
class Request:
    """Ask for `count` candidates with indices first_index, first_index + 1, ... of one prompt.

    `messages` end with the user's turn; `images` are absolute paths, one per `<image>` placeholder, in order.
    """

    sample_id: str
    kind: Kind
    messages: tuple[Message, ...]
    images: tuple[Path, ...]
    count: int
    first_index: int = 0


@dataclass(frozen=True)
class Decoding:
    """How to draw. Temperature 0 is greedy; `seed` is the run's, each candidate's own is `candidate_seed`."""

    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    batch_size: int


@dataclass(frozen=True)
class Refusal:
    """A request without candidates: the model's processor, its template or its server cannot carry the prompt.
    `index` is that of the first candidate asked for."""

    sample_id: str
    kind: Kind
    index: int
    reason: str

    @classmethod
    def of(cls, request: Request, reason: Exception) -> Refusal:
        """A request's, with the error's words on one line."""
        return cls(request.sample_id, request.kind, request.first_index, " ".join(str(reason).split())[:500])

    @property
    def key(self) -> tuple[str, str, int]:
        """The first candidate's, which no other request asks for."""
        return self.sample_id, self.kind, self.index


Likelihood = tuple[float, int, bool]
"""A continuation's summed log-probability (nats), its number of tokens, whether it is the greedy continuation."""


@dataclass(frozen=True)
class Sampled:
    """A finished batch: its candidates, the prompt tokens computed for it, the seconds its caller waited for it.

    A prompt counts once, however many candidates continue it. `image_tokens` are those of its tokens that show images,
    `encoded_tokens` those that the vision tower made: an image that several prompts show is encoded once.
    """

    candidates: list[Candidate]
    prompt_tokens: int
    seconds: float
    image_tokens: int = 0
    encoded_tokens: int = 0
    refused: tuple[Refusal, ...] = ()
    """The batch's requests that have no candidates."""

    @property
    def counted(self) -> dict[str, int]:
        """All its tokens by name."""
        new = sum(candidate.tokens for candidate in self.candidates)
        return {"prompt_tokens": self.prompt_tokens, "image_tokens": self.image_tokens,
                "encoded_tokens": self.encoded_tokens, "new_tokens": new}  # fmt: skip


def candidate_seed(seed: int, sample_id: str, kind: str, index: int) -> int:
    """63-bit seed of one candidate: a function of the run's seed and the candidate's key, of nothing else."""
    digest = hashlib.sha256(f"{seed}\0{sample_id}\0{kind}\0{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Engine(Protocol):
    """Samples from one model."""

    def sample(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[list[Candidate]]:
        """Lists of candidates, one list per finished batch; every requested (sample id, kind, index) exactly once, but
        for the requests that are refused (`Refusal`), which an engine's `refused` names when the batch is there.

        The batches are a function of `requests` and `decoding` alone, and so is every candidate, so that a killed
        generation continues with the batches that are missing.
        """
        ...

    def log_likelihood(
        self, requests: Sequence[Request], continuations: Sequence[str]
    ) -> Sequence[Likelihood | Refusal]:
        """For each request its continuation's likelihood, or why its prompt is refused."""
        ...
