"""The base's stages, one step each, through the store: what each one trains, and that the result is a whole model."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from sicog_exp import base
from sicog_exp.base import BaseRecipe, SceneTurns, ShapeConfig, base_steps, corpus, publish
from sicog_exp.data.chat import ChatEncoder
from sicog_exp.data.questions import base_turns
from sicog_exp.data.scenes import make_scene, rng_for
from sicog_exp.models.loading import ModelSource, load_model, part_parameters
from sicog_exp.recipe import ModelConfig, StageConfig
from sicog_exp.records import turns_conversation
from sicog_exp.store import Artifact, Store, file_checksum


def stage(**rates: float) -> StageConfig:
    frozen = {"vision_lr": 0.0, "projector_lr": 0.0, "language_lr": 0.0}
    return StageConfig(steps=2, batch_size=4, micro_batch_size=2, max_length=512, **{**frozen, **rates})


RECIPE = BaseRecipe(
    model=ModelConfig(device="cpu", threads=1), turns=2,
    shape=ShapeConfig(vocab_size=400, width=16, vision_layers=1, language_layers=1, heads=2),
    vision=stage(vision_lr=1e-3), language=stage(language_lr=1e-3), align=stage(projector_lr=1e-3),
    instruct=stage(vision_lr=1e-3, projector_lr=1e-3, language_lr=1e-3))  # fmt: skip


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "corpus", lambda seed: corpus(seed, 40))
        return base_steps(RECIPE, Store(tmp_path_factory.mktemp("store")))


def moved(one: Artifact, two: Artifact) -> set[str]:
    parts = [part_parameters(load_model(ModelSource(str(artifact.path)))[0]) for artifact in (one, two)]
    return {part for part in parts[0] if not all(map(torch.equal, parts[0][part], parts[1][part]))}


def test_each_stage_trains_its_parts_alone(steps: dict[str, Artifact]) -> None:
    assert list(steps) == ["initial", "vision", "language", "align", "instruct"]
    assert moved(steps["initial"], steps["vision"]) == {"vision"}
    assert moved(steps["initial"], steps["language"]) == {"language"}
    assert moved(steps["language"], steps["align"]) == {"vision", "projector"}
    assert moved(steps["vision"], steps["align"]) == {"language", "projector"}
    assert moved(steps["align"], steps["instruct"]) == {"vision", "projector", "language"}


def test_the_same_recipe_makes_the_same_initial_model(steps: dict[str, Artifact], tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(base, "corpus", lambda seed: corpus(seed, 40))
    again = base_steps(RECIPE, Store(tmp_path), until="vision")
    assert again["initial"].content == steps["initial"].content
    assert again["vision"].content == steps["vision"].content
    assert set(again) == {"initial", "vision"}


def test_publish_copies_a_whole_model(steps: dict[str, Artifact], tmp_path: Path) -> None:
    publish(steps["instruct"], tmp_path / "base")
    outputs = steps["instruct"].manifest["outputs"]
    assert {path.name: file_checksum(path) for path in (tmp_path / "base").iterdir()} == outputs
    load_model(ModelSource(str(tmp_path / "base")))


def test_turns_become_one_conversation() -> None:
    messages = turns_conversation([("What?", "it"), ("Where?", "here")], images=1)
    assert [message.content for message in messages] == ["<image>\nWhat?", "it", "Where?", "here"]
    assert turns_conversation([("What?", "it")], images=0)[0].content == "What?"


def test_turns_encoded_one_by_one_are_the_whole_conversation(steps: dict[str, Artifact]) -> None:
    encoder = ChatEncoder(load_model(ModelSource(str(steps["initial"].path)))[1])
    rows = SceneTurns(0, 4, encoder)
    for index in range(5):
        turns = base_turns(make_scene(0, "base", index), rng_for(0, "base", index, "turns"), 4)
        row = rows.row(index)
        assert row.example == encoder.example(turns_conversation(turns, images=1), row.image_inputs, 512)


def test_the_corpus_is_a_function_of_its_seed() -> None:
    first = list(islice(corpus(0, 5), 60))
    assert first == list(islice(corpus(0, 5), 60))
    assert first != list(islice(corpus(1, 5), 60))
