"""What a stage reads: its sources by share and cap, captions as conversations, raw parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from test_modules import CPU, load, stage

from sicog_exp.data.chat import IGNORED
from sicog_exp.data.mixture import ImageTensors, RecordSource, Rejected
from sicog_exp.models.loading import part_parameters
from sicog_exp.prompts import COD_TURNS, Kind, prompt, structured
from sicog_exp.recipe import CapsConfig
from sicog_exp.records import Record, conversation, write_records
from sicog_exp.store import Artifact, Step, Store
from sicog_exp.training.stages import PartsTask, TrainingTask, caption_turns, raw_parts, rows_by_source

STEPS = ("a dog", "the dog is red", "the dog is left of a cat", "a green background", "a red dog, left of a cat.")


def record(name: str, kind: Kind, source: str, response: str = "a dog", image: str = "0.png") -> Record:
    return Record(name, conversation(prompt(kind, "Is it?"), response, (image,)), (image,), kind, source)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Artifact]:
    home = tmp_path_factory.mktemp("inputs")
    kinds: tuple[Kind, ...] = ("cod", "dd", "cot", "direct")
    annotated = [record(f"a{i}:{kind}", kind, "annotated") for i in range(5) for kind in kinds]
    texts = [Record(f"t{i}", conversation("What?", "animal", ()), (), "text", "text") for i in range(4)]
    chosen = [record(f"s{i}:cod", "cod", "self_caption", structured("cod", STEPS)) for i in range(4)]
    chosen += [record(f"s{i}:dd", "dd", "self_caption") for i in range(4)]
    chosen += [record("broken:cod", "cod", "self_caption", "Step 1: nothing more"),
               record("empty:cod", "cod", "self_caption", structured("cod", (*STEPS[:3], "", STEPS[4])))]  # fmt: skip
    chosen += [record(f"q{i}:cot", "cot", "self_cot") for i in range(6)]
    for name, rows in (("annotated", annotated), ("instruction", texts), ("self", chosen)):
        write_records(home / f"{name}.parquet", rows)
    artifact = Artifact(home, {"fingerprint": "inputs"}, True)
    return {"data": artifact, "curated": artifact}


def rows(inputs: Mapping[str, Artifact], shares: dict[str, float], **caps: int) -> dict[str, list[str]]:
    task = TrainingTask(stage(), CPU, shares, 3, caps=CapsConfig(**caps))
    with TemporaryDirectory() as scratch:
        found = rows_by_source(task, inputs, Path(scratch))
        return {source: [r.id for r in records] for source, records in found.items()}


def test_sources_are_those_with_a_share(inputs: Mapping[str, Artifact]) -> None:
    found = rows(inputs, {"self_caption": 0.5, "self_turns": 0.0, "self_cot": 0.2, "text": 0.3, "annotated": 0.0})
    assert {source: len(ids) for source, ids in found.items()} == {"self_caption": 10, "self_cot": 6, "text": 4}
    assert rows(inputs, {"self_turns": 1.0}) == {"self_turns": [f"s{i}:cod:turns" for i in range(4)]}


def test_caps_hold_by_source_and_kind(inputs: Mapping[str, Artifact]) -> None:
    shares = {"self_caption": 0.3, "self_turns": 0.1, "self_cot": 0.2, "text": 0.1, "annotated": 0.3}
    whole, some = rows(inputs, shares), rows(inputs, shares, self_caption=5, text=3, annotated=9, cod=2)
    assert {source: len(ids) for source, ids in some.items()} == {
        "self_caption": 5, "self_turns": 2, "self_cot": 6, "text": 3, "annotated": 9}  # fmt: skip
    for source, ids in some.items():
        assert set(ids) <= set(whole[source])
        assert sum(":cod" in name for name in ids) <= 2


# Captions as conversations.


def test_a_caption_becomes_a_turn_a_step() -> None:
    whole = record("u1:cod", "cod", "self_caption", structured("cod", STEPS))
    made = caption_turns(whole)
    assert made
    assert caption_turns(record("u1:cod", "cod", "self_caption", "a dog")) is None
    assert (made.id, made.kind, made.source, made.images) == ("u1:cod:turns", "cod", "self_turns", ("0.png",))
    assert [m.content for m in made.messages if m.role == "assistant"] == list(STEPS)
    asked = [m.content for m in made.messages if m.role == "user"]
    assert asked == [f"<image>\n{COD_TURNS[0]}", *COD_TURNS[1:]]


def test_every_turn_of_a_caption_is_learned_and_nothing_else(tiny_model: Path, world_images: list[Path]) -> None:
    _, encoder = load(tiny_model)
    turns = caption_turns(record("u1:cod", "cod", "self_caption", structured("cod", STEPS)))
    assert turns
    images, rejected = ImageTensors(world_images[0].parent, encoder, 10**8), Rejected(world_images[0].parent)
    source = RecordSource("self_turns", [turns], images, encoder, 512, rejected.add)
    example = source.row(0).example
    learned = [label for label in example.labels if label != IGNORED]
    said = encoder.tokenizer.decode(learned).split("<|end|>")
    assert [text.strip() for text in said] == [*STEPS, ""]
    assert all(label in (IGNORED, token) for token, label in zip(example.input_ids, example.labels, strict=True))


# Raw parts.


def test_raw_parts_are_the_base_with_a_new_projector(tiny_model: Path, tmp_path: Path) -> None:
    base, store = {"model": Artifact(tiny_model, {"fingerprint": "base"}, True)}, Store(tmp_path)
    made = [store.run(Step("parts", raw_parts, PartsTask(seed), base, seed)) for seed in (0, 1)]
    before, one, other = (part_parameters(load(path)[0]) for path in (tiny_model, *(a.path for a in made)))
    for part in ("vision", "language"):
        assert all(map(torch.equal, before[part], one[part]))
    for first, second in ((before, one), (one, other)):
        pairs = zip(first["projector"], second["projector"], strict=True)
        assert not any(torch.equal(a, b) for a, b in pairs if a.ndim > 1)  # biases begin at 0
