"""When the loop ends early: by the development split, the alarm or the budget, at the same place after a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pytest
from rich.console import Console

from sicog_exp.ahead import check_benchmarks
from sicog_exp.curation.files import curate_file
from sicog_exp.evaluation.benchmarks import SAMPLES, Sample
from sicog_exp.experiment import run_experiment
from sicog_exp.planning.plan import expected_work
from sicog_exp.recipe import CurationConfig, Recipe, RecipeError, StopConfig, TrackingConfig, load
from sicog_exp.records import write_jsonl
from sicog_exp.stopping import decides_by_scores, reason_to_stop
from sicog_exp.store import Artifact

BASE = Recipe(iterations=4)


@dataclass
class Generation:
    index: int
    development: Artifact | None = None


@dataclass
class Lineage:
    data: Artifact
    generations: list[Generation]
    curated: list[Artifact] = field(default_factory=list)


def artifact(path: Path, flops: float | None = None) -> Artifact:
    path.mkdir(exist_ok=True)
    facts = {} if flops is None else {"flops": flops}
    return Artifact(path, {"step": path.name, "fingerprint": path.name, "facts": facts}, cached=False)


def scored(folder: Path, index: int, right: int, of: int = 200) -> Generation:
    rows = [Sample("dev", f"q{i}", f"{i // 2}.png", "", "direct", "p", "r", "a", "t", float(i < right))
            for i in range(of)]  # fmt: skip
    made = artifact(folder / f"g{index}")
    write_jsonl(made / SAMPLES, map(asdict, rows))
    return Generation(index, made)


def asked(recipe: Recipe, lineage: Lineage, done: Sequence[Artifact] = ()) -> str:
    return reason_to_stop(recipe, lineage, [(0, one) for one in done])


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ((80, 110), ""),
        ((80, 110, 111), "G2 - G1: +0.5 points ["),  # a gain, within the noise
        ((110, 80), "G1 - G0: -15.0 points ["),
        ((80, 80), "+0.0 points [+0.0, +0.0]"),
        ((150, 20, 60), ""),  # worse than G0, better than the one before
    ],
)
def test_no_gain_beyond_noise_over_the_generation_before(tmp_path: Path, counts: Sequence[int], reason: str):
    lineage = Lineage(artifact(tmp_path / "data"), [scored(tmp_path, i, right) for i, right in enumerate(counts)])
    found = asked(replace(BASE, stop=StopConfig(no_gain=True)), lineage)
    assert bool(found) == bool(reason)
    assert reason in found
    assert asked(BASE, lineage) == "", "off by default"
    if reason:
        last = len(counts) - 1
        assert found.startswith(f"Stopped at G{last} of at most G4: no gain beyond noise on the development split")


def pool(folder: Path, index: int, answers: int) -> Artifact:
    """Two agreeing direct answers to each of 240 questions, of so many different words."""
    made = artifact(folder / f"curated-{index}")
    rows = [{"id": f"q{i}", "kind": "reasoning", "prompt": f"What is {i}?", "image": None,
             "candidates": [f"word{i % answers}"] * 2} for i in range(240)]  # fmt: skip
    write_jsonl(made / "pool.jsonl", rows)
    curate_file(made / "pool.jsonl", made.path, CurationConfig())
    return made


def test_the_alarm_of_a_collapsing_pool(tmp_path: Path):
    data = artifact(tmp_path / "data")
    write_jsonl(data / "truth.jsonl", [])
    recipe, generations = replace(BASE, stop=StopConfig(collapse=True)), [Generation(0), Generation(1), Generation(2)]
    fine = [pool(tmp_path, 0, 60), pool(tmp_path, 1, 58)]
    assert asked(recipe, Lineage(data, generations, fine)) == ""
    dry = Lineage(data, generations, [*fine, pool(tmp_path, 2, 6)])
    assert "answer entropy fell" in asked(recipe, dry)
    assert asked(BASE, dry) == "", "the alarm alone ends nothing"
    deaf = replace(recipe, tracking=TrackingConfig(collapse_alarm=0.9))
    assert asked(deaf, dry) == ""


def test_the_budget_counts_every_step_once(tmp_path: Path):
    shared, own, free = (artifact(tmp_path / name, flops) for name, flops in (("a", 3e12), ("b", 2e12), ("c", None)))
    lineage = Lineage(shared, [Generation(0), Generation(1)])
    for budget, stops in ((5e12, True), (5.1e12, False)):
        found = asked(replace(BASE, stop=StopConfig(budget_flops=budget)), lineage, [shared, own, shared, free])
        assert bool(found) == stops
    assert "5e+12 FLOPs are spent, of a budget of 5e+12" in asked(
        replace(BASE, stop=StopConfig(budget_flops=5e12)), lineage, [shared, own])  # fmt: skip


def test_nothing_stops_what_is_at_its_end_anyway(tmp_path: Path):
    recipe = replace(BASE, iterations=1, stop=StopConfig(no_gain=True, budget_flops=1.0))
    done = [artifact(tmp_path / "a", 9.0)]
    assert asked(recipe, Lineage(done[0], [scored(tmp_path, 0, 9), scored(tmp_path, 1, 9)]), done) == ""


def test_only_what_decides_is_scored_on_the_development_split():
    stop = StopConfig(no_gain=True)
    assert [decides_by_scores(replace(BASE, stop=stop, iterations=2), g) for g in range(3)] == [True, True, False]
    assert not any(decides_by_scores(replace(BASE, stop=stop, iterations=1), g) for g in range(2))
    assert not any(decides_by_scores(BASE, g) for g in range(5))
    extra = expected_work(replace(BASE, stop=stop)).keys() - expected_work(BASE).keys()
    assert extra == {f"G{g} evaluate-development" for g in range(4)}
    chosen = replace(BASE, stop=stop, evaluation=replace(BASE.evaluation, split="development"))
    assert expected_work(chosen).keys() == expected_work(BASE).keys()


def test_rules_that_cannot_hold_are_refused_at_the_start(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"budget_flops=-1\.0: must be above 0"):
        StopConfig(budget_flops=-1.0)
    for impossible in ({"self_data": False}, {"tracking": TrackingConfig(collapse_alarm=0.0)}):
        with pytest.raises(RecipeError, match=r"stop\.collapse=true: the alarm never rings"):
            replace(BASE, stop=StopConfig(collapse=True), **impossible)
    suite = tmp_path / "suite.yaml"
    suite.write_text("name: own\nbenchmark:\n  - task: sicog_world_direct\n")
    recipe = replace(BASE, evaluation=replace(BASE.evaluation, suite=str(suite)))
    check_benchmarks(recipe)
    with pytest.raises(RecipeError, match=r"stop\.no_gain=true decides by development tasks, and suite own"):
        check_benchmarks(replace(recipe, stop=StopConfig(no_gain=True)))


@pytest.fixture
def tiny(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    steps = [f"{stage}.steps=1" for stage in ("develop", "pretrain", "instruct")]
    small = ["data.unlabeled_images=4", "data.benchmark_images=2", "data.development_images=2", "sampling.cod=1"]
    rules = ["iterations=3", "stop.no_gain=true", "stop.budget_flops=1", "tracking.register=false"]
    return load("tests/tiny.yaml", [f"model.base={tiny_model}", f"store={tmp_path}/store", *steps, *small, *rules])


def test_the_loop_stops_and_stops_there_again_after_a_kill(tiny: Recipe, tmp_path: Path):
    """A model that learned one step gains nothing on two images; the run says so wherever a reader looks."""
    from mlflow import MlflowClient

    console = Console(record=True, width=200)
    summary = json.loads((run_experiment(tiny, console) / "summary.json").read_text())
    reason = summary["stopped"]
    assert reason.startswith("Stopped at G1 of at most G3: no gain beyond noise on the development split (G1 - G0: ")
    assert "FLOPs are spent" in reason
    assert len(summary["generations"]) == 2
    assert reason in console.export_text()
    folders = {path.name: path for path in (tmp_path / "store").iterdir() if path.is_dir()}
    assert sum(name.startswith("evaluate-development") for name in folders) == 2
    (iterate,) = (path for name, path in folders.items() if name.startswith("iterate"))
    assert reason.split("(")[0] in (iterate / "report.html").read_text()
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert client.get_run(summary["run_id"]).data.tags["sicog.stopped"] == reason

    lost = [name for name in folders if name.startswith(("iterate", "evaluate", "pretrain"))]
    for name in lost:
        shutil.rmtree(folders[name])
    again = json.loads((run_experiment(tiny, Console(quiet=True)) / "summary.json").read_text())
    assert (again["stopped"], again["artifacts"]) == (reason, summary["artifacts"])
