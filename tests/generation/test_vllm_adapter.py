"""Adapters in peft's form by the vllm engine: what it must not pass over, and that LoRA answers as the merged model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sicog_exp.generation.engine import Decoding, Request
from sicog_exp.generation.requests import EngineError
from sicog_exp.generation.vllm_adapter import CONFIG, WEIGHTS, Adapter
from sicog_exp.models.adapters import linear_layers
from sicog_exp.models.loading import EMBEDDED_BASE, ModelSource, load_model, save_model
from sicog_exp.prompts import prompt
from sicog_exp.records import user


def adapted(home: Path, base: Path, parts: tuple[str, ...] = ("language",), **config: object) -> Path:
    """A folder with an `adapter` of random weights on a base, and the `merged` model."""
    from peft import LoraConfig, get_peft_model

    model, processor = load_model(ModelSource(str(base)))
    options = {"r": 12, "lora_alpha": 24, "target_modules": linear_layers(model, parts), **config}
    wrapped = get_peft_model(model, LoraConfig(**options))
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=noise) * 0.05)
    wrapped.save_pretrained(home / "adapter")
    save_model(wrapped.merge_and_unload(), processor, home / "merged")
    return home


def edited(adapter: Path, **values: object) -> Path:
    path = adapter / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return adapter


def test_a_checkpoint_is_no_adapter(tiny_model: Path) -> None:
    assert Adapter.read(tiny_model) is None


@pytest.mark.parametrize(("ranks", "room"), [({"r": 1}, 8), ({"r": 8}, 8), ({"r": 12}, 16),
                                             ({"r": 4, "rank_pattern": {"q_proj": 33}}, 64)])  # fmt: skip
def test_the_room_holds_the_largest_rank(tiny_model: Path, tmp_path: Path, ranks: dict, room: int) -> None:
    read = Adapter.read(edited(adapted(tmp_path, tiny_model) / "adapter", **ranks))
    assert read is not None
    assert (read.base, read.options["max_lora_rank"]) == (str(tiny_model), room)


def test_what_vllm_would_pass_over_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """It ignores adapters of the tower and the projector, and would sample from another model than the trained one."""
    tower = adapted(tmp_path, tiny_model, ("vision", "language")) / "adapter"
    with pytest.raises(EngineError, match=r"of the language model alone, here is one of .*vision_tower.*; merge it"):
        Adapter.read(tower)
    (tower / WEIGHTS).unlink()
    with pytest.raises(EngineError, match=r"no adapter_model.safetensors beside adapter_config.json"):
        Adapter.read(tower)


@pytest.mark.parametrize(("values", "message"), [({"base_model_name_or_path": None}, "names no base"),
                                                 ({"r": 513}, "rank 513, vllm takes ranks up to 512")])  # fmt: skip
def test_what_vllm_cannot_take_is_said(tiny_model: Path, tmp_path: Path, values: dict, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Adapter.read(edited(adapted(tmp_path, tiny_model) / "adapter", **values))


def greedy(engine, images: list[Path]) -> dict:
    asked = [Request(f"s{i}", "dd", (user(prompt("dd"), 1),), (image,), 1) for i, image in enumerate(images)]
    asked.append(Request("text", "text", (user("Name a red animal."),), (), 1))
    return {c.key: c for batch in engine.sample(asked, Decoding(0.0, 1.0, 32, 5, 4)) for c in batch}


def test_lora_answers_as_the_merged_model(world_images: list[Path], tmp_path: Path) -> None:
    """The embedded base: vllm's kernels know no heads as narrow as those of the tiny model."""
    pytest.importorskip("vllm", reason="vllm is not installed beside the rest")
    from sicog_exp.generation.transformers_engine import TransformersEngine
    from sicog_exp.generation.vllm_engine import VllmEngine

    home = adapted(tmp_path, EMBEDDED_BASE)
    engine = VllmEngine.from_path(home / "adapter", max_length=512, memory=0.1, enforce_eager=True)
    found = greedy(engine, world_images)
    engine.close()
    expected, base = (greedy(TransformersEngine.from_path(path), world_images)
                      for path in (home / "merged", EMBEDDED_BASE))  # fmt: skip
    assert {key: c.text for key, c in found.items()} == {key: c.text for key, c in expected.items()}
    assert sum(found[key].text != base[key].text for key in found) > len(found) / 2
    for key, candidate in found.items():
        assert candidate.logprob == pytest.approx(expected[key].logprob, abs=1e-2)


def test_an_adapter_that_vllm_refuses_is_named(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vllm is not installed beside the rest")
    from sicog_exp.generation.vllm_engine import VllmEngine

    home = adapted(tmp_path, EMBEDDED_BASE, use_dora=True)
    with pytest.raises(EngineError, match=r"adapter: vllm cannot apply the adapter .*DoRA.*merge it into its base"):
        VllmEngine.from_path(home / "adapter", max_length=512, memory=0.1, enforce_eager=True)
