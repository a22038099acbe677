"""What every engine does with requests before a model sees them: refuse doubled keys, cut into batches.

All of it holds tens of bytes a request, and the requests themselves only while they are looked at: a pool's lie in a
file (`generation.request_file`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from sicog_exp.generation.engine import Decoding, Request
from sicog_exp.prompts import KINDS

Key = tuple[str, str, int]
ALPHABETICAL = {kind: rank for rank, kind in enumerate(sorted(KINDS))}
ROW = np.dtype([("sample", "S16"), ("kind", np.int8), ("first", np.int64), ("count", np.int64)])
"""A request's keys; the sample id as a digest."""


class EngineError(ValueError):
    """Requests that an engine cannot serve, or outputs that do not fit them; the message names the sample."""


def keys_of(request: Request) -> Iterator[Key]:
    """(sample id, kind, index) of each candidate that a request asks for."""
    for index in range(request.first_index, request.first_index + request.count):
        yield request.sample_id, request.kind, index


def check_requests(requests: Sequence[Request]) -> None:
    """Raise EngineError where a count is below 1 or two requests ask for the same candidate."""
    pool_order(requests)


def pool_order(requests: Sequence[Request]) -> NDArray[np.int64]:
    """Where the requests stand that come first, second, ... in a pool: by first mention of their sample, then kind,
    then index. Raises EngineError as `check_requests` does."""
    rows = np.fromiter(map(_row, requests), ROW, len(requests))
    _, mentioned, sample = np.unique(rows["sample"], return_index=True, return_inverse=True)
    place, kind, first = mentioned[sample], rows["kind"], rows["first"]
    order = np.lexsort((first, kind, place))
    one, other = order[:-1], order[1:]
    alike = (place[one] == place[other]) & (kind[one] == kind[other])
    doubled = np.flatnonzero(alike & (first[other] < first[one] + rows["count"][one]))
    if len(doubled):
        request = requests[int(order[doubled[0] + 1])]
        raise EngineError(f"candidates are requested more than once, the first is {next(keys_of(request))}; "
                          "give every (sample id, kind, index) once")  # fmt: skip
    return order


def _row(request: Request) -> tuple[bytes, int, int, int]:
    if request.count < 1 or request.first_index < 0:
        asked = f"count={request.count}, first_index={request.first_index}"
        raise EngineError(f"sample {request.sample_id!r}: {asked}; "
                          "a request asks for at least one candidate, from index 0 on")  # fmt: skip
    digest = hashlib.blake2b(request.sample_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return digest, ALPHABETICAL[request.kind], request.first_index, request.count


def check_decoding(decoding: Decoding) -> None:
    """Raise EngineError for a decoding that cannot be drawn with."""
    if decoding.temperature < 0 or not 0 < decoding.top_p <= 1:
        raise EngineError(f"temperature={decoding.temperature}, top_p={decoding.top_p}: "
                          "a temperature is at least 0, top_p above 0 and at most 1")  # fmt: skip
    if decoding.max_new_tokens < 1 or decoding.batch_size < 1:
        raise EngineError(
            f"max_new_tokens={decoding.max_new_tokens}, batch_size={decoding.batch_size}: at least 1 each"
        )


class Batches(Sequence[list[Request]]):
    """Batches of requests, each put together when it is asked for: 8 bytes of memory a request."""

    def __init__(self, requests: Sequence[Request], order: NDArray[np.int64], size: int,
                 numbers: Sequence[int] | None = None) -> None:  # fmt: skip
        """`order`: the requests' positions, `size` to a batch; `numbers`: some of these batches, None for all."""
        self._requests, self._order, self._size = requests, order, size
        self._numbers = range(-(-len(order) // size)) if numbers is None else numbers

    def positions(self, index: int) -> list[int]:
        """Where the requests of a batch stand among all."""
        start = self._numbers[index] * self._size
        return self._order[start : start + self._size].tolist()

    def only(self, numbers: Sequence[int]) -> Batches:
        """Some of the batches."""
        return Batches(self._requests, self._order, self._size, [self._numbers[number] for number in numbers])

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> list[Request]: ...
    @overload
    def __getitem__(self, index: slice) -> Batches: ...
    def __getitem__(self, index: int | slice) -> list[Request] | Batches:
        if isinstance(index, slice):
            return self.only(range(len(self))[index])
        return [self._requests[position] for position in self.positions(index)]


def cut(requests: Sequence[Request], lengths: Sequence[int] | NDArray[np.int64], batch_size: int) -> Batches:
    """Batches of requests of like length. The sort is stable, so cutting one of the batches again gives it back."""
    return Batches(requests, np.argsort(np.asarray(lengths, np.int64), kind="stable"), batch_size)
