"""The default engine: transformers, with each prompt and its image prefilled once for all of its candidates."""

from __future__ import annotations

import time
import warnings
from collections import Counter, deque
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jinja2.exceptions import TemplateError
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sicog_exp.data.chat import ChatEncoder, ImageInputs, join_images, to_chat
from sicog_exp.generation.batched import BatchedEngine, carried, opened_images
from sicog_exp.generation.decoder import Decoder, Drawn, GrowingSteps, Prompts, joined
from sicog_exp.generation.drawing import noise
from sicog_exp.generation.engine import MAX_PIXELS, Decoding, Likelihood, Refusal, Request, Sampled, candidate_seed
from sicog_exp.generation.fixed import FixedDecoder, fixed_problem
from sicog_exp.generation.memory import Halving
from sicog_exp.generation.requests import EngineError, keys_of
from sicog_exp.models.families import GRIDS, image_features, positions, shares_features, token_types
from sicog_exp.models.loading import ModelSource, load_model
from sicog_exp.records import Candidate, Message

if TYPE_CHECKING:

    from sicog_exp.recipe import ModelConfig

SMALLER = "lower sampling.max_new_tokens or model.image_pixels, set model.precision=bf16-mixed, or take a smaller model"
"""Either kind of bf16 halves the weights here; bf16-mixed leaves those that train whole."""
LIKELIHOOD_BATCH = 32
"""Sequences per forward pass of `log_likelihood`."""
REMEMBERED = 4096
"""Prompts whose length is remembered: captions have one prompt for all images, multiple choice one for all choices."""


@dataclass
class _Inputs:
    """Prompts of a batch in tokens. `images` are the distinct ones that prompts show (most show one, some several
    together), `shown` which of them each prompt shows, in order, prompts without images left out."""

    ids: list[list[int]]
    images: list[ImageInputs]
    shown: list[int]

    def in_order(self, names: Container[str] | None = None) -> list[Mapping[str, Tensor]]:
        """The tensors, or those of some names, once per prompt that shows them."""
        return [{name: value for name, value in self.images[image].items() if names is None or name in names}
                for image in self.shown]  # fmt: skip

    def only(self, prompts: Sequence[int], batch: Sequence[Request]) -> _Inputs:
        """Some of the prompts, by their number in the batch."""
        picture = dict(zip([i for i, request in enumerate(batch) if request.images], self.shown, strict=True))
        shown = [picture[i] for i in prompts if i in picture]
        kept = list(dict.fromkeys(shown))
        return _Inputs([self.ids[i] for i in prompts], [self.images[i] for i in kept], [kept.index(i) for i in shown])


@dataclass
class _Prepared:
    """A batch ready to be computed: what was asked and can be put, each candidate's seed and noise
    (C, max_new_tokens)."""

    batch: Sequence[Request]
    inputs: _Inputs
    seeds: list[int]
    uniforms: Tensor
    decoding: Decoding
    refused: tuple[Refusal, ...] = ()

    def only(self, chosen: Sequence[int]) -> _Prepared:
        """Some of the candidates, by their number, in order."""
        owner = [place for place, request in enumerate(self.batch) for _ in range(request.count)]
        counts = Counter(owner[number] for number in chosen)
        batch = [replace(self.batch[place], count=count) for place, count in counts.items()]
        seeds = [self.seeds[number] for number in chosen]
        return _Prepared(batch, self.inputs.only(list(counts), self.batch), seeds, self.uniforms[list(chosen)],
                         self.decoding)  # fmt: skip


class TransformersEngine(BatchedEngine):
    """Samples from an image-text-to-text model of transformers.

    On a CPU, `threads` batches are computed side by side, a core each: 1.47 times one core's rate for chains
    at the embedded size, where both cores on each batch reach 0.88 (benchmarks/2026-11-24-cores.md). Candidates' bits
    do not depend on `threads`. A batch that does not fit into memory is computed in halves; `halved` counts how often.
    """

    def __init__(self, model: PreTrainedModel, processor: Any, device: str | torch.device = "cpu",
                 max_pixels: int = MAX_PIXELS, threads: int = 1, static_cache: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()  # type: ignore[arg-type]
        self.encoder = ChatEncoder(processor)
        self.tokenizer = self.encoder.tokenizer
        self.stops = torch.tensor(sorted(_stop_ids(model, self.tokenizer)), device=self.device)
        self._max_pixels = max_pixels
        self._threads = threads if self.device.type == "cpu" else 1
        self._sampling, self._scoring = (Halving(SMALLER, self._drop_buffers) for _ in range(2))
        self._lengths: dict[tuple[Message, ...], int] = {}
        self._shares_features = shares_features(model)
        problem = fixed_problem(model) if static_cache else None
        if problem:
            warnings.warn(f"model.static_cache: {model.config.model_type} {problem}; it decodes as usual", stacklevel=2)
        self._static_cache = static_cache and not problem
        self._fixed: FixedDecoder | None = None

    @property
    def halved(self) -> int:
        """How often a batch was cut in halves for want of memory."""
        return self._sampling.halved + self._scoring.halved

    @classmethod
    def from_path(cls, path: str | Path, dtype: str = "float32", device: str | torch.device = "cpu",
                  trust_remote_code: bool = False, max_pixels: int = MAX_PIXELS,
                  threads: int = 1) -> TransformersEngine:  # fmt: skip
        """Load a folder or hub name; `dtype` is torch's name ("float32", "bfloat16"). Raises ModelError."""
        model, processor = load_model(ModelSource(str(path), trust_remote_code), dtype)
        return cls(model, processor, device, max_pixels, threads)

    @classmethod
    def from_recipe(cls, path: str | Path, config: ModelConfig, max_pixels: int = MAX_PIXELS) -> TransformersEngine:
        """A generation's model, loaded as the recipe says. Raises ModelError."""
        model, processor = load_model(ModelSource.of(path, config), config.generation_dtype)
        return cls(model, processor, config.torch_device, max_pixels, config.threads, config.static_cache)

    def lengths(self, requests: Sequence[Request]) -> NDArray[np.int64]:
        """The prompts' tokens."""
        return np.fromiter(map(self._prompt_length, requests), np.int64, len(requests))

    def finished(self, batches: Sequence[Sequence[Request]], decoding: Decoding) -> Iterator[Sampled]:
        """The batches in order, some computed at once."""
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        for prepared, drawn in self._in_order(self._prepare(batch, decoding) for batch in batches):
            prompt, image, encoded = self._prompt_tokens(prepared.inputs)
            candidates = self._candidates(prepared, drawn) if drawn else []
            yield Sampled(candidates, prompt, 0.0, image, encoded, prepared.refused)

    def _prompt_tokens(self, inputs: _Inputs) -> tuple[int, int, int]:
        """(all, images', encoded) tokens of a batch's prompts; see `Sampled`."""
        marks = self.model.config.image_token_id
        counts = [ids.count(marks) for ids in inputs.ids]
        distinct = dict(zip(inputs.shown, filter(None, counts), strict=True))
        encoded = sum(distinct.values()) if self._shares_features else sum(counts)
        return sum(map(len, inputs.ids)), sum(counts), encoded

    def _in_order(self, ready: Iterator[_Prepared]) -> Iterator[tuple[_Prepared, Drawn | None]]:
        """Computes some batches at once while the next one is prepared."""
        running: deque[tuple[_Prepared, Future[Drawn | None]]] = deque()
        with ThreadPoolExecutor(self._threads) as threads:
            for prepared in ready:
                running.append((prepared, threads.submit(self._draw, prepared)))
                if len(running) > self._threads:
                    first, drawn = running.popleft()
                    yield first, drawn.result()
            for first, drawn in running:
                yield first, drawn.result()

    @torch.inference_mode()
    def log_likelihood(self, requests: Sequence[Request], continuations: Sequence[str]) -> list[Likelihood | Refusal]:
        """See the protocol. The end-of-turn token is not part of a continuation, and a request's count is ignored."""
        targets = [self.tokenizer.encode(text, add_special_tokens=False) for text in continuations]
        lengths = [self._prompt_length(request) + len(t) for request, t in zip(requests, targets, strict=True)]
        order = sorted(range(len(requests)), key=lambda i: lengths[i])
        started = time.perf_counter()
        results: dict[int, Likelihood | Refusal] = {}
        for start in range(0, len(order), LIKELIHOOD_BATCH):
            part = order[start : start + LIKELIHOOD_BATCH]
            halves = self._scoring.run(lambda some: self._score([requests[i] for i in some],
                                                                [targets[i] for i in some]), part)  # fmt: skip
            results.update(zip(part, [result for half in halves for result in half], strict=True))
        self.busy_seconds += time.perf_counter() - started
        return [results[i] for i in range(len(requests))]

    def _prompt_length(self, request: Request) -> int:
        """Tokens of a prompt, images at the size that the configuration gives them (good enough to sort by)."""
        if request.messages not in self._lengths:
            if len(self._lengths) == REMEMBERED:
                self._lengths.clear()
            self._lengths[request.messages] = self._text_length(request.messages)
        per_image = getattr(self.model.config, "image_seq_length", None) or 1
        return self._lengths[request.messages] + len(request.images) * per_image

    def _text_length(self, messages: tuple[Message, ...]) -> int:
        try:
            text = self.encoder.processor.apply_chat_template(to_chat(messages), add_generation_prompt=True,
                                                              tokenize=False)  # fmt: skip
        except TemplateError:  # which is said when its turn comes
            return 0
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def _prepare(self, batch: Sequence[Request], decoding: Decoding) -> _Prepared:
        """Tokens, pixels and noise: the caller's thread does it, since tokenizers are not made for several."""
        places, inputs, refused = self._inputs(batch)
        kept = [batch[place] for place in places]
        seeds = [candidate_seed(decoding.seed, *key) for request in kept for key in keys_of(request)]
        uniforms = noise(seeds, decoding.max_new_tokens) if seeds else torch.empty(0, decoding.max_new_tokens)
        return _Prepared(kept, inputs, seeds, uniforms, decoding, tuple(refused.values()))

    def _draw(self, prepared: _Prepared) -> Drawn | None:
        """All candidates of the batch, in parts of so many as fit into memory; None where there are none."""
        if not prepared.batch:
            return None
        parts = self._sampling.run(lambda chosen: self._draw_some(prepared, chosen), range(len(prepared.seeds)))
        return parts[0] if len(parts) == 1 else joined(parts)

    @torch.inference_mode()
    def _draw_some(self, prepared: _Prepared, chosen: Sequence[int]) -> Drawn:
        """Candidates by their number in the batch, with the prompts that they continue."""
        if len(chosen) < len(prepared.seeds):
            prepared = prepared.only(chosen)
        ids, mask = self._padded(prepared.inputs.ids)
        cache = DynamicCache()
        places = self._positions(ids, mask, prepared.inputs)
        logits = self._forward(ids, mask, places, prepared.inputs, past_key_values=cache, use_cache=True,
                               logits_to_keep=1)  # fmt: skip
        behind = places.amax(-1) + 1 if places.ndim == 2 else places.amax((0, 2)) + 1
        prompts, counts = Prompts(cache, logits[:, -1], mask, behind), [request.count for request in prepared.batch]
        decoder, room = Decoder(self.stops, prepared.decoding), prepared.decoding.max_new_tokens
        uniforms = prepared.uniforms.to(self.device)
        if self._static_cache:
            return self._run_fixed(decoder, prompts, counts, uniforms)
        growing = GrowingSteps(self.model, prompts, counts, room)
        # Here and not where candidates are made of it: that thread would wait for the next batch, which runs by then.
        return decoder.run(growing, growing.logits, uniforms).cpu()

    def _run_fixed(self, decoder: Decoder, prompts: Prompts, counts: list[int], uniforms: Tensor) -> Drawn:
        """In the buffers, and by the captured step, of the batch before where they fit; on a CPU, where batches run
        side by side and nothing is captured, in new ones. `_fixed` never holds those in use, which cannot be spared."""
        fixed, self._fixed = self._fixed, None
        if fixed is None or not fixed.fits(decoder, prompts, counts):
            fixed = None  # before new ones are made: there may be no room for both
            fixed = FixedDecoder(self.model, decoder, prompts, counts)
        drawn = fixed.run(prompts, counts, uniforms).cpu()
        self._fixed = fixed if self.device.type == "cuda" else None
        return drawn

    def _drop_buffers(self) -> bool:
        """Lets go of the buffers of the batch before; whether there were any."""
        dropped, self._fixed = self._fixed is not None, None
        return dropped

    def _candidates(self, prepared: _Prepared, drawn: Drawn) -> list[Candidate]:
        keys = [key for request in prepared.batch for key in keys_of(request)]
        lengths, logprobs, stopped = drawn.lengths.tolist(), drawn.logprobs.tolist(), drawn.stopped.tolist()
        tokens = [row[:length] for row, length in zip(drawn.tokens.tolist(), lengths, strict=True)]
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        columns = zip(keys, prepared.seeds, texts, lengths, logprobs, stopped, strict=True)
        return [
            Candidate(sample_id, kind, index, text.strip(), seed, logprob, length, "stop" if stop else "length")
            for (sample_id, kind, index), seed, text, length, logprob, stop in columns
        ]

    def _score(self, batch: Sequence[Request], targets: Sequence[list[int]]) -> list[Likelihood | Refusal]:
        places, inputs, refused = self._inputs(batch)
        scored = self._score_inputs(inputs, [targets[place] for place in places]) if places else []
        results: dict[int, Likelihood | Refusal] = {**refused, **dict(zip(places, scored, strict=True))}
        return [results[place] for place in range(len(batch))]

    def _score_inputs(self, inputs: _Inputs, targets: Sequence[list[int]]) -> list[Likelihood]:
        prompt, image, encoded = self._prompt_tokens(inputs)
        inputs.ids = [ids + target for ids, target in zip(inputs.ids, targets, strict=True)]
        ids, mask = self._padded(inputs.ids)
        longest = max(map(len, targets))
        # padding is on the left, so that all continuations end at the last position
        logits = self._forward(ids, mask, self._positions(ids, mask, inputs), inputs, use_cache=False,
                               logits_to_keep=longest + 1)[:, :-1].float()  # fmt: skip
        labels = ids[:, ids.shape[1] - longest :]
        chosen = logits.gather(-1, labels[..., None])[..., 0] - logits.logsumexp(-1)
        greedy = logits.argmax(-1) == labels
        self.counted.update(prompt_tokens=prompt, image_tokens=image, encoded_tokens=encoded,
                            new_tokens=sum(map(len, targets)))  # fmt: skip
        return [
            (float(row[longest - len(t) :].double().sum()), len(t), bool(best[longest - len(t) :].all()))
            for row, best, t in zip(chosen.cpu(), greedy.cpu(), targets, strict=True)
        ]

    def _positions(self, ids: Tensor, mask: Tensor, inputs: _Inputs) -> Tensor:
        return positions(self.model, ids, mask, self._joined(inputs.in_order(GRIDS)))

    def _forward(self, ids: Tensor, mask: Tensor, places: Tensor, inputs: _Inputs, **options: Any) -> Tensor:
        """Logits; an image that several prompts show is computed once, its features put in its tokens' places."""
        given: dict[str, Any] = token_types(self.model, ids)
        if not inputs.images or not self._shares_features:
            given |= {"input_ids": ids, **self._joined(inputs.in_order())}
        else:
            embeddings = self.model.get_input_embeddings()(ids)
            is_image = ids == self.model.config.image_token_id
            features = self._features(inputs, is_image.sum(-1)).to(embeddings.dtype)
            given["inputs_embeds"] = embeddings.masked_scatter(is_image[..., None], features)
        return self.model(**given, attention_mask=mask, position_ids=places, **options).logits

    def _features(self, inputs: _Inputs, tokens_B: Tensor) -> Tensor:
        """Features of the images in the order of the prompts that show them, one row per image token."""
        counts = dict(zip(inputs.shown, tokens_B[tokens_B > 0].tolist(), strict=True))
        features = image_features(self.model, self._joined(inputs.images), [counts[i] for i in sorted(counts)])
        return torch.cat([features[image] for image in inputs.shown])

    def _joined(self, images: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {name: self._moved(value) for name, value in join_images(images).items()}

    def _padded(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Left padded token ids and their mask."""
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else int(self.stops[0])
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.device)
        return ids, mask

    def _inputs(self, batch: Sequence[Request]) -> tuple[list[int], _Inputs, dict[int, Refusal]]:
        """The batch's positions that can be put, their inputs, and what is refused. Each distinct image once, however
        many prompts ask about it."""
        images: dict[tuple[Path, ...], ImageInputs] = {}

        def tokens(request: Request) -> list[int]:
            if request.images and request.images not in images:
                images[request.images] = self.encoder.pixels(opened_images(request, self._max_pixels))
            return self.encoder.prompt(request.messages, images.get(request.images))

        ids, refused = carried(batch, tokens)
        shown = [batch[place].images for place in ids if batch[place].images]
        number = {paths: i for i, paths in enumerate(dict.fromkeys(shown))}
        inputs = _Inputs(list(ids.values()), [images[paths] for paths in number], [number[paths] for paths in shown])
        return list(ids), inputs, refused

    def _moved(self, value: Tensor) -> Tensor:
        return value.to(self.device, self.model.dtype) if value.is_floating_point() else value.to(self.device)


def _stop_ids(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """Every token that ends a response, from the model's generation configuration and the tokenizer."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    ids = {int(i) for i in (*listed, tokenizer.eos_token_id) if i is not None}
    if not ids:
        raise EngineError("neither the generation configuration nor the tokenizer names an end-of-text token")
    return ids
