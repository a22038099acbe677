"""Architectures by the vllm engine: greedy answers are those of our own engine, on miniatures with heads that vllm's
kernels know. Skipped where vllm is not installed; each loads vllm anew, which takes a minute or two."""

from __future__ import annotations

from pathlib import Path

import pytest

from sicog_exp.generation.engine import Decoding, Request
from sicog_exp.models import miniatures
from sicog_exp.prompts import prompt
from sicog_exp.records import user

GREEDY = Decoding(0.0, 1.0, 24, 5, 4)
WIDTH = 128
"""Four heads of 32 features, the narrowest that vllm's kernels for CPUs know."""


def requests(images: list[Path]) -> list[Request]:
    """Captions of one image each, a question about two, one about none."""
    captions = [Request(f"s{i}", "dd", (user(prompt("dd"), 1),), (image,), 1) for i, image in enumerate(images)]
    pair = Request("two", "cot", (user(prompt("cot", "What is red?"), 2),), tuple(images[:2]), 1)
    return [*captions, pair, Request("text", "text", (user("Name a red animal."),), (), 1)]


def sampled(engine, asked: list[Request]) -> dict:
    return {c.key: c for batch in engine.sample(asked, GREEDY) for c in batch}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "internvl", "llava_next"])
def test_greedy_answers_are_ours(family: str, world_images: list[Path], tmp_path: Path,
                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    pytest.importorskip("vllm", reason="vllm is not installed beside the rest")
    from sicog_exp.generation.transformers_engine import TransformersEngine
    from sicog_exp.generation.vllm_engine import VllmEngine

    monkeypatch.setattr(miniatures, "WIDTH", WIDTH)
    folder, asked = miniatures.save(miniatures.FAMILIES[family], tmp_path / family), requests(world_images[:5])
    engine = VllmEngine.from_path(folder, max_length=1024, memory=0.05, enforce_eager=True)
    try:
        found = sampled(engine, asked)
    finally:
        engine.close()
    ours = TransformersEngine.from_path(folder)
    expected = sampled(ours, asked)
    assert {key: c.text for key, c in found.items()} == {key: c.text for key, c in expected.items()}
    for key, candidate in found.items():
        assert candidate.logprob == pytest.approx(expected[key].logprob, abs=1e-2)
    assert (engine.counted["prompt_tokens"], engine.counted["image_tokens"]) == (
        ours.counted["prompt_tokens"], ours.counted["image_tokens"])  # fmt: skip
