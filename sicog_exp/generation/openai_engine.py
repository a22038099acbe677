"""The client of a server that someone else runs and that speaks OpenAI's protocol: `vllm serve`, say.

Only the server that the user names is asked, and only pictures from local files are sent, as data in the request.
"""

from __future__ import annotations

import base64
import io
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from sicog_exp.data.chat import ChatError, to_chat
from sicog_exp.generation.batched import BatchedEngine, carried, opened_images, request_seed, sampled_once
from sicog_exp.generation.engine import MAX_PIXELS, Decoding, Refusal, Request, Sampled, candidate_seed
from sicog_exp.generation.requests import EngineError, keys_of
from sicog_exp.records import Candidate

if TYPE_CHECKING:
    from PIL.Image import Image

KEY_VARIABLE = "SICOG_API_KEY"
"""Environment variable with the server's key; a key never stands in a recipe."""
RETRIES = 8
"""Tries again after failures that pass (no connection, 408, 409, 429, 5xx), about 40 seconds in all."""
TIMEOUT = 1800.0
"""Seconds that one answer may take."""
REFUSALS = 64
"""Requests that a server may refuse before it answers one: what it refuses then is no single prompt."""
LOOK_EVERY = 5.0
"""Seconds between two looks at what a server serves."""


@dataclass(frozen=True)
class _Answer:
    """The choices of one request, and the prompt tokens that the server counted for them."""

    choices: list[_Choice]
    prompt_tokens: int


@dataclass(frozen=True)
class _Choice:
    text: str
    logprob: float | None
    tokens: int
    stopped: bool


class OpenAIEngine(BatchedEngine):
    """Samples from the model that `server` serves under the name `model`.

    A request asks for all its candidates at once (`n`); of a server that gives fewer, or no log-probabilities, without
    which the tokens of several choices cannot be told, each is asked by itself. Candidates have seeds of their own, and
    the same text again where the server keeps to a seed; their last bits are the server's business.
    `image_tokens` are those of one image, which no server tells; 0 where they depend on the image.
    A prompt that the server refuses, too long a one, say, has no candidates (`Refusal`).
    """

    refusals_last = False

    def __init__(self, server: str, model: str, in_flight: int = 32, image_tokens: int = 0,
                 max_pixels: int = MAX_PIXELS, retries: int = RETRIES) -> None:  # fmt: skip
        super().__init__()
        self.server, self.model = server, model
        self._client = _client(server, retries)
        self._in_flight, self._image_tokens, self._max_pixels = in_flight, image_tokens, max_pixels
        self._several = True
        """Whether the server gives several choices, each with its tokens' log-probabilities."""
        self._refusals: int | None = 0
        """Requests refused so far; None when one was answered."""

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def finished(self, batches: Sequence[Sequence[Request]], decoding: Decoding) -> Iterator[Sampled]:
        """The batches in order, while requests of later ones are under way."""
        threads = ThreadPoolExecutor(self._in_flight)
        running: deque[tuple[Sequence[Request], list[Future[_Answer]]]] = deque()
        try:
            for batch in batches:
                running.append((batch, [threads.submit(self._ask, request, decoding) for request in batch]))
                while sum(len(asked) for _, asked in running) > 2 * self._in_flight:
                    yield self._sampled(*running.popleft(), decoding)
            while running:
                yield self._sampled(*running.popleft(), decoding)
        finally:
            threads.shutdown(cancel_futures=True)

    def log_likelihood(
        self, requests: Sequence[Request], continuations: Sequence[str]
    ) -> list[tuple[float, int, bool]]:
        """Raises EngineError: the protocol has no scores of given answers."""
        raise EngineError(f"{self.server}: OpenAI's protocol does not score given answers, as tasks of multiple choice "
                          "ask; set engine.evaluates=false, or engine.kind=transformers or vllm, or leave these tasks "
                          "out of the suite")  # fmt: skip

    def _sampled(self, batch: Sequence[Request], asked: Sequence[Future[_Answer]], decoding: Decoding) -> Sampled:
        results = iter(asked)
        answers, refused = carried(batch, lambda request: next(results).result())
        self._check_refusals(len(answers), list(refused.values()))
        candidates = [candidate for place, answer in answers.items()
                      for candidate in _candidates(batch[place], answer.choices, decoding)]  # fmt: skip
        shown = [batch[place].images for place in answers if batch[place].images]
        count = self._image_tokens
        return Sampled(candidates, sum(answer.prompt_tokens for answer in answers.values()), 0.0,
                       count * sum(map(len, shown)), count * sum(map(len, set(shown))),
                       tuple(refused.values()))  # fmt: skip

    def _check_refusals(self, answered: int, refused: Sequence[Refusal]) -> None:
        """Raises EngineError where the server refuses one request after the other."""
        if answered or self._refusals is None:
            self._refusals = None
            return
        self._refusals += len(refused)
        if self._refusals >= REFUSALS:
            raise EngineError(f"{self._refusals} requests and no answer, sample {refused[-1].sample_id!r}: "
                              f"{refused[-1].reason}; look at its log")  # fmt: skip

    def _ask(self, request: Request, decoding: Decoding) -> _Answer:
        messages = self._messages(request)
        count, seed = sampled_once(request, decoding), request_seed(request, decoding)
        if self._several or count == 1:
            answer = self._complete(request, messages, count, seed, decoding)
            if answer is not None:
                return answer
            self._several = False
        each = [self._complete(request, messages, 1, seed + i, decoding) for i in range(count)]
        known = [answer for answer in each if answer]
        return _Answer([choice for answer in known for choice in answer.choices], known[0].prompt_tokens)

    def _complete(self, request: Request, messages: list[Any], count: int, seed: int, decoding: Decoding
                  ) -> _Answer | None:  # fmt: skip
        """The server's answer; None where it does not give `count` choices with their tokens."""
        import openai

        try:
            given = self._client.chat.completions.create(
                model=self.model, messages=messages, n=count, seed=seed, logprobs=True, top_p=decoding.top_p,
                temperature=decoding.temperature, max_tokens=decoding.max_new_tokens)  # fmt: skip
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            raise ChatError(_explained(self.server, error)) from error
        except openai.OpenAIError as error:
            raise EngineError(f"sample {request.sample_id!r}: {_explained(self.server, error)}") from error
        prompt, new = (given.usage.prompt_tokens, given.usage.completion_tokens) if given.usage else (0, 0)
        choices = [_choice(choice, new if count == 1 else None) for choice in given.choices]
        whole = [choice for choice in choices if choice]
        if len(whole) == count:
            return _Answer(whole, prompt)
        if count > 1:
            return None
        raise EngineError(f"sample {request.sample_id!r}: {self.server} answered with {len(choices)} choices, neither "
                          "their log-probabilities nor their tokens; use a server that counts tokens")  # fmt: skip

    def _messages(self, request: Request) -> list[Any]:
        messages = to_chat(request.messages)
        shown = sum(part["type"] == "image" for message in messages for part in message["content"])
        if shown != len(request.images):
            raise ChatError(f"the conversation shows {shown} images, and {len(request.images)} came with it")
        images = iter(opened_images(request, self._max_pixels))
        for message in messages:
            message["content"] = [part if part["type"] == "text" else _picture(next(images))
                                  for part in message["content"]]  # fmt: skip
        return messages


def _explained(server: str, error: Exception) -> str:
    """What happened, where, what to do."""
    import openai

    said = " ".join(str(error).split())[:500]
    if isinstance(error, openai.APIConnectionError):
        return f"{server} cannot be reached ({said}); start the server or correct engine.server, and run this again"
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        return f"{server} refuses the key ({said}); put the right one into the environment variable {KEY_VARIABLE}"
    if isinstance(error, openai.NotFoundError):
        return f"{server} does not serve what was asked ({said}); check engine.server, which ends with /v1 as a rule"
    if isinstance(error, openai.RateLimitError | openai.InternalServerError):
        return f"{server} keeps failing ({said}); look at its log, or lower engine.in_flight; then run this again"
    return f"{server} refuses the request ({said})"


def _client(server: str, retries: int = RETRIES) -> Any:
    """The client of one server. Raises EngineError without its package."""
    try:
        import openai
    except ImportError:
        raise EngineError("engine.kind=openai needs the openai package: pip install openai") from None
    # The library takes account, project and further headers from OPENAI_*, which are meant for another server.
    return openai.OpenAI(base_url=server, api_key=os.environ.get(KEY_VARIABLE) or "none", organization="", project="",
                         max_retries=retries, timeout=TIMEOUT)  # fmt: skip


def _picture(image: Image) -> dict[str, Any]:
    """The decoded pixels, so that the server sees what training saw: upright, without metadata."""
    buffer = io.BytesIO()
    image.save(buffer, "png", compress_level=1)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def _choice(choice: Any, tokens: int | None) -> _Choice | None:
    """A choice with its log-probability and tokens; without log-probabilities with the tokens that are told of it."""
    listed = choice.logprobs.content if choice.logprobs else None
    text, stopped = (choice.message.content or "").strip(), choice.finish_reason != "length"
    if listed:
        return _Choice(text, sum(token.logprob for token in listed), len(listed), stopped)
    return _Choice(text, None, tokens, stopped) if tokens else None


def _candidates(request: Request, choices: Sequence[_Choice], decoding: Decoding) -> Iterator[Candidate]:
    """A greedy choice serves all indices."""
    for i, (sample_id, kind, index) in enumerate(keys_of(request)):
        made = choices[i if len(choices) > 1 else 0]
        seed = candidate_seed(decoding.seed, sample_id, kind, index)
        reason = "stop" if made.stopped else "length"
        yield Candidate(sample_id, request.kind, index, made.text, seed, made.logprob, made.tokens,
                        cast(Any, reason))  # fmt: skip


# What a server serves.


def served(server: str, folder: Path, wait: float = 0.0) -> str:
    """The name under which `server` serves the model in `folder`: its path, or its folder's name.

    Looks again for `wait` seconds. Raises EngineError, with the line to run, where other weights are served.
    """
    until = time.monotonic() + wait
    while True:
        found, trouble = _names(server)
        name = next((name for name in (folder.name, str(folder)) if name in found), None)
        if name:
            return name
        if time.monotonic() >= until:
            raise EngineError(trouble or _other(server, folder, found))
        time.sleep(min(LOOK_EVERY, max(0.0, until - time.monotonic())))


def _names(server: str) -> tuple[list[str], str]:
    """(model names, what is wrong)."""
    import openai

    client = _client(server, retries=0)
    try:
        return [model.id for model in client.models.list(timeout=LOOK_EVERY).data], ""
    except openai.OpenAIError as error:
        return [], _explained(server, error)
    finally:
        client.close()


def _other(server: str, folder: Path, found: Sequence[str]) -> str:
    names = ", ".join(found) or "nothing"
    return f"{server} serves {names}, and what is to be sampled is {folder.name}. Serve it and " \
           "run the same command again (or set engine.wait to the seconds that this may take):\n" \
           f"{serve_line(server, folder)}"


def serve_line(server: str, folder: Path) -> str:
    """The command that serves a generation where `server` is looked for."""
    where, renamed = urlsplit(server), f"/tmp/{folder.name}"
    port = where.port or (443 if where.scheme == "https" else 80)
    return f"vllm serve $(python -m sicog_exp.models.vllm_names {folder} {renamed}) --served-model-name " \
           f"{folder.name} --generation-config vllm --host {where.hostname} --port {port}"
