"""Decoding in buffers of fixed size draws what decoding in growing ones does."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from sicog_exp.generation.decoder import GrowingSteps, Prompts
from sicog_exp.generation.engine import Decoding, Request
from sicog_exp.generation.fixed import ROUND, FixedSteps
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
    assert fixed.fits(second, COUNTS, ROOM)
    assert not fixed.fits(second, COUNTS, ROOM + ROUND)
    assert not fixed.fits(second, [1, 1, 1], ROOM)
    growing = GrowingSteps(model, second, COUNTS, ROOM)
    ours = steps_of(fixed, fixed.load(second, COUNTS))
    torch.testing.assert_close(ours, steps_of(growing, growing.logits), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="where a GPU is, the step is captured")
def test_a_step_that_cannot_be_captured_is_computed_as_usual(model: Any) -> None:
    prompts = prefilled(model, 9, 0)
    fixed, growing = FixedSteps(model, prompts, COUNTS, ROOM), GrowingSteps(model, prompts, COUNTS, ROOM)
    fixed._captures = True
    with pytest.warns(UserWarning, match="cannot be captured"):
        ours = steps_of(fixed, fixed.load(prompts, COUNTS))
    torch.testing.assert_close(ours, steps_of(growing, growing.logits), atol=1e-4, rtol=1e-4)
