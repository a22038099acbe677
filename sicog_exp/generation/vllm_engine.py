"""The vllm package as an engine: one request asks for all candidates of a prompt, and its images are encoded once."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sicog_exp.data.chat import ChatEncoder, ImageInputs
from sicog_exp.generation.batched import BatchedEngine, carried, opened_images, request_seed, sampled_once
from sicog_exp.generation.engine import MAX_PIXELS, Decoding, Likelihood, Refusal, Request, Sampled, candidate_seed
from sicog_exp.generation.orphans import children_end_with_us
from sicog_exp.generation.requests import EngineError, keys_of
from sicog_exp.generation.vllm_adapter import MERGE, Adapter
from sicog_exp.models.loading import ModelSource, load_processor
from sicog_exp.models.vllm_names import vllm_folder
from sicog_exp.records import Candidate

if TYPE_CHECKING:
    from sicog_exp.recipe import EngineConfig, ModelConfig

MOST_CANDIDATES = 64
"""Candidates of one request; a request for more is put as several."""


class VllmEngine(BatchedEngine):
    """Samples from a model that vllm loads: a checkpoint, or a LoRA adapter in peft's form on its base.

    vllm counts a request's seeds up from its first candidate's, so that a candidate's noise is its own; the last bits
    of its probabilities depend on what vllm computes beside it, and with them, now and then, a token. Log-probabilities
    are the untempered model's.
    """

    def __init__(self, llm: Any, encoder: ChatEncoder, image_token: int, max_pixels: int = MAX_PIXELS,
                 lora: Any = None) -> None:  # fmt: skip
        super().__init__()
        self._llm, self._encoder, self._image_token, self._max_pixels = llm, encoder, image_token, max_pixels
        self._lora = lora
        self._home: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    def from_path(cls, path: str | Path, dtype: str = "float32", trust_remote_code: bool = False, memory: float = 0.9,
                  max_length: int | None = None, max_pixels: int = MAX_PIXELS,
                  **options: Any) -> VllmEngine:  # fmt: skip
        """Load a folder or hub name, or a folder with an adapter. `options` go to `vllm.LLM`. Raises EngineError."""
        adapter = Adapter.read(Path(path))
        base = adapter.base if adapter else str(path)
        if adapter:
            options = {**adapter.options, **options}
        processor = load_processor(ModelSource(base, trust_remote_code))
        home = tempfile.TemporaryDirectory(prefix="sicog-vllm-")
        weights = str(vllm_folder(Path(base), Path(home.name))) if Path(base).is_dir() else base
        llm = _load(base, weights, dtype=dtype, trust_remote_code=trust_remote_code, gpu_memory_utilization=memory,
                    max_model_len=max_length, seed=0, **options)  # fmt: skip
        encoder = ChatEncoder(processor)
        token = encoder.tokenizer.convert_tokens_to_ids(encoder.image_token)
        engine = cls(llm, encoder, token, max_pixels, _with_adapter(llm, adapter) if adapter else None)
        engine._home = home  # where the copy of the weights lies, if any, as long as the engine lives
        return engine

    @classmethod
    def from_recipe(cls, path: str | Path, model: ModelConfig, engine: EngineConfig,
                    max_pixels: int = MAX_PIXELS) -> VllmEngine:  # fmt: skip
        """A generation's model, loaded as the recipe says. Raises EngineError."""
        return cls.from_path(path, model.generation_dtype, model.trust_remote_code, engine.memory, engine.max_length,
                             max_pixels)  # fmt: skip

    def close(self) -> None:
        """End vllm's own process, which holds the weights, so that training finds the GPU free."""
        self._llm.llm_engine.engine_core.shutdown()
        if self._home:
            self._home.cleanup()

    def finished(self, batches: Sequence[Sequence[Request]], decoding: Decoding) -> Iterator[Sampled]:
        """The batches, one after the other."""
        for batch in batches:
            made, refused = carried(batch, self._prompt)
            parts = [(i, part) for i in made for part in _parts(batch[i])]
            given = self._generate([made[i] for i, _ in parts],
                                   [_params(part, decoding) for _, part in parts])  # fmt: skip
            candidates = [candidate for (_, part), output in zip(parts, given, strict=True)
                          for candidate in self._candidates(part, output.outputs, decoding)]  # fmt: skip
            read = {i: output.prompt_token_ids for (i, _), output in zip(parts, given, strict=True)}
            prompt, image, encoded = self._counts([batch[i] for i in made], [read[i] for i in made])
            yield Sampled(candidates, prompt, 0.0, image, encoded, tuple(refused.values()))

    def log_likelihood(self, requests: Sequence[Request], continuations: Sequence[str]) -> list[Likelihood | Refusal]:
        """See the protocol. The end-of-turn token is not part of a continuation, and a request's count is ignored."""
        from vllm import SamplingParams

        made, refused = carried(requests, self._prompt)
        targets = [self._encoder.tokenizer.encode(continuations[i], add_special_tokens=False) for i in made]
        for prompt, target in zip(made.values(), targets, strict=True):
            prompt["prompt_token_ids"] = prompt["prompt_token_ids"] + target
        params = [SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1) for _ in made]
        given = self._generate(list(made.values()), params)
        found: dict[int, Likelihood | Refusal] = {**refused}
        for i, output, target in zip(made, given, targets, strict=True):
            found[i] = _scored(output.prompt_logprobs, target)
        return [found[i] for i in range(len(requests))]

    def _generate(self, prompts: list[Any], params: list[Any]) -> list[Any]:
        if not prompts:
            return []
        try:
            return self._llm.generate(prompts, params, use_tqdm=False, lora_request=self._lora)
        except ValueError as error:
            said = " ".join(str(error).split())[:500]
            raise EngineError(f"vllm refuses a prompt of the batch ({said}); if it is too long, raise "
                              "engine.max_length or lower sampling.max_new_tokens") from error  # fmt: skip

    def _prompt(self, request: Request) -> dict[str, Any]:
        """The prompt's tokens with one image token an image, for which vllm puts as many as the model takes."""
        images = opened_images(request, self._max_pixels)
        places = ImageInputs({}, [self._encoder.image_token] * len(images))
        ids = self._encoder.prompt(request.messages, places)
        return {"prompt_token_ids": ids, **({"multi_modal_data": {"image": images}} if images else {})}

    def _candidates(self, request: Request, outputs: Sequence[Any], decoding: Decoding) -> Iterator[Candidate]:
        """A greedy output serves all indices. Texts are decoded here, as other engines' are: vllm leaves out the bytes
        of a character that the last token does not end."""
        for i, (sample_id, kind, index) in enumerate(keys_of(request)):
            made = outputs[i if len(outputs) > 1 else 0]
            text = self._encoder.tokenizer.decode(list(made.token_ids), skip_special_tokens=True)
            seed = candidate_seed(decoding.seed, sample_id, kind, index)
            reason: Literal["stop", "length"] = "stop" if made.finish_reason == "stop" else "length"
            yield Candidate(sample_id, request.kind, index, text.strip(), seed, float(made.cumulative_logprob),
                            len(made.token_ids), reason)  # fmt: skip

    def _counts(self, batch: Sequence[Request], ids: Sequence[Sequence[int]]) -> tuple[int, int, int]:
        """(all, images', encoded) tokens of a batch's prompts; vllm keeps what it encoded of an image."""
        shown = [list(row).count(self._image_token) for row in ids]
        distinct = {request.images: count for request, count in zip(batch, shown, strict=True)}
        return sum(map(len, ids)), sum(shown), sum(distinct.values())


def _load(name: str, weights: str, **options: Any) -> Any:
    # no report of use to anyone, and no pages of log lines in a run's display
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        from vllm import LLM
    except ImportError as error:
        raise EngineError(f"engine.kind=vllm needs the vllm package ({error}): pip install 'sicog-exp[vllm]', in an "
                          "environment with a GPU") from None  # fmt: skip
    try:
        with children_end_with_us():
            return LLM(model=weights, **options)
    except (ValueError, RuntimeError, KeyError, AttributeError) as error:
        said = " ".join(str(error).split())[:500]
        raise EngineError(f"{name}: vllm cannot load it ({said}). What it printed above says why; where memory is "
                          "short, lower engine.memory or engine.max_length; engine.kind=transformers loads every model "
                          "that trains here") from error  # fmt: skip


def _with_adapter(llm: Any, adapter: Adapter) -> Any:
    """What names the adapter in a request, once vllm has it: an adapter that is loaded by the first request and refused
    ends vllm's process. Raises EngineError."""
    from vllm.lora.request import LoRARequest

    lora = LoRARequest(adapter.folder.name, 1, str(adapter.folder.resolve()))
    try:
        llm.llm_engine.add_lora(lora)
    except Exception as error:  # vllm's process sends back a bare Exception, whatever it met
        llm.llm_engine.engine_core.shutdown()
        raise EngineError(f"{adapter.folder}: vllm cannot apply the adapter ({' '.join(str(error).split())[:500]}); "
                          f"{MERGE}") from error  # fmt: skip
    return lora


def _parts(request: Request) -> Iterator[Request]:
    """The request itself, unless it asks for very many candidates."""
    for first in range(0, request.count, MOST_CANDIDATES):
        count = min(MOST_CANDIDATES, request.count - first)
        yield replace(request, count=count, first_index=request.first_index + first)


def _params(request: Request, decoding: Decoding) -> Any:
    from vllm import SamplingParams

    return SamplingParams(n=sampled_once(request, decoding), temperature=decoding.temperature, top_p=decoding.top_p,
                          max_tokens=decoding.max_new_tokens, seed=request_seed(request, decoding),
                          logprobs=0, detokenize=False)  # fmt: skip


def _scored(prompt_logprobs: Sequence[Any], target: Sequence[int]) -> tuple[float, int, bool]:
    """(summed log-probability, tokens, whether each was the most likely) of the prompt's last tokens."""
    rows = prompt_logprobs[len(prompt_logprobs) - len(target) :]
    found = [row[token] for row, token in zip(rows, target, strict=True)]
    return sum(one.logprob for one in found), len(target), all(one.rank == 1 for one in found)
