"""Self-generated rows are drawn by their weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from sicog_exp.data.chat import ChatEncoder
from sicog_exp.models.loading import ModelSource, load_model
from sicog_exp.prompts import Kind, prompt
from sicog_exp.recipe import ModelConfig, StageConfig
from sicog_exp.records import Record, conversation, write_jsonl, write_records
from sicog_exp.store import Artifact
from sicog_exp.training.stages import WEIGHTS, TrainingTask, build_mixture, row_weights


def rows(count: int, kind: Kind, source: str) -> list[Record]:
    return [Record(f"{source}{i}", conversation(prompt(kind, f"Is it {i}?"), "yes", ()), (), kind, source)
            for i in range(count)]  # fmt: skip


def test_self_generated_rows_are_drawn_by_their_weights(tmp_path: Path, tiny_model: Path) -> None:
    data, curated = tmp_path / "data", tmp_path / "curated"
    data.mkdir()
    curated.mkdir()
    write_records(data / "annotated.parquet", rows(8, "direct", "annotated"))
    write_records(data / "instruction.parquet", [])
    write_records(curated / "self.parquet", rows(8, "direct", "self_direct"))
    inputs = {name: Artifact(tmp_path / name, {}, True) for name in ("data", "curated")}
    shares = {"self_direct": 0.5, "annotated": 0.5}
    task = TrainingTask(StageConfig(max_length=512), ModelConfig(device="cpu"), shares, 0)
    encoder = ChatEncoder(load_model(ModelSource(str(tiny_model)))[1])

    def drawn() -> list[Counter[int]]:
        mixture = build_mixture(task, inputs, encoder, tmp_path)
        places = [mixture.locate(slot) for slot in range(1000)]
        numbers = {source.name: number for number, source in enumerate(mixture.sources)}
        return [Counter(index for number, index in places if number == numbers[name]) for name in task.shares]

    assert row_weights(inputs) == row_weights({"data": inputs["data"]}) == {}
    alike, annotated = drawn()
    weights = [{"id": f"self_direct{i}", "weight": 3.0 if i == 5 else 1.0} for i in range(8)]
    write_jsonl(curated / WEIGHTS, weights)
    weighted, others = drawn()
    assert max(alike.values()) - min(alike.values()) <= 1
    assert 2.5 < weighted[5] / weighted[0] < 3.5
    assert others == annotated
