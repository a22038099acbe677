"""Preference pairs: kept responses against others of the same kind; the whole iteration with tuned generators."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import outputs
from test_selfdata import candidate, pool, unlabeled

from sicog_exp import loop, preferences
from sicog_exp.planning.plan import expected_work, make_plan, pricing
from sicog_exp.preferences import (
    CorruptTask,
    ItemsTask,
    LowScored,
    PairsTask,
    corrupt_items,
    draw_items,
    make_pairs,
    rejected_for,
)
from sicog_exp.prompts import prompt, structured
from sicog_exp.recipe import CurationConfig, Recipe, RecipeError, load
from sicog_exp.records import read_jsonl, read_records, write_records
from sicog_exp.selfdata import CurationTask, curate
from sicog_exp.store import Artifact, Step, Store, Workplace
from sicog_exp.training.preference import read_pairs

LENIENT = CurationConfig(reasoning_threshold=0.0)


def chain(answer: str) -> str:
    return structured("cot", ("find color", f"{answer} dog", f"dog {answer}", answer))


def place(folder: Path) -> Workplace:
    folder.mkdir()
    return Workplace(folder, folder)


def artifact(folder: Path) -> Artifact:
    return Artifact(folder, {"fingerprint": folder.name}, True)


# Which response is rejected.


def row(chosen: str, kind: str = "cot") -> dict[str, Any]:
    return {"id": "u1", "chosen": chosen, "chosen_kind": kind}


def option(text: str, kind: str = "cot", finish: str = "stop") -> dict[str, Any]:
    return {"text": text, "kind": kind, "finish_reason": finish}


def test_a_rejected_response_answers_the_same_prompt_otherwise() -> None:
    assert rejected_for(row(chain("red")), [option(chain("blue"))], LENIENT) == chain("blue")
    same, marked = option(chain("Red.")), option(f"{chain('blue')} <image>")
    cut, other = option(chain("blue"), finish="length"), option("blue", "direct")
    for useless in (same, marked, cut, other, option("blue"), option("")):
        assert rejected_for(row(chain("red")), [useless], LENIENT) is None, useless
    assert rejected_for(row(chain("red")), [], LENIENT) is None
    assert rejected_for(row("red", "direct"), [option("blue", "direct")], LENIENT) == "blue"


def test_the_rejected_response_is_drawn_by_the_sample_id() -> None:
    options = [option(chain(color)) for color in ("blue", "green", "gray", "teal", "pink")]
    drawn = [rejected_for({**row(chain("red")), "id": f"u{i}"}, options, LENIENT) for i in range(40)]
    assert drawn == [rejected_for({**row(chain("red")), "id": f"u{i}"}, options, LENIENT) for i in range(40)]
    assert len(set(drawn)) == 5


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    """(items, curated) of four questions: red chains against a blue one; no other chain; none valid; one alone."""
    home = tmp_path_factory.mktemp("curated")
    items = place(home / "items").directory
    write_records(items / "unlabeled.parquet", [unlabeled(i) for i in range(4)])
    red = chain("red")
    said = {"u0": [red, red, red, chain("blue")], "u1": [red, red], "u2": ["broken"], "u3": [red]}
    rows = [candidate(name, "cot", text, i) for name, texts in said.items() for i, text in enumerate(texts)]
    rows += [candidate("u0", "direct", "green", i) for i in range(2)] + [candidate("u1", "direct", "blue", 0)]
    inputs = {"data": artifact(items), "pool00": pool(home / "pool", rows)}
    curate(CurationTask(LENIENT), inputs, place(home / "curate"))
    return inputs["data"], artifact(home / "curate")


def test_low_scored_candidates_are_the_lower_half(curated: tuple[Artifact, Artifact]) -> None:
    found = LowScored(curated[1].path)
    assert sorted(c["text"] for c in found.rows("u0")) == [chain("blue"), "green", "green"]
    assert [c["text"] for c in found.rows("u1")] == ["blue"]
    assert found.rows("u2") == found.rows("u3") == []


def test_pairs_of_low_scored_candidates(curated: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    items, chosen_from = curated
    workplace = place(tmp_path / "pairs")
    make_pairs(PairsTask(LENIENT, "low_score"), {"items": items, "curated": chosen_from}, workplace)
    ((chosen, rejected),) = read_pairs(workplace.directory, ("cot",), workplace.scratch)
    assert (chosen.id, chosen.kind, chosen.images) == ("u0:cot", "cot", ("0.png",))
    assert chosen.messages[0] == rejected.messages[0]
    assert chosen.messages[0].content == "<image>\n" + prompt("cot", "What color is thing 0?")
    assert (chosen.response, rejected.response) == (chain("red"), chain("blue"))
    assert workplace.facts == {"samples": 3, "pairs": 1}


def test_pairs_of_corrupted_images_are_joined_by_id(curated: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    items, chosen_from = curated
    rows = [candidate("u3", "cot", chain("gray")), candidate("u1", "cot", chain("teal")),
            candidate("u0", "direct", "teal"), candidate("u0", "cot", chain("red"))]  # fmt: skip
    inputs = {"items": items, "curated": chosen_from, "pool00": pool(tmp_path / "pool", rows)}
    workplace = place(tmp_path / "pairs")
    make_pairs(PairsTask(LENIENT, "corrupted"), inputs, workplace)
    found = {chosen.id: (chosen.response, rejected.response, chosen.images)
             for chosen, rejected in read_pairs(workplace.directory, ("cot",), workplace.scratch)}  # fmt: skip
    assert found == {"u1:cot": (chain("red"), chain("teal"), ("1.png",)),
                     "u3:cot": (chain("red"), chain("gray"), ("3.png",))}  # fmt: skip


# Which items.


def test_items_are_all_records_of_the_drawn_images(tmp_path: Path) -> None:
    data = place(tmp_path / "data").directory
    records = [unlabeled(i, kind) for i in range(30) for kind in ("cot", "cod")]
    numbered = [type(r)(f"{r.id}:{r.kind}", r.messages, r.images, r.kind, r.source) for r in records]
    write_records(data / "unlabeled.parquet", numbered)
    drawn = {}
    for count in (0, 5, 12, 99):
        workplace = place(tmp_path / str(count))
        draw_items(ItemsTask(count), {"data": artifact(data)}, workplace)
        drawn[count] = [r.id for r in read_records(workplace.directory / "unlabeled.parquet")]
    assert drawn[0] == drawn[99] == [r.id for r in numbered]
    assert (len(drawn[5]), len(drawn[12])) == (10, 24)
    assert set(drawn[5]) < set(drawn[12])
    assert drawn[5] != drawn[0][:10]


def test_corrupted_items_are_the_kept_ones_with_images_of_their_own(
    curated: tuple[Artifact, Artifact], world_images: list[Path], tmp_path: Path
) -> None:
    items, chosen_from = curated
    inputs = {"data": artifact(world_images[0].parent), "items": items, "curated": chosen_from}
    workplace, again = place(tmp_path / "one"), place(tmp_path / "two")
    for each in (workplace, again):
        corrupt_items(CorruptTask(10**6), inputs, each)
    made = read_records(workplace.directory / "unlabeled.parquet")
    assert [record.id for record in made] == ["u0", "u1", "u3"]
    for record in made:
        (name,) = record.images
        original = world_images[0].parent / f"{record.id[1]}.png"
        assert (workplace.directory / name).read_bytes() == (again.directory / name).read_bytes()
        assert (workplace.directory / name).read_bytes() != original.read_bytes()


@pytest.mark.parametrize("select", ["oracle", "truth"])
def test_an_upper_bound_has_no_pairs(select: str) -> None:
    with pytest.raises(RecipeError, match=rf"curation\.select={select}, preference\.steps=8: pairs are chosen without"):
        load("tests/tiny.yaml", [*PREFERENCE, f"curation.select={select}"])
    assert load("tests/tiny.yaml", [*PREFERENCE, f"curation.select={select}", "self_data=false"])


# What repeats a benchmark.


def test_pairs_are_made_of_rows_that_train(curated: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    """Those that repeat a benchmark's text are no rows any more, and one of an item's is enough."""
    items, whole = curated
    clean = tmp_path / "clean"
    shutil.copytree(whole.path, clean)
    rows = read_records(clean / "self.parquet")
    assert {"u0:cot", "u0:direct"} <= {record.id for record in rows}
    write_records(clean / "self.parquet", [record for record in rows if record.id != "u0:direct"])
    workplace = place(tmp_path / "pairs")
    make_pairs(PairsTask(LENIENT, "low_score"), {"items": items, "curated": artifact(clean)}, workplace)
    assert workplace.facts == {"samples": 2, "pairs": 0}


def test_pairs_that_repeat_a_benchmark_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Stopped(Exception):
        """Before any model is needed."""

    def cleaned(recipe: Recipe, curated: Artifact, checked: Artifact, run: Any) -> Artifact:
        asked.extend((curated.name, checked.name))
        raise Stopped

    names = {name: Artifact(tmp_path, {"step": name, "fingerprint": name}, True) for name in ("data", "contamination")}
    monkeypatch.setattr(preferences, "without_repeated_texts", cleaned)
    monkeypatch.setattr(preferences, "sample_pools", lambda *_: {})
    with pytest.raises(Stopped):
        preferences.preference_tuned(load("tests/tiny.yaml", PREFERENCE), {}, names["data"], names["contamination"], 0,
                                     lambda step: Artifact(tmp_path, {"step": step.name, "fingerprint": ""}, True))
    assert asked == ["preference-curate", "contamination"]


# A whole iteration.

PREFERENCE = ("preference.steps=8", "preference.batch_size=4", "preference.micro_batch_size=2",
              "preference.max_length=512", "preference.checkpoint_every=2", "preference.images=6")  # fmt: skip


class Steps:
    """Runs a loop's steps, untracked; `stop` may raise in the middle of one."""

    def __init__(self, store: Path, stop: Callable[[str, int], None] = lambda name, done: None) -> None:
        self.store, self.generation, self.stop = Store(store), 0, stop
        self.made: dict[str, Artifact] = {}
        self.done: list[tuple[int, Artifact]] = []

    def run(self, step: Step) -> Artifact:
        artifact = self.store.run(step, lambda done, total: self.stop(step.name, done))
        self.done.append((self.generation, artifact))
        self.made[f"G{self.generation} {step.name}"] = artifact
        self.done.append((self.generation, artifact))
        return artifact


def iterate(model: Path, store: Path, *overrides: str, **options: Any) -> dict[str, Artifact]:
    steps: Any = Steps(store, **options)
    loop.iterate(recipe(model, *overrides), steps)
    return steps.made


def recipe(model: Path, *overrides: str) -> Recipe:
    return load("tests/tiny.yaml", [f"model.base={model}", "iterations=1", *overrides])


def inputs_of(artifact: Artifact, made: dict[str, Artifact]) -> dict[str, str]:
    """What a step was made of, by the names of those steps."""
    names = {each.fingerprint: name for name, each in made.items()}
    return {name: names[fingerprint] for name, fingerprint in artifact.manifest["inputs"].items()}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loop") / "store"


@pytest.fixture(scope="module")
def tuned(tiny_model: Path, store: Path) -> dict[str, Artifact]:
    return iterate(tiny_model, store, *PREFERENCE)


def test_the_tuned_generator_samples_the_pool(tuned: dict[str, Artifact], tmp_path: Path) -> None:
    names = [name for name in tuned if name.startswith("G1")]
    assert names == [f"G1 {name}" for name in (
        "develop", "preference-items", "preference-generate-caption", "preference-generate-reasoning",
        "preference-curate", "preference-pairs", "preference", "generate-caption", "generate-reasoning", "curate",
        "pretrain", "instruct", "evaluate")]  # fmt: skip
    assert inputs_of(tuned["G1 preference"], tuned)["model"] == "G1 develop"
    for group in ("caption", "reasoning"):
        assert inputs_of(tuned[f"G1 preference-generate-{group}"], tuned)["generator"] == "G1 develop"
        assert inputs_of(tuned[f"G1 generate-{group}"], tuned)["generator"] == "G1 preference"
    assert inputs_of(tuned["G1 pretrain"], tuned)["model"] == "G0 base"
    assert tuned["G1 preference"].content != tuned["G1 develop"].content
    pairs = read_pairs(tuned["G1 preference-pairs"].path, ("cod", "dd", "cot", "direct"), tmp_path)
    assert tuned["G1 preference"].facts["pairs"] == len(pairs) > 0
    assert tuned["G1 preference"].facts["samples"] == 2 * 4 * 8
    drawn = {r.images for r in read_records(tuned["G1 preference-items"] / "unlabeled.parquet")}
    assert len(drawn) == 6
    assert {chosen.images for chosen, _ in pairs} <= drawn


def test_a_plan_knows_the_steps(tiny_model: Path, tuned: dict[str, Artifact]) -> None:
    """Their names, in order, and what they take, for a share of the pool's candidates."""
    steps = make_plan(recipe(tiny_model, *PREFERENCE), pricing("cpu")).steps
    planned = {f"G{step.generation} {step.step}": step for step in steps}
    assert list(planned) == list(tuned)
    assert planned["G1 preference"].samples == tuned["G1 preference"].facts["samples"]
    pool = planned["G1 generate-caption"]
    assert planned["G1 preference-generate-caption"].tokens == pytest.approx(0.6 * pool.tokens)
    for name in ("preference-generate-caption", "preference-generate-reasoning", "preference"):
        facts, step = tuned[f"G1 {name}"].facts, planned[f"G1 {name}"]
        assert facts["prompt_tokens"] + facts["new_tokens"] == facts["tokens"] == pytest.approx(step.tokens, rel=0.25)
        assert facts["flops"] == pytest.approx(step.flops, rel=0.25)
    more = ("generators=two", "preference.rejected=corrupted", "start=parts", "align.steps=2")
    names = set(expected_work(recipe(tiny_model, *PREFERENCE, *more))) - set(planned)
    assert names == {"G0 parts"} | {f"G1 {name}" for name in (
        "align", "develop-perception", "develop-reasoning", "preference-corrupt", "preference-reject-caption",
        "preference-reject-reasoning", "preference-perception", "preference-reasoning")}  # fmt: skip


def test_a_stopped_preference_iteration_ends_with_the_same_artifacts(tiny_model: Path, store: Path, tmp_path: Path,
                                                                     tuned: dict[str, Artifact]) -> None:
    """Stopped in the sampling of the candidates, in the tuning, and in the sampling of the pool."""
    again = tmp_path / "store"
    shutil.copytree(store, again)
    kept = ("data", "contamination", "base", "develop")
    for name in (artifact.path.name for artifact in tuned.values() if not artifact.name.startswith(kept)):
        shutil.rmtree(again / name, ignore_errors=True)
    for where, at in (("preference-generate-reasoning", 9), ("preference", 5), ("generate-reasoning", 9)):
        def stop(name: str, done: int, where: str = where, at: int = at) -> None:
            if name == where and done >= at:
                raise OSError("stopped here")

        with pytest.raises(OSError, match="stopped here"):
            iterate(tiny_model, again, *PREFERENCE, stop=stop)
    iterate(tiny_model, again, *PREFERENCE)
    assert outputs(again) == outputs(store)


def test_two_generators_corrupted_images_and_raw_parts(tiny_model: Path, store: Path,
                                                       tuned: dict[str, Artifact]) -> None:
    made = iterate(tiny_model, store, *PREFERENCE, "preference.rejected=corrupted", "generators=two", "start=parts",
                   "align.steps=2", "align.batch_size=4", "align.micro_batch_size=4", "align.max_length=512",
                   "mixture.self_turns=0.1", "caps.annotated=5", "iterations=1")  # fmt: skip
    for group, name in (("caption", "perception"), ("reasoning", "reasoning")):
        assert inputs_of(made[f"G1 preference-{name}"], made)["model"] == f"G1 develop-{name}"
        assert inputs_of(made[f"G1 preference-reject-{group}"], made)["data"] == "G1 preference-corrupt"
        assert inputs_of(made[f"G1 generate-{group}"], made)["generator"] == f"G1 preference-{name}"
    assert inputs_of(made["G1 align"], made)["model"] == "G0 parts"
    assert inputs_of(made["G1 pretrain"], made)["model"] == "G1 align"
    kept = {row["id"] for row in read_jsonl(made["G1 preference-curate"] / "curated.jsonl") if row["kept"]}
    rejected = [row for group in ("caption", "reasoning")
                for row in read_jsonl(made[f"G1 preference-reject-{group}"] / "candidates.jsonl")]  # fmt: skip
    assert {row["sample_id"] for row in rejected} == kept
    assert all(row["index"] == 0 for row in rejected)
    assert made["G0 evaluate"].path == tuned["G0 evaluate"].path


def test_without_the_stage_nothing_of_it_runs(tiny_model: Path, store: Path, tuned: dict[str, Artifact]) -> None:
    names = {name.removeprefix("G1 ") for name in iterate(tiny_model, store) if name.startswith("G1")}
    assert names == {"develop", "generate-caption", "generate-reasoning", "curate", "pretrain", "instruct", "evaluate"}
