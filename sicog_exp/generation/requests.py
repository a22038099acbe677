"""What every engine does with requests before a model sees them: refuse doubled keys, cut into batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from sicog_exp.generation.engine import Decoding, Request

Key = tuple[str, str, int]


class EngineError(ValueError):
    """Requests that an engine cannot serve, or outputs that do not fit them; the message names the sample."""


def keys_of(request: Request) -> Iterator[Key]:
    """(sample id, kind, index) of each candidate that a request asks for."""
    for index in range(request.first_index, request.first_index + request.count):
        yield request.sample_id, request.kind, index


def check_requests(requests: Sequence[Request]) -> None:
    """Raise EngineError where a count is below 1 or two requests ask for the same candidate."""
    for request in requests:
        if request.count < 1 or request.first_index < 0:
            asked = f"count={request.count}, first_index={request.first_index}"
            raise EngineError(f"sample {request.sample_id!r}: {asked}; "
                              "a request asks for at least one candidate, from index 0 on")  # fmt: skip
    keys = Counter(key for request in requests for key in keys_of(request))
    doubled = [key for key, times in keys.items() if times > 1]
    if doubled:
        raise EngineError(f"{len(doubled)} candidates are requested more than once, the first is {doubled[0]}; "
                          "give every (sample id, kind, index) once")  # fmt: skip


def check_decoding(decoding: Decoding) -> None:
    """Raise EngineError for a decoding that cannot be drawn with."""
    if decoding.temperature < 0 or not 0 < decoding.top_p <= 1:
        raise EngineError(f"temperature={decoding.temperature}, top_p={decoding.top_p}: "
                          "a temperature is at least 0, top_p above 0 and at most 1")  # fmt: skip
    if decoding.max_new_tokens < 1 or decoding.batch_size < 1:
        raise EngineError(
            f"max_new_tokens={decoding.max_new_tokens}, batch_size={decoding.batch_size}: at least 1 each"
        )


def cut(requests: Sequence[Request], lengths: Sequence[int], batch_size: int) -> list[list[Request]]:
    """Batches of requests of like length. The sort is stable, so cutting one of the batches again gives it back."""
    order = sorted(range(len(requests)), key=lambda i: lengths[i])
    ordered = [requests[i] for i in order]
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
