"""A composed model is its parts, unchanged, with a projector of its own; it runs and trains like any other."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image

from sicog_exp.data.chat import ChatEncoder
from sicog_exp.data.mixture import Row, collate
from sicog_exp.generation.engine import Decoding, Request
from sicog_exp.generation.transformers_engine import TransformersEngine
from sicog_exp.models.compose import compose, fresh_projector, load_language, load_tower
from sicog_exp.models.loading import ModelError, ModelSource, load_model, part_of, save_model
from sicog_exp.models.miniatures import FAMILIES, TOWERS, save, text_values, tokenizer
from sicog_exp.origins import base_step
from sicog_exp.recipe import ModelConfig, Recipe, StageConfig
from sicog_exp.records import Message, user
from sicog_exp.store import Store
from sicog_exp.training.modules import SupervisedFineTuning

CHATML = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
          "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")  # fmt: skip
"""A text model's template: it knows of no parts."""


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    tok = tokenizer("<|im_end|>", CHATML, ("<|im_start|>",))
    torch.manual_seed(5)
    tf.LlamaForCausalLM(tf.LlamaConfig(**text_values(tok, tie_word_embeddings=True))).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def clip(folder: Path) -> None:
    save(TOWERS["clip"], folder)


def siglip(folder: Path) -> None:
    save(TOWERS["siglip"], folder)


def llava(folder: Path) -> None:
    model, processor = FAMILIES["llava"]()
    save_model(model, processor, folder)


@pytest.fixture(scope="module", params=[clip, siglip, llava], ids=lambda make: make.__name__)
def vision(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    torch.manual_seed(6)
    request.param(folder)
    return folder


def composed(language: Path, vision: Path, seed: int = 1) -> tuple[Any, Any]:
    return compose(load_language(str(language)), load_tower(str(vision)), seed)


def test_parts_are_unchanged_and_saved_it_loads(language: Path, vision: Path, tmp_path: Path) -> None:
    save_model(*composed(language, vision), tmp_path)
    model, _ = load_model(ModelSource(str(tmp_path)))
    text = tf.AutoModelForCausalLM.from_pretrained(language).state_dict()
    for name, weight in text.items():
        rest = name.removeprefix("model.")
        ours = model.state_dict()[f"model.language_model.{rest}" if rest != name else name]
        assert torch.equal(ours[: len(weight)], weight)  # the image's token is new
    tower = load_tower(str(vision)).model.state_dict()
    assert all(torch.equal(model.state_dict()[f"model.vision_tower.{name}"], w) for name, w in tower.items())


def test_the_projector_is_the_seed_s(language: Path, vision: Path) -> None:
    models = [composed(language, vision, seed)[0] for seed in (1, 1, 2)]
    one, again, other = (model.model.multi_modal_projector.linear_1.weight for model in models)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert 0 < float(one.detach().std()) < 1


def test_it_answers_about_a_picture_and_learns(language: Path, vision: Path, tmp_path: Path) -> None:
    model, processor = composed(language, vision)
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(picture)
    engine = TransformersEngine(model, processor)
    asked = Request("a", "direct", (user("Is there a dog?", 1),), (picture,), 2)
    assert len(next(iter(engine.sample([asked], Decoding(1.0, 1.0, 5, 0, 1))))) == 2

    encoder = ChatEncoder(processor)
    inputs = encoder.pixels([Image.open(picture)])
    example = encoder.example((user("Is there a dog?", 1), Message("assistant", "yes")), inputs, 512)
    text = encoder.tokenizer.decode(example.input_ids).replace("<image>" * 16, "<image>")
    assert text == "<|im_start|>user\n<image>\nIs there a dog?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    module = SupervisedFineTuning(model, StageConfig(vision_lr=0.0, language_lr=0.0)).train()
    optimizer = torch.optim.AdamW(module.trained_parameters, lr=1e-2)
    losses = []
    for _ in range(8):
        loss, _ = module.batch_loss(collate([Row(example, inputs, "x")], 0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1


def test_a_recipe_s_parts_make_its_base(language: Path, vision: Path, tmp_path: Path) -> None:
    """The same step for the same files wherever they lie, another one for another seed."""
    recipe = Recipe(model=ModelConfig(language=str(language), vision=str(vision)))
    artifact = Store(tmp_path / "store").run(base_step(recipe))
    model, _ = load_model(ModelSource(str(artifact.path)))
    parts = load_language(str(language)), load_tower(str(vision))
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), compose(*parts, 0)[0].parameters(), strict=True))
    moved = shutil.copytree(vision, tmp_path / "moved")
    model_config = replace(recipe.model, vision=str(moved))
    assert base_step(replace(recipe, model=model_config)).identity == base_step(recipe).identity
    assert base_step(replace(recipe, seed=1)).identity != base_step(recipe).identity


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "smolvlm"])
def test_a_fresh_projector_of_any_architecture(family: str) -> None:
    model, _ = FAMILIES[family]()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    seen = []
    for seed in (1, 1, 2):
        fresh_projector(model, seed)
        seen.append({name: weight.detach().clone() for name, weight in model.named_parameters()})
    changed = {name for name, weight in before.items() if not torch.equal(weight, seen[0][name])}
    assert changed
    assert {part_of(name) for name in changed} == {"projector"}
    assert all(torch.equal(weight, seen[1][name]) for name, weight in seen[0].items())
    assert any(not torch.equal(weight, seen[2][name]) for name, weight in seen[0].items())


def test_what_is_no_part_is_named(language: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.language=.*nowhere: transformers cannot load it"):
        load_language(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"model\.vision=.*: no vision tower"):
        load_tower(str(language))
    tok = tf.AutoTokenizer.from_pretrained(language)
    tok.chat_template = None
    tf.AutoModelForCausalLM.from_pretrained(language).save_pretrained(tmp_path / "plain")
    tok.save_pretrained(tmp_path / "plain")
    with pytest.raises(ModelError, match="no chat template; take an instruct model"):
        load_language(str(tmp_path / "plain"))
