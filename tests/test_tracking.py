"""MLflow: parent, generations, steps; the same metric names everywhere; models that come back from the registry."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from sicog_exp import tracking
from sicog_exp.experiment import headline
from sicog_exp.models.loading import ModelSource, load_model, save_model
from sicog_exp.progress import Display
from sicog_exp.recipe import CurationConfig, Recipe, TrackingConfig, load
from sicog_exp.runner import Runner
from sicog_exp.store import Artifact, Step, Store, Workplace
from sicog_exp.tracking import PARAMETER_LIMIT, PARENT, Tracker, code_version, flat

ORIGIN = [{"base": "base-1", "model": "instruct-0"}, {"base": "base-1", "pools": "caption-2 reasoning-3"}]
METRICS = [{"eval/world/accuracy": 0.4, "eval/world/low": 0.3}, {"eval/world/accuracy": 0.5, "eval/world/low": 0.4}]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with a tracking store of its own, as `make iterate` leaves behind."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
            patch.delenv(name, raising=False)
        yield folder


def write(config: Any, inputs: Mapping[str, Artifact], workplace: Workplace) -> None:
    (workplace.directory / "rows.txt").write_text(str(config))
    workplace.add(samples=3, tokens=70)


def runner(recipe: Recipe, folder: Path) -> Runner:
    display = Display({}, Console(file=io.StringIO()))
    return Runner(Store(folder / "store"), Tracker(recipe), display)


class Experiment:
    """Two generations: a data step, a trained model each; run twice, the second time from the store."""

    def __init__(self, home: Path, model: Path) -> None:
        def train(config: Any, inputs: Mapping[str, Artifact], workplace: Workplace) -> None:
            save_model(*load_model(ModelSource(str(model))), workplace.directory)

        self.recipe = Recipe(name="tracked")
        self.runner = runner(self.recipe, home)
        self.tracker = self.runner.tracker
        self.client = self.tracker.client
        self.data = self.runner.run(Step("data", write, {"rows": 3, "long": "x" * (PARAMETER_LIMIT + 1)}))
        self.models = []
        for index in range(2):
            self.runner.generation = index
            self.models.append(self.runner.run(Step("instruct", train, {"g": index}, {"data": self.data}, index)))
            self.tracker.log_generation(index, METRICS[index])
            self.tracker.log_origin(index, ORIGIN[index])
            self.tracker.register(index, self.models[index])
            self.tracker.log_dataset(self.tracker.generation(index), "self-data", self.data, "training", 3)
        self.tracker.promote(1)
        self.tracker.finish()
        self.again = runner(self.recipe, home)
        self.again.run(Step("data", write, {"rows": 3, "long": "x" * (PARAMETER_LIMIT + 1)}))
        self.again.tracker.finish()

    def children(self, parent: str) -> list[Any]:
        found = self.client.search_runs([self.tracker.experiment_id], f"tags.`{PARENT}` = '{parent}'")
        return sorted(found, key=lambda run: run.info.start_time)


@pytest.fixture(scope="module")
def experiment(home: Path, tiny_model: Path) -> Experiment:
    return Experiment(home, tiny_model)


def test_parent_generations_and_steps(experiment: Experiment) -> None:
    parent = experiment.client.get_run(experiment.tracker.run_id)
    generations = experiment.children(parent.info.run_id)
    assert parent.data.tags["sicog.level"] == "experiment"
    assert PARENT not in parent.data.tags
    assert parent.info.run_name == "s0 tracked"
    assert [run.info.run_name for run in generations] == ["G0 s0 tracked", "G1 s0 tracked"]
    assert {run.data.tags["sicog.level"] for run in generations} == {"generation"}
    steps = [experiment.children(run.info.run_id) for run in generations]
    assert [[run.info.run_name for run in group] for group in steps] == [["G0 data", "G0 instruct"], ["G1 instruct"]]
    assert {run.data.tags["sicog.level"] for group in steps for run in group} == {"step"}
    assert {run.info.status for run in (parent, *generations, *steps[0], *steps[1])} == {"FINISHED"}
    assert (Path.cwd() / "mlflow.db").is_file()


def test_steps_tell_their_identity_and_cost(experiment: Experiment) -> None:
    (generation, *_) = experiment.children(experiment.tracker.run_id)
    (data, _) = experiment.children(generation.info.run_id)
    assert data.data.tags["sicog.fingerprint"] == experiment.data.fingerprint
    assert data.data.tags["sicog.artifact"] == str(experiment.data.path)
    assert data.data.params == {"rows": "3"}, "a parameter too long for MLflow is left to the recipe"
    assert data.data.metrics["cost/samples"] == 3
    assert data.data.metrics["cost/tokens"] == 70
    assert data.data.metrics["cost/seconds"] >= 0
    assert experiment.data.manifest["made_by"] == data.info.run_id


def test_metrics_have_the_same_names_on_generation_and_parent(experiment: Experiment) -> None:
    generations = experiment.children(experiment.tracker.run_id)
    for index, run in enumerate(generations):
        assert run.data.metrics == METRICS[index]
        assert run.data.params["generation"] == str(index)
    for name in METRICS[0]:
        history = experiment.client.get_metric_history(experiment.tracker.run_id, name)
        assert [(point.step, point.value) for point in history] == [(i, METRICS[i][name]) for i in (0, 1)]


def test_a_generation_tells_where_it_comes_from(experiment: Experiment) -> None:
    """Two generations of different arms are told apart, and compared, by their own parameters."""
    first, second = (run.data for run in experiment.children(experiment.tracker.run_id))
    for run, origin in zip((first, second), ORIGIN, strict=True):
        assert {f"origin.{name}": value for name, value in origin.items()}.items() <= run.params.items()
        known = {"recipe": "tracked", "seed": "0", "curation.encoder": experiment.recipe.curation.encoder}
        assert known.items() <= run.params.items()
        assert run.params["code.package"] == version("sicog-exp")
    assert "parent_generation" not in first.params
    assert second.params["parent_generation"] == "G0"


def test_the_code_s_commit_is_known_in_a_checkout_of_it_alone(experiment: Experiment, monkeypatch: Any) -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(tracking.__file__).parent, text=True,
                          capture_output=True, check=True).stdout.strip()  # fmt: skip
    parent = experiment.client.get_run(experiment.tracker.run_id).data
    assert parent.tags["sicog.code.commit"] == parent.tags["mlflow.source.git.commit"]
    assert code_version()["commit"] == head
    assert code_version()["changed"].isdigit()
    monkeypatch.setattr(tracking, "_git", lambda *_: "")
    assert code_version.__wrapped__() == {"package": version("sicog-exp")}


def test_a_study_s_trial_names_its_generations(home: Path, experiment: Experiment) -> None:
    study = experiment.client.create_run(experiment.tracker.experiment_id).info.run_id
    tracker = Tracker(Recipe(name="searched"), study, "trial 3")
    names = [experiment.client.get_run(run).info.run_name for run in (tracker.run_id, tracker.generation(1))]
    assert names == ["trial 3", "G1 trial 3"]
    tracker.finish()


def test_the_logged_recipe_runs_again_as_it_is(experiment: Experiment, tmp_path: Path) -> None:
    path = experiment.client.download_artifacts(experiment.tracker.run_id, "recipe.yaml", str(tmp_path))
    assert load(path) == experiment.recipe
    params = experiment.client.get_run(experiment.tracker.run_id).data.params
    assert params["curation.caption_threshold"] == str(experiment.recipe.curation.caption_threshold)


def test_the_data_set_s_digest_is_ours(experiment: Experiment) -> None:
    for run in experiment.children(experiment.tracker.run_id):
        (logged,) = run.inputs.dataset_inputs
        assert logged.dataset.digest == experiment.data.content
        assert logged.dataset.name == "self-data"
        assert {tag.key: tag.value for tag in logged.tags} == {"mlflow.data.context": "training"}


def test_a_cached_step_links_to_the_run_that_made_it(experiment: Experiment) -> None:
    (generation,) = experiment.children(experiment.again.tracker.run_id)
    (cached,) = experiment.children(generation.info.run_id)
    assert cached.info.run_name == "G0 data (cached)"
    assert cached.data.tags["sicog.cached"] == "true"
    maker = experiment.client.get_run(cached.data.tags["sicog.made_by"])
    assert maker.info.run_name == "G0 data"
    assert maker.data.tags["sicog.fingerprint"] == cached.data.tags["sicog.fingerprint"]
    assert cached.data.metrics["cost/samples"] == 3


def test_models_come_back_from_the_registry(experiment: Experiment, tmp_path: Path) -> None:
    import mlflow
    from transformers import AutoModelForImageTextToText

    name = "sicog-tracked"
    for alias, index in (("gen-0", 0), ("gen-1", 1), ("champion", 1)):
        version = experiment.client.get_model_version_by_alias(name, alias)
        assert version.tags["sicog.fingerprint"] == experiment.models[index].fingerprint
        assert version.tags["sicog.weights"] == experiment.models[index].content
        assert version.run_id == experiment.tracker.generation(index)
    folder = mlflow.artifacts.download_artifacts(f"models:/{name}@champion", dst_path=str(tmp_path))
    model = AutoModelForImageTextToText.from_pretrained(folder)
    made = AutoModelForImageTextToText.from_pretrained(experiment.models[1].path)
    assert all(map(torch.equal, model.state_dict().values(), made.state_dict().values()))
    assert experiment.client.get_run(experiment.tracker.run_id).data.tags["sicog.champion"] == "G1"


def test_a_registered_version_leads_back_to_its_run(experiment: Experiment) -> None:
    found = experiment.client.get_model_version_by_alias("sicog-tracked", "gen-1")
    run = experiment.tracker.generation(1)
    assert found.tags["sicog.run"] == found.run_id == run
    wanted = {"sicog.recipe": "tracked", "sicog.seed": "0", "sicog.origin.pools": "caption-2 reasoning-3"}
    assert wanted.items() <= found.tags.items()
    for part in (f"#/experiments/{experiment.tracker.experiment_id}/runs/{run}", experiment.tracker.run_id,
                 "Generation 1", "s0 tracked", "caption-2 reasoning-3"):  # fmt: skip
        assert part in found.description


def test_registering_again_moves_the_alias(experiment: Experiment) -> None:
    first = experiment.client.get_model_version_by_alias("sicog-tracked", "gen-0").version
    experiment.again.tracker.register(0, experiment.models[0])
    assert experiment.client.get_model_version_by_alias("sicog-tracked", "gen-0").version != first


def test_no_registration_when_switched_off(home: Path, experiment: Experiment) -> None:
    tracker = Tracker(Recipe(name="private", tracking=TrackingConfig(register=False)))
    tracker.register(0, experiment.models[0])
    tracker.promote(0)
    assert not tracker.client.search_registered_models("name = 'sicog-private'")
    tracker.finish()


def test_an_upper_bound_is_marked_and_never_the_champion_of_the_registry(home: Path, experiment: Experiment) -> None:
    recipe = Recipe(name="bound", curation=CurationConfig(select="oracle"))
    tracker = Tracker(recipe)
    tracker.register(0, experiment.models[0])
    tracker.promote(0)
    assert not tracker.client.search_registered_models("name = 'sicog-bound'")
    for run in (tracker.run_id, tracker.generation(0)):
        assert tracker.client.get_run(run).data.tags["sicog.upper_bound"] == "oracle"
        assert tracker.client.get_run(run).data.params["curation.select"] == "oracle"
    tracker.finish()
    assert "sicog.upper_bound" not in tracker.client.get_run(experiment.tracker.run_id).data.tags


@pytest.mark.parametrize(("error", "status"), [(ValueError("bad row"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_a_failed_step_says_why(home: Path, tmp_path: Path, error: BaseException, status: str) -> None:
    def fail(config: Any, inputs: Any, workplace: Workplace) -> None:
        raise error

    watched = runner(Recipe(name="failing"), tmp_path)
    with pytest.raises(type(error)):
        watched.run(Step("data", fail, {}))
    client, generation = watched.tracker.client, watched.tracker.generation(0)
    (step,) = client.search_runs([watched.tracker.experiment_id], f"tags.`{PARENT}` = '{generation}'")
    assert step.info.status == status
    assert step.data.tags["sicog.error"] == str(error)
    assert not watched.done


def test_inside_mlflow_run_its_run_is_the_parent(home: Path, experiment: Experiment, monkeypatch: Any) -> None:
    given = experiment.client.create_run(experiment.tracker.experiment_id).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    tracker = Tracker(Recipe(name="inside"))
    assert tracker.run_id == given
    assert tracker.client.get_run(given).info.run_name == "s0 inside"
    assert tracker.client.get_run(tracker.generation(0)).data.tags[PARENT] == given


def test_the_environment_s_store_takes_precedence(home: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import mlflow

    before = mlflow.get_tracking_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "elsewhere")
    tracker = Tracker(Recipe())
    assert (tmp_path / "other.db").is_file()
    assert tracker.client.get_experiment(tracker.experiment_id).name == "elsewhere"
    mlflow.set_tracking_uri(before)


def test_processes_that_make_a_store_in_the_same_instant_all_get_it(tmp_path: Path) -> None:
    code = ("from sicog_exp.recipe import TrackingConfig; from sicog_exp.tracking import connect;"
            f"print(len(connect(TrackingConfig(uri='sqlite:///{tmp_path}/new.db')).search_experiments()))")  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    all_of_them = [subprocess.Popen([sys.executable, "-c", code], env=kept, text=True, stdout=subprocess.PIPE,
                                    stderr=subprocess.PIPE) for _ in range(3)]  # fmt: skip
    printed = [process.communicate(timeout=600) for process in all_of_them]
    assert [out for out, _ in printed] == ["1\n"] * 3, printed


def test_headline_names_each_task_s_accuracy_and_their_mean() -> None:
    scores = {"eval/a/accuracy": 0.2, "eval/a/accuracy_low": 0.1, "eval/a/family/accuracy": 0.9, "eval/b/accuracy": 0.4}
    assert headline(scores) == {"accuracy/mean": pytest.approx(0.3), "accuracy/a": 0.2, "accuracy/b": 0.4}


def test_flat_names() -> None:
    assert flat({"a": {"b": {"c": 1}, "d": [1, 2]}, "e": None}) == {"a.b.c": 1, "a.d": [1, 2], "e": None}
