"""Training pools against a suite's benchmarks, through the store: planted overlaps are listed and do not train."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sicog_exp import cleandata
from sicog_exp.cleandata import check_step, contamination_metrics, contamination_notes, without_overlaps
from sicog_exp.data.sources import build_dataset
from sicog_exp.prompts import prompt
from sicog_exp.recipe import DataConfig, EvaluationConfig, Recipe, RecipeError
from sicog_exp.records import Record, conversation, read_jsonl, read_records, write_records
from sicog_exp.store import Artifact, Step, Store, Workplace

SUITE = "name: small\nbenchmark: [{task: sicog_world_direct}, {task: sicog_easyvqa_direct, limit: 20}]\n"
SIZES = DataConfig(annotated_images=4, unlabeled_images=5, instruction_images=3, development_images=2,
                   benchmark_images=4, questions_per_image=2)  # fmt: skip
LONG = "Read the sign at the door of the old mill beside the river and say who may enter it after dark"


def copy_of(source: Path, target: Path) -> None:
    """A smaller, recompressed copy in another file."""
    buffer = io.BytesIO()
    Image.open(source).convert("RGB").resize((64, 64)).save(buffer, "JPEG", quality=70)
    Image.open(buffer).save(target)


def plant(folder: Path) -> None:
    """One unlabeled image near a benchmark's, one instruction row with a benchmark's long text."""
    copy_of(folder / "images/benchmark-000002.png", folder / "images/unlabeled-000001.png")
    long = Record("long", conversation(prompt("direct", LONG), "the miller", ("images/benchmark-000003.png",)),
                  ("images/benchmark-000003.png",), "direct", "benchmark")  # fmt: skip
    write_records(folder / "benchmark.parquet", [*read_records(folder / "benchmark.parquet"), long])
    said = Record("said", conversation(f"{LONG}?", "Only the miller.", ()), (), "text", "instruction")
    write_records(folder / "instruction.parquet", [*read_records(folder / "instruction.parquet"), said])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("work") / "store")


@pytest.fixture(scope="module")
def recipe(store: Store) -> Recipe:
    suite = store.root.parent / "suite.yaml"
    suite.write_text(SUITE)
    return Recipe(data=SIZES, evaluation=EvaluationConfig(suite=str(suite)))


def data_of(store: Store, planted: bool) -> Artifact:
    def run(config: Any, inputs: Any, workplace: Workplace) -> None:
        build_dataset(SIZES, workplace.directory)
        if planted:
            plant(workplace.directory)

    return store.run(Step("data", run, {"planted": planted}))


def test_nothing_is_left_out_of_clean_data(store: Store, recipe: Recipe) -> None:
    data, told = data_of(store, planted=False), []
    checked = store.run(check_step(recipe, data), lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] > 0, "pictures compared"
    assert list(read_jsonl(checked / "overlaps.jsonl")) == []
    assert without_overlaps(recipe, data, checked, store.run) is data
    assert cleandata.without_repeated_texts(recipe, data, checked, store.run) is data
    (note,) = contamination_notes([(0, checked)])
    assert "none of" in note
    assert "2 benchmark tasks" in note


def test_planted_overlaps_are_listed_counted_and_left_out(store: Store, recipe: Recipe) -> None:
    data = data_of(store, planted=True)
    checked = store.run(check_step(recipe, data))
    found = [(row["split"], row["id"], row["how"]) for row in read_jsonl(checked / "overlaps.jsonl")]
    ids = ["unlabeled-000001:caption", "unlabeled-000001:q0", "unlabeled-000001:q1"]
    assert found == [*(("unlabeled", id, "near copy") for id in ids), ("instruction", "said", "text")]
    rows = list(read_jsonl(checked / "overlaps.jsonl"))
    assert all(row["benchmark_id"].startswith("benchmark-000002") and 0 < row["distance"] <= 0.13 for row in rows[:3])
    assert (rows[3]["benchmark_id"], rows[3]["task"], rows[3]["distance"]) == ("long", "sicog_world_direct", 0)
    clean = without_overlaps(recipe, data, checked, store.run)
    before, after = (read_records(artifact / "unlabeled.parquet") for artifact in (data, clean))
    assert [r for r in before if r.id not in ids] == after
    assert "said" not in {r.id for r in read_records(clean / "instruction.parquet")}
    assert (clean / "images/unlabeled-000001.png").is_file()
    assert (clean / "truth.jsonl").read_bytes() == (data / "truth.jsonl").read_bytes()
    metrics = contamination_metrics([(0, data), (0, checked)])
    assert (metrics["contamination/unlabeled"], metrics["contamination/rows"]) == (3, 4)
    assert "unlabeled 3 (near copy 3)" in contamination_notes([(0, checked)])[0]


def test_a_caption_s_prompt_is_our_wording_and_no_overlap(store: Store, recipe: Recipe) -> None:
    """A benchmark held out of annotated rows asks for captions in the same words as every unlabeled image."""
    def run(config: Any, inputs: Any, workplace: Workplace) -> None:
        build_dataset(SIZES, workplace.directory)
        file, picture = workplace.directory / "benchmark.parquet", "images/benchmark-000003.png"
        asked = [Record(kind, conversation(prompt(kind), "a red dog", (picture,)), (picture,), kind, "benchmark")
                 for kind in ("cod", "dd")]  # fmt: skip
        write_records(file, [*read_records(file), *asked])

    checked = store.run(check_step(recipe, store.run(Step("data-captions", run, {}))))
    assert list(read_jsonl(checked / "overlaps.jsonl")) == []


def test_the_switch_keeps_the_rows_and_the_list(store: Store, recipe: Recipe) -> None:
    data = data_of(store, planted=True)
    stay = Recipe(data=DataConfig(exclude_contaminated=False), evaluation=recipe.evaluation)
    checked = store.run(check_step(stay, data))
    assert len(list(read_jsonl(checked / "overlaps.jsonl"))) == 4
    assert without_overlaps(stay, data, checked, store.run) is data
    assert "were trained on" in contamination_notes([(0, checked)], excluded=False)[0]


def test_self_generated_rows_that_repeat_a_long_text_do_not_train(store: Store, recipe: Recipe) -> None:
    checked = store.run(check_step(recipe, data_of(store, planted=True)))

    def run(config: Any, inputs: Any, workplace: Workplace) -> None:
        rows = [Record(f"u{i}:direct", conversation(prompt("direct", "What is it?"), text, ("i.png",)), ("i.png",),
                       "direct", "self_direct") for i, text in enumerate(("a dog", f"{LONG}: the miller"))]  # fmt: skip
        write_records(workplace.directory / "self.parquet", rows)

    curated = store.run(Step("curate", run, {}))
    clean = cleandata.without_repeated_texts(recipe, curated, checked, store.run)
    assert [r.id for r in read_records(clean / "self.parquet")] == ["u0:direct"]
    assert clean.name == "clean-curate"


def test_a_pool_without_any_clean_row_stops_the_run(store: Store, recipe: Recipe) -> None:
    def run(config: Any, inputs: Any, workplace: Workplace) -> None:
        build_dataset(SIZES, workplace.directory)
        for i in range(4):
            copy_of(workplace.directory / f"images/benchmark-{i:06d}.png",
                    workplace.directory / f"images/annotated-{i:06d}.png")  # fmt: skip

    data = store.run(Step("data", run, {"planted": "all"}))
    checked = store.run(check_step(recipe, data))
    with pytest.raises(RecipeError, match="all rows of annotated"):
        without_overlaps(recipe, data, checked, store.run)


TASK = """task: elsewhere
dataset_path: json
dataset_kwargs: {data_files: {test: not-there.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: answer
metric_list: [{metric: exact_match}]
metadata: {version: 1}
"""


def test_a_task_whose_data_are_not_here_is_named(store: Store, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/elsewhere.yaml").write_text(TASK)
    suite = tmp_path / "suite.yaml"
    suite.write_text(f"name: s\nbenchmark: [{{task: sicog_world_direct}}, {{task: elsewhere}}]\n"
                     f"include: [{tmp_path}/tasks]\n")  # fmt: skip
    data = data_of(store, planted=False)
    checked = store.run(check_step(Recipe(data=SIZES, evaluation=EvaluationConfig(suite=str(suite))), data))
    notes = contamination_notes([(0, checked)])
    assert any("elsewhere could not be checked" in note for note in notes), notes
    assert contamination_metrics([(0, checked)])["contamination/unread_tasks"] == 1
