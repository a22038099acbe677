"""Sweeps: declared keys, one shared pool, the development split, killed workers, trials that are never replayed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.trial import TrialState
from rich.console import Console
from runs import REPOSITORY, environment

from sicog_exp.recipe import RecipeError, load
from sicog_exp.studies.findings import finished
from sicog_exp.studies.sweep import (
    Axis,
    StudyConfig,
    load_study,
    open_study,
    recipe_of,
    retry_the_dead,
    suggested,
)

pytestmark = pytest.mark.timeout(1800)
THRESHOLD = {"curation.reasoning_threshold": {"low": 0.0, "high": 0.6}}


def write(folder: Path, **changes: Any) -> Path:
    values = {"name": "tiny-sweep", "recipe": "tests/tiny.yaml", "trials": 3, "space": THRESHOLD, **changes}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def study(tmp_path: Path, **changes: Any) -> StudyConfig:
    return load_study(write(tmp_path, overrides=[f"store={tmp_path}/store"], **changes))


@pytest.mark.parametrize(("changes", "message"), [
    ({"space": {"curation.treshold": {"low": 0.0, "high": 1.0}}}, r"curation\.treshold: unknown key"),
    ({"space": {"curation.caption_threshold": {"low": 0.0}}}, "an axis has low and high, or choices"),
    ({"space": {"curation.caption_threshold": {"low": 1.0, "high": 0.0}}}, "low must not be above high"),
    ({"space": {"curation.encoder": {"choices": [3]}}}, r"curation\.encoder=3: expected str"),
    ({"space": {}}, "needs a space"),
    ({"rungs": [0.5]}, "must rise from above 0 to 1"),
    ({"rungs": [0.5, 1.0], "objectives": [{}, {"metric": "cost/flops"}]}, "does not prune"),
    ({"overrides": ["iterations=0"]}, "needs a generation after G0"),
    ({"trails": 3}, "trails: unknown key"),
])  # fmt: skip
def test_a_study_that_cannot_run_is_an_error_that_names_it(tmp_path: Path, changes: dict[str, Any], message: str
                                                           ) -> None:  # fmt: skip
    with pytest.raises(RecipeError, match=message):
        load_study(write(tmp_path, **changes))


@pytest.mark.parametrize("path", sorted((REPOSITORY / "experiments/sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies_load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert load_study(path).space


def test_a_trial_is_a_recipe_on_the_development_split(tmp_path: Path) -> None:
    config = study(tmp_path, rungs=[0.5, 1.0])
    recipe = recipe_of(config, {"curation.reasoning_threshold": 0.25, "curation.encoder": "minilm"}, "development", 0.5)
    assert recipe.evaluation.split == "development"
    assert (recipe.curation.reasoning_threshold, recipe.curation.encoder) == (0.25, "minilm")
    assert recipe.pretrain.steps == load("tests/tiny.yaml").pretrain.steps / 2


def test_conditional_axes_are_searched_where_their_condition_holds(tmp_path: Path) -> None:
    space = {"curation.encoder": Axis(choices=("lexical", "minilm")),
             "curation.caption_threshold": Axis(0.1, 0.9, when="curation.encoder=minilm"),
             "sampling.cot": Axis(1, 4, whole=True), "pretrain.language_lr": Axis(1e-5, 1e-2, log=True)}  # fmt: skip
    config = StudyConfig("s", "tests/tiny.yaml", space)
    seen = [suggested(config, optuna.create_study().ask()) for _ in range(30)]
    assert {values["curation.encoder"] for values in seen} == {"lexical", "minilm"}
    for values in seen:
        assert ("curation.caption_threshold" in values) == (values["curation.encoder"] == "minilm")
        assert isinstance(values["sampling.cot"], int)
        assert 1e-5 <= values["pretrain.language_lr"] <= 1e-2


def test_a_resumed_study_proposes_new_trials(tmp_path: Path) -> None:
    config = study(tmp_path)
    base = recipe_of(config, {}, "development")
    proposed = []
    for _ in range(4):
        search = open_study(config, base)  # as a new process does
        trial = search.ask()
        proposed.append(suggested(config, trial)["curation.reasoning_threshold"])
        search.tell(trial, 0.5)
    assert len(set(proposed)) == 4


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_poor_trials_are_given_up_at_a_rung(tmp_path: Path, pruner: str) -> None:
    """A trial's worth is its number's last digit: what a pruner gives up is worth less than what it keeps."""
    config = study(tmp_path, rungs=[0.25, 0.5, 1.0], pruner=pruner)
    search = open_study(config, recipe_of(config, {}, "development"))
    worth: dict[bool, list[int]] = {True: [], False: []}
    for number in range(60):
        trial = search.ask()
        suggested(config, trial)
        pruned = False
        for rung in (1, 2):
            trial.report(number * 7 % 10, rung)
            pruned = pruned or trial.should_prune()
        search.tell(trial, None if pruned else number * 7 % 10, state=TrialState.PRUNED if pruned else None)
        worth[pruned].append(number * 7 % 10)
    assert len(worth[True]) >= 10
    assert sum(worth[True]) / len(worth[True]) + 2 < sum(worth[False]) / len(worth[False])


def test_a_dead_workers_trial_is_tried_again_and_a_live_ones_left_alone(tmp_path: Path) -> None:
    config = study(tmp_path)
    search = open_study(config, recipe_of(config, {}, "development"))
    dead, alive = search.ask(), search.ask()
    values = suggested(config, dead)
    suggested(config, alive)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    from sicog_exp.studies import sweep

    dead.set_user_attr("owner", f"{os.uname().nodename} {process.pid} 1")
    alive.set_user_attr("owner", sweep._owner())
    retry_the_dead(search, Console(file=io.StringIO()))
    states = [trial.state for trial in search.get_trials()]
    assert states == [TrialState.FAIL, TrialState.RUNNING, TrialState.WAITING]
    assert suggested(config, search.ask()) == values


def test_a_trial_that_just_began_is_alive_before_it_has_an_owner(tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from sicog_exp.studies import sweep

    config = study(tmp_path)
    search = open_study(config, recipe_of(config, {}, "development"))
    suggested(config, search.ask())
    retry_the_dead(search, Console(file=io.StringIO()))
    assert [trial.state for trial in search.get_trials()] == [TrialState.RUNNING]
    monkeypatch.setattr(sweep, "NAMING", 0)
    retry_the_dead(search, Console(file=io.StringIO()))
    assert [trial.state for trial in search.get_trials()] == [TrialState.FAIL, TrialState.WAITING]


@pytest.fixture(scope="module")
def swept(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, StudyConfig]:
    """A search that was killed in its second trial and run again."""
    folder = tmp_path_factory.mktemp("sweep")
    fixed = [f"store={folder}/store", f"model.base={tiny_model}", "iterations=1", "tracking.register=false"]
    path = write(folder, overrides=fixed, rungs=[0.5, 1.0])
    config = load_study(path)
    command = [sys.executable, "-m", "sicog_exp.cli", "sweep", str(path)]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment(folder), text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip

    first = start()
    journal = folder / "store" / "studies" / "tiny-sweep.journal"
    while first.poll() is None and not (journal.exists() and '"trial_id":1' in journal.read_text()):
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    second = start()
    printed, _ = second.communicate(timeout=900)
    assert second.returncode == 0, printed
    return folder, printed, config


def test_a_killed_search_goes_on_and_ends_with_its_trials(swept: tuple[Path, str, StudyConfig]) -> None:
    _, printed, config = swept
    search = open_study(config, recipe_of(config, {}, "development"))
    assert len(finished(search)) == 3
    states = [trial.state for trial in search.get_trials()]
    assert states.count(TrialState.RUNNING) == 0
    assert "its values are tried again" in printed
    values = [tuple(trial.params.values()) for trial in finished(search)]
    assert len(set(values)) == 3


def test_all_trials_share_one_pool_and_one_g0(swept: tuple[Path, str, StudyConfig]) -> None:
    """The benchmark is scored for the winner alone: two evaluations, G0's and the winner's."""
    folder, *_ = swept
    manifests = [json.loads(path.read_text()) for path in (folder / "store").glob("*/manifest.json")]
    steps = [manifest["step"] for manifest in manifests]
    assert steps.count("generate-caption") == steps.count("generate-reasoning") == steps.count("develop") == 1
    assert steps.count("curate") >= 3
    splits = [m["config"]["evaluation"]["split"] for m in manifests if m["step"] == "evaluate"]
    assert splits.count("benchmark") == 2


def test_the_winners_recipe_runs_and_mlflow_shows_every_trial(swept: tuple[Path, str, StudyConfig]) -> None:
    from mlflow import MlflowClient

    folder, printed, _ = swept
    best = folder / "store" / "studies" / "tiny-sweep-best.yaml"
    assert str(best) in printed
    assert load(best).evaluation.split == "benchmark"
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "sicog"]
    runs = client.search_runs([experiment.experiment_id], max_results=500)
    (parent,) = [run for run in runs if run.data.tags.get("sicog.level") == "study"]
    trials = [run for run in runs if "sicog.trial" in run.data.tags]
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {parent.info.run_id}
    complete = [run for run in trials if run.data.tags.get("sicog.state") == "complete"]
    assert complete
    assert all("eval/mean/accuracy" in run.data.metrics for run in complete)
    assert {"tiny-sweep-best.yaml", "tiny-sweep-slices.png", "study.yaml", "importances.json"} <= {
        artifact.path for artifact in client.list_artifacts(parent.info.run_id)}  # fmt: skip
