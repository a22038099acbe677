"""Decoding in buffers of fixed size draws what decoding in growing ones does."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from captured import Replayed, emulate
from torch import Tensor
from transformers import DynamicCache

from sicog_exp.generation import drawing
from sicog_exp.generation.decoder import Decoder, Drawn, GrowingSteps, Prompts
from sicog_exp.generation.drawing import noise
from sicog_exp.generation.engine import Decoding, Request
from sicog_exp.generation.fixed import ROUND, FixedDecoder, FixedSteps
from sicog_exp.generation.transformers_engine import TransformersEngine
from sicog_exp.prompts import prompt
from sicog_exp.records import Candidate, user

COUNTS, ROOM = [2, 1, 3], 5


@pytest.fixture(scope="module")
def requests(world_images: list[Path]) -> list[Request]:
    words = ("Where is the dog?", "Where is the red dog, and where is the other one?", "What is red?")
    messages = [user(prompt("cot", text), 1) for text in words]
    return [Request(f"s{i}", "cot", (messages[i % 3],), (world_images[i],), 3) for i in range(6)]


def sampled(path: Path, requests: list[Request], static_cache: bool, device: str = "cpu") -> list[Candidate]:
    engine = TransformersEngine.from_path(path, device=device)
    engine = TransformersEngine(engine.model, engine.encoder.processor, device, static_cache=static_cache)
    return [c for batch in engine.sample(requests, Decoding(1.0, 0.9, 90, 3, 2)) for c in batch]


def assert_same(ours: list[Candidate], wanted: list[Candidate]) -> None:
    assert [(c.key, c.text, c.tokens, c.finish_reason) for c in ours] == [
        (c.key, c.text, c.tokens, c.finish_reason) for c in wanted]  # fmt: skip
    assert [c.logprob for c in ours] == pytest.approx([c.logprob for c in wanted], abs=1e-3)


def test_candidates_are_the_same(tiny_model: Path, requests: list[Request]) -> None:
    """Some end early, some at the limit; buffers are longer than the prompts by more than one rounding."""
    torch.set_num_threads(1)
    wanted = sampled(tiny_model, requests, False)
    assert len({c.tokens for c in wanted}) > 3
    assert_same(sampled(tiny_model, requests, True), wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="captured steps need an NVIDIA GPU")
def test_a_captured_step_says_the_same(tiny_model: Path, requests: list[Request]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # it would be captured, or say that it cannot be
        assert_same(sampled(tiny_model, requests, True, "cuda"), sampled(tiny_model, requests, False, "cuda"))


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return TransformersEngine.from_path(tiny_model).model


@torch.inference_mode()
def prefilled(model: Any, width: int, seed: int) -> Prompts:
    """Three prompts of random words, the first one shorter by two."""
    ids = torch.randint(5, 200, (3, width), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache()
    logits = model(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache).logits[:, -1]
    return Prompts(cache, logits, mask, places.amax(-1) + 1)


@torch.inference_mode()
def steps_of(steps: Any, logits: Tensor) -> list[Tensor]:
    found = [logits]
    for _ in range(ROOM - 1):
        found.append(steps(found[-1].argmax(-1)).clone())
    return found


@pytest.mark.parametrize("widths", [(9, 9), (9, 14), (14, 9)])
def test_buffers_serve_another_batch(model: Any, widths: tuple[int, int]) -> None:
    """What the batch before left in them is hidden."""
    first, second = (prefilled(model, width, seed) for seed, width in enumerate(widths))
    fixed = FixedSteps(model, first, COUNTS, ROOM)
    steps_of(fixed, fixed.load(first, COUNTS))
    growing = GrowingSteps(model, second, COUNTS, ROOM)
    ours = steps_of(fixed, fixed.load(second, COUNTS))
    torch.testing.assert_close(ours, steps_of(growing, growing.logits), atol=1e-4, rtol=1e-4)


STOPS = torch.tensor([3, *range(40, 90)])
DECODING = Decoding(1.5, 0.9, 12, 0, 8)


def fixed_decoder(model: Any, prompts: Prompts) -> FixedDecoder:
    with torch.inference_mode():
        return FixedDecoder(model, Decoder(STOPS, DECODING), prompts, COUNTS)


@torch.inference_mode()
def both(model: Any, fixed: FixedDecoder, prompts: Prompts, seed: int) -> tuple[Drawn, Drawn]:
    """What fixed and growing buffers draw behind the same prompts from the same noise."""
    uniforms = noise(range(seed, seed + sum(COUNTS)), DECODING.max_new_tokens)
    growing = GrowingSteps(model, prompts, COUNTS, DECODING.max_new_tokens)
    wanted = Decoder(STOPS, DECODING).run(growing, growing.logits, uniforms)
    return fixed.run(prompts, COUNTS, uniforms), wanted


def assert_drawn_alike(found: Drawn, wanted: Drawn) -> None:
    assert torch.equal(found.lengths, wanted.lengths)
    assert torch.equal(found.stopped, wanted.stopped)
    counts = torch.arange(DECODING.max_new_tokens) < found.lengths[:, None]
    assert torch.equal(found.tokens[counts], wanted.tokens[counts])
    torch.testing.assert_close(found.logprobs, wanted.logprobs, atol=1e-3, rtol=0)


def test_which_batches_fit(model: Any) -> None:
    """Other shapes do not, nor does what a captured step has as constants."""
    prompts = prefilled(model, 9, 0)
    fixed = fixed_decoder(model, prompts)
    assert fixed.fits(Decoder(STOPS, Decoding(1.5, 0.9, 12, 7, 2)), prefilled(model, 14, 1), COUNTS)
    assert not fixed.fits(Decoder(STOPS, DECODING), prompts, [1, 1, 1])
    assert not fixed.fits(Decoder(STOPS.clone(), DECODING), prompts, COUNTS)
    for other in (Decoding(1.0, 0.9, 12, 0, 8), Decoding(1.5, 1.0, 12, 0, 8), Decoding(1.5, 0.9, 12 + ROUND, 0, 8)):
        assert not fixed.fits(Decoder(STOPS, other), prompts, COUNTS)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_reads_and_writes_what_stays_in_place(model: Any, dtype: torch.dtype, emulated: None) -> None:
    """Recorded once, its operations draw for three batches what computing draws; nothing in them waits."""
    model = copy.deepcopy(model).to(dtype)
    prompts = [prefilled(model, width, seed) for seed, width in enumerate((9, 14, 11))]
    fixed, computed = (fixed_decoder(model, prompts[0]) for _ in range(2))
    computed._captures = False
    for seed, each in enumerate(prompts):
        uniforms = noise(range(seed, seed + sum(COUNTS)), DECODING.max_new_tokens)
        with torch.inference_mode():
            found, wanted = (decoder.run(each, COUNTS, uniforms) for decoder in (fixed, computed))
        assert all(map(torch.equal, found.each(), wanted.each()))
        assert len({int(n) for n in found.lengths}) > 1, "some end early"
    graph: Any = fixed._graph
    assert Replayed.made == 1
    assert graph.replays > DECODING.max_new_tokens


@pytest.mark.skipif(torch.cuda.is_available(), reason="where a GPU is, the step is captured")
def test_a_step_that_cannot_be_captured_is_computed_as_usual(model: Any) -> None:
    fixed = fixed_decoder(model, prefilled(model, 9, 0))
    fixed._captures = True
    with pytest.warns(UserWarning, match="cannot be captured"):
        assert_drawn_alike(*both(model, fixed, prefilled(model, 9, 0), 0))


def test_a_step_that_waits_is_not_captured(model: Any, emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual draw looks at values."""
    monkeypatch.setattr(drawing, "on_gpu", lambda tensor: False)
    fixed = fixed_decoder(model, prefilled(model, 9, 0))
    with pytest.warns(UserWarning, match="cannot be captured"):
        both(model, fixed, prefilled(model, 9, 0), 0)


def test_a_shortage_of_memory_is_no_step_that_cannot_be_captured(model: Any, emulated: None,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Nor is it where the end of the capture fails behind it: batches are halved for it."""

    @contextmanager
    def short(graph: Any, capture_error_mode: str) -> Iterator[None]:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        except RuntimeError:
            raise RuntimeError("capture was invalidated")  # noqa: B904 - as torch does
        yield

    monkeypatch.setattr(torch.cuda, "graph", short)
    fixed = fixed_decoder(model, prefilled(model, 9, 0))
    with pytest.raises(RuntimeError, match="invalidated"):
        both(model, fixed, prefilled(model, 9, 0), 0)
    assert fixed._captures
