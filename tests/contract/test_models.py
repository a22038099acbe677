"""The model contract: what we save, transformers loads with no code of ours; what cannot be used is said so."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sicog_exp.data.chat import ChatEncoder
from sicog_exp.data.scenes import make_scene, render
from sicog_exp.models.compose import fresh_projector
from sicog_exp.models.loading import (
    EMBEDDED_BASE,
    PARTS,
    ModelError,
    ModelSource,
    load_model,
    load_processor,
    part_parameters,
    positions_per_image_token,
    resolve_base,
    save_model,
    work_of,
)
from sicog_exp.models.shapes import read_shape
from sicog_exp.records import user

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@pytest.fixture(scope="module")
def saved(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_model(*load_model(ModelSource(str(tiny_model))), folder)
    return folder


def inputs_of(processor: Any) -> dict[str, torch.Tensor]:
    encoder = ChatEncoder(processor)
    pixels = encoder.pixels([render(make_scene(1, "base", 0), 1)])
    ids = torch.tensor([encoder.prompt((user("Is there a dog?", 1),), pixels)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels["pixel_values"]}


def test_transformers_loads_what_we_save_with_the_same_logits(tiny_model: Path, saved: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = load_model(ModelSource(str(tiny_model)))
    other = AutoModelForImageTextToText.from_pretrained(saved).eval()
    given = inputs_of(processor)
    reloaded = inputs_of(AutoProcessor.from_pretrained(saved))
    assert all(torch.equal(given[name], reloaded[name]) for name in given)
    with torch.no_grad():
        assert torch.equal(model(**given).logits, other(**reloaded).logits)


def test_no_code_of_ours_is_needed(saved: Path) -> None:
    code = f"""
import sys
sys.modules["sicog_exp"] = None
from transformers import AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained({str(saved)!r})
print(type(AutoModelForImageTextToText.from_pretrained({str(saved)!r})).__name__)
talk = [dict(role="user", content=[dict(type="image"), dict(type="text", text="Is there a dog?")])]
print(repr(processor.apply_chat_template(talk, add_generation_prompt=True)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    name, prompt = done.stdout.splitlines()
    assert name == "LlavaForConditionalGeneration"
    assert "<|user|><image>Is there a dog?<|assistant|>" in prompt


def test_weights_are_safetensors_and_nothing_is_a_pickle(saved: Path) -> None:
    files = [file.name for file in saved.iterdir()]
    assert "model.safetensors" in files
    assert "config.json" in files
    assert not [name for name in files if name.endswith(PICKLES)]
    assert all(file.read_bytes()[:2] != b"\x80\x04" for file in saved.iterdir())


def test_saving_twice_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    save_model(*load_model(ModelSource(str(saved))), tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == {f.name: f.read_bytes() for f in saved.iterdir()}


def test_parts_hold_every_parameter_once(tiny_model: Path) -> None:
    model, _ = load_model(ModelSource(str(tiny_model)))
    parts = part_parameters(model)
    assert list(parts) == list(PARTS)
    every = [id(parameter) for group in parts.values() for parameter in group]
    assert len(set(every)) == len(every)
    assert set(every) == {id(parameter) for parameter in model.parameters()}


def test_a_model_without_known_parts_is_named(tiny_model: Path) -> None:
    model, _ = load_model(ModelSource(str(tiny_model)))
    del model.model.multi_modal_projector
    with pytest.raises(ModelError, match="LlavaForConditionalGeneration: no projector found"):
        part_parameters(model)


def test_a_parameter_outside_the_parts_is_named(tiny_model: Path) -> None:
    model, _ = load_model(ModelSource(str(tiny_model)))
    model.model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"parameters outside its known parts: \['model\.extra"):
        part_parameters(model)


def test_work_counts_each_multiplying_parameter(tiny_model: Path) -> None:
    model, _ = load_model(ModelSource(str(tiny_model)))
    work = work_of(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert work.vision + work.projector + work.language + work.head == total
    body = 10 * work.language + 4 * (work.vision + work.projector)
    assert work.sampling(7, 4, 3) == 2 * (body + 3 * work.head)
    assert work.training(10, 4, 3) == 3 * work.sampling(7, 4, 3)
    assert work.training(10, 4, 3, (), tuple(PARTS)) == 2 * work.sampling(7, 4, 3), "adapters: no weights' gradients"
    assert work.training(10, 4, 3, again=True) == 4 * work.sampling(7, 4, 3)


def test_positions_behind_an_image_token() -> None:
    from types import SimpleNamespace as Config

    tower = Config(image_size=896, patch_size=14)
    assert positions_per_image_token(Config(vision_config=tower, mm_tokens_per_image=256)) == 16  # Gemma 3
    assert positions_per_image_token(Config(vision_config=Config(spatial_merge_size=2))) == 4  # Qwen-VL
    assert positions_per_image_token(Config(vision_config=tower, scale_factor=3)) == 9  # SmolVLM
    many = Config(vision_config=Config(image_size=[448, 448], patch_size=[14, 14]), image_seq_length=256)
    assert positions_per_image_token(Config(**vars(many), downsample_ratio=0.5)) == 4  # InternVL


TRAINED = [("vision", "projector", "language"), ("projector",), ("language",), ("projector", "language")]


@pytest.mark.parametrize("trained", TRAINED, ids="+".join)
def test_training_s_flops_are_those_that_torch_counts(trained: tuple[str, ...]) -> None:
    """Torch's count holds attention's products too, which the formula leaves out."""
    from tiny import turns
    from torch.utils.flop_counter import FlopCounterMode

    from sicog_exp.data.mixture import Row, collate
    from sicog_exp.recipe import StageConfig
    from sicog_exp.training.modules import SupervisedFineTuning

    model, processor = load_model(ModelSource(str(EMBEDDED_BASE)))
    encoder, rows = ChatEncoder(processor), []
    for scene, messages, _ in turns("base", 4):
        pixels = encoder.pixels([render(scene, 1)])
        rows.append(Row(encoder.example(messages, pixels, 512), pixels, "annotated"))
    rates = {f"{part}_lr": 1e-3 if part in trained else 0.0 for part in PARTS}
    stage, batch = SupervisedFineTuning(model, StageConfig(**rates)), collate(rows, 0)
    with FlopCounterMode(display=False) as counter:
        stage.batch_loss(batch)[0].backward()
    done = stage.work([batch])
    padding = batch["input_ids"].numel() - done["tokens"]
    formula = work_of(model).training(done["tokens"] + padding, done["image_tokens"], done["new_tokens"], trained)
    assert 0.85 < formula / counter.get_total_flops() < 1.03


def test_sampling_s_flops_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, processor = load_model(ModelSource(str(EMBEDDED_BASE)))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs_of(processor), logits_to_keep=1)
    read = len(inputs_of(processor)["input_ids"][0])
    assert 0.9 < work_of(model).sampling(read, 9, 1) / counter.get_total_flops() < 1.1


def test_the_base_s_name() -> None:
    assert resolve_base("embedded") == str(EMBEDDED_BASE)
    assert resolve_base("/somewhere/else") == "/somewhere/else"


# What cannot be used.


def _only_a_pickle(folder: Path) -> None:
    model, _ = load_model(ModelSource(str(folder)))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "megabrain"}))


def _text_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config["text_config"], "model_type": "qwen2"}))


def _torn_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def _part_of_the_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "projector" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def _no_processor(folder: Path) -> None:
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).unlink(missing_ok=True)


def _torn_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "lla')


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (_only_a_pickle, "safetensors"),
    (_unknown_architecture, "cannot load it as an image-text-to-text model"),
    (_text_model, "cannot load it as an image-text-to-text model"),
    (_torn_weights, "cannot load it"),
    (_part_of_the_weights, r"lacks \d+ weights of its model, such as .*projector"),
    (_no_processor, "processor"),
    (_torn_config, "cannot load it"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[d.__name__.strip("_") for d, _ in DAMAGES])
def test_an_unusable_model_is_an_error_that_names_it(
    damage: Callable[[Path], None], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    damage(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(ModelSource(str(folder)))
    assert str(folder) in str(caught.value)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Requests to a hub that nobody reaches."""
    from huggingface_hub import constants, utils

    made: list[str] = []

    class Session:
        def __getattr__(self, method: str) -> Any:
            def request(*given: Any, **_: Any) -> None:
                made.append(f"{method} {given}")
                raise ConnectionError

            return request

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(utils, "get_session", Session)
    return made


@pytest.mark.parametrize("load", [load_model, load_processor])
@pytest.mark.parametrize("name", ["nope", "./nope", "a/b/c", "/nope", "nothing here"])
def test_nothing_there_is_said_without_asking_a_hub(name: str, load: Any, asked: list[str]) -> None:
    with pytest.raises(ModelError, match=f"^{name}: no such folder"):
        load(ModelSource(name))
    assert not asked


@pytest.mark.parametrize("load", [load_model, load_processor, lambda source: read_shape(source.path)])
def test_a_hub_that_nobody_reaches_is_asked_once(load: Any, asked: list[str]) -> None:
    with pytest.raises(ModelError, match=r"^owner/nope: no .* does not answer \(ConnectionError\)"):
        load(ModelSource("owner/nope"))
    assert len(asked) == 1


def test_what_the_hub_gave_before_needs_no_hub(tiny_model: Path, tmp_path: Path, asked: list[str],
                                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    kept = tmp_path / "models--owner--kept"
    shutil.copytree(tiny_model, kept / "snapshots" / "0123abcd")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0123abcd")
    assert load_processor(ModelSource("owner/kept")).tokenizer
    assert len(asked) == 1


def test_a_pickle_is_never_opened(tiny_model: Path, tmp_path: Path) -> None:
    """A pytorch_model.bin that would run code when unpickled does not get the chance."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "owned").encode() + b"'\ntR.")
    with pytest.raises(ModelError):
        load_model(ModelSource(str(folder)))
    assert not (tmp_path / "owned").exists()


def projector(model: Any) -> torch.Tensor:
    return torch.cat([parameter.flatten() for parameter in part_parameters(model)["projector"]])


def test_a_renewed_projector_is_new_seeded_and_alone(tiny_model: Path) -> None:
    before, _ = load_model(ModelSource(str(tiny_model)))
    drawn, state = {}, torch.get_rng_state()
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        model, _ = load_model(ModelSource(str(tiny_model)))
        fresh_projector(model, seed)
        drawn[name] = projector(model)
        for part in ("vision", "language"):
            assert all(map(torch.equal, part_parameters(before)[part], part_parameters(model)[part]))
    assert torch.equal(drawn["one"], drawn["again"])
    for other in (drawn["other"], projector(before)):
        assert torch.isclose(drawn["one"], other).float().mean() < 0.05  # biases begin at 0
    assert torch.equal(torch.get_rng_state(), state)
