"""MLflow: one parent run per experiment, a child per generation, a grandchild per step, the same metric names in each.

Everything goes through `MlflowClient` with explicit run ids, so that Lightning's logger, which ends the run it was
given, and a surrounding `mlflow run` cannot take each other's runs.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sicog_exp.interruption import INTERRUPTIONS
from sicog_exp.recipe import Recipe, RecipeError, TrackingConfig, to_yaml
from sicog_exp.store import Artifact, Step

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

PARENT, NAME, SOURCE = "mlflow.parentRunId", "mlflow.runName", "mlflow.source.name"
COMMIT = "mlflow.source.git.commit"
PARAMETER_LIMIT = 6000
"""MLflow cuts longer parameters silently; a longer one is left to the logged recipe."""


def connect(config: TrackingConfig) -> MlflowClient:
    """The client of the recipe's tracking store (MLFLOW_TRACKING_URI takes precedence)."""
    import mlflow
    from mlflow import MlflowClient

    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    uri = os.environ.get("MLFLOW_TRACKING_URI") or config.uri
    mlflow.set_tracking_uri(uri)
    with _alone(uri):
        client = MlflowClient()
        client.search_experiments(max_results=1)
    return client


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """One process at a time opens a SQLite store: two that make its tables at once fail each other."""
    folder = Path(uri.removeprefix("sqlite:///")).parent
    if not uri.startswith("sqlite:///") or not folder.is_dir():
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def check_tracking(config: TrackingConfig) -> None:
    """Raises RecipeError where the tracking store does not answer."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    given = os.environ.get("MLFLOW_TRACKING_URI")
    name, uri = ("MLFLOW_TRACKING_URI", given) if given else ("tracking.uri", config.uri)
    folder = Path(uri.removeprefix("sqlite:///")).parent
    if uri.startswith("sqlite:///") and folder.exists() and not folder.is_dir():  # MLflow would try for minutes
        raise RecipeError(f"{name}={uri}: no tracking store can be there: {folder} is no folder; correct {name}")
    try:
        with _impatient():
            connect(config).search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        first = str(error).strip().splitlines()[0][:200]
        raise RecipeError(f"{name}={uri}: no tracking store answers there ({first}); start the server, or correct "
                          f"{name}") from None  # fmt: skip


@contextmanager
def _impatient() -> Iterator[None]:
    """One try of some seconds; MLflow itself would try for minutes."""
    wanted = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def open_run(client: MlflowClient, config: TrackingConfig, name: str, source: str) -> tuple[str, str]:
    """(run, experiment): the run that `mlflow run` made for us, or a new one in the recipe's experiment."""
    given, experiment_id = os.environ.get("MLFLOW_RUN_ID"), _experiment(client, config)
    if given:
        client.set_tag(given, NAME, name)
        return given, experiment_id
    run = client.create_run(experiment_id, tags={NAME: name, SOURCE: source})
    return run.info.run_id, experiment_id


def _experiment(client: MlflowClient, config: TrackingConfig) -> str:
    """That of the run that `mlflow run` made for us, or the recipe's, made when first asked for."""
    given = os.environ.get("MLFLOW_RUN_ID")
    if given:
        return client.get_run(given).info.experiment_id
    title = os.environ.get("MLFLOW_EXPERIMENT_NAME") or config.experiment
    experiment = client.get_experiment_by_name(title)
    return experiment.experiment_id if experiment else client.create_experiment(title)


def open_study(client: MlflowClient, config: TrackingConfig, name: str, source: str, known: str = "") -> str:
    """The run under which a study's runs stand: `known` goes on, or one is opened."""
    run_id = known or open_run(client, config, name, source)[0]
    client.set_tag(run_id, "sicog.level", "study")
    client.update_run(run_id, status="RUNNING")
    return run_id


def study_of_name(client: MlflowClient, config: TrackingConfig, name: str) -> str:
    """The run of the ablation of this name in the recipe's experiment, or nothing."""
    studies = client.search_runs([_experiment(client, config)], "tags.`sicog.level` = 'study'")
    # Compared here: MLflow's search language knows no quotation mark inside a name.
    return next((run.info.run_id for run in studies if run.data.tags.get("sicog.study") == name), "")


def mark_no_op(config: TrackingConfig, other_run: str, words: str = "nothing to do") -> None:
    """Let the run that `mlflow run` opened for nothing point to the one that holds the work."""
    given = os.environ.get("MLFLOW_RUN_ID")
    if given and given != other_run:
        client = connect(config)
        client.set_tag(given, NAME, words)
        client.set_tag(given, "sicog.finished_run", other_run)


def generation_runs(client: MlflowClient, experiment: Run) -> dict[int, Run]:
    """Generation -> its run, of an experiment's run."""
    query = f"tags.`{PARENT}` = '{experiment.info.run_id}' and tags.`sicog.level` = 'generation'"
    children = client.search_runs([experiment.info.experiment_id], query)
    return {int(child.data.tags["sicog.generation"]): child for child in children}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; an empty one is a value."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping) and value
        result |= flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return result


@lru_cache(maxsize=1)
def code_version() -> dict[str, str]:
    """`package`: the package's version; `commit`, where it runs from its own checkout; `changed`: files that differ."""
    here = Path(__file__).resolve()
    known = {"package": version("sicog-exp")}
    if _git(here.parent, "ls-files", here.name):  # not a checkout that merely holds our installation
        known["commit"] = _git(here.parent, "rev-parse", "HEAD")
        known["changed"] = str(len(_git(here.parent, "status", "--porcelain", "--untracked-files=no").splitlines()))
    return known


def _git(folder: Path, *arguments: str) -> str:
    """What git prints, nothing without a git or a repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def table_link(experiment_id: str, metric: str) -> str:
    """Where the UI shows all scored generations of an experiment, the best by `metric` first; those of a
    search's trials have no score of their own and would bury them."""
    from urllib.parse import quote

    scored = f"tags.`sicog.level` = 'generation' and metrics.`{metric}` >= 0"
    chosen = {"searchFilter": scored, "orderByKey": f"metrics.`{metric}`"}
    query = "&".join(f"{name}={quote(value, safe='')}" for name, value in chosen.items())
    return f"#/experiments/{experiment_id}/runs?workflowType=machine_learning&orderByAsc=false&{query}"


class Tracker:
    """The runs of one experiment; those of a study stand under the study's run, and each has the study's `tags`."""

    def __init__(self, recipe: Recipe, study_run: str = "", name: str = "", tags: Mapping[str, str] | None = None
                 ) -> None:  # fmt: skip
        self.recipe, self.tags = recipe, dict(tags or {})
        self.client = connect(recipe.tracking)
        self.name = name or f"s{recipe.seed} {recipe.name}"
        """Names the run, and its generations after their number: lists, which cut names, mix those of many runs."""
        if study_run:
            self.experiment_id = self.client.get_run(study_run).info.experiment_id
            self.run_id = self._child(study_run, self.name, "experiment")
        else:
            self.run_id, self.experiment_id = open_run(self.client, recipe.tracking, self.name, "sicog iterate")
        self._generations: dict[int, str] = {}
        self._log_recipe()

    def _log_recipe(self) -> None:
        self.client.log_text(self.run_id, to_yaml(self.recipe), "recipe.yaml")
        self._log_params(self.run_id, flat(asdict(self.recipe)))
        tags = {"sicog.level": "experiment", "sicog.recipe": self.recipe.name, **self._made_with()}
        for tag, value in (tags | self._no_result()).items():
            self.client.set_tag(self.run_id, tag, value)

    @staticmethod
    def _made_with() -> dict[str, str]:
        """The code, for our own search and in MLflow's words."""
        code = code_version()
        tags = {f"sicog.code.{name}": value for name, value in code.items()}
        return tags | ({COMMIT: code["commit"]} if "commit" in code else {})

    def _no_result(self) -> dict[str, str]:
        """Marks smoke tests and the runs whose self-data the truth chose: never a result, no model for the registry."""
        bound = {"sicog.upper_bound": self.recipe.curation.select} if self.recipe.is_upper_bound else {}
        return bound | ({"sicog.scale": "smoke"} if self.recipe.scale == "smoke" else {})

    @property
    def _registers(self) -> bool:
        return self.recipe.tracking.register and not self._no_result()

    def _log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        texts = [(name, str(value)) for name, value in params.items()]
        known = self.client.get_run(run_id).data.params
        fresh = [Param(name, text) for name, text in texts if len(text) <= PARAMETER_LIMIT and name not in known]
        for start in range(0, len(fresh), 100):
            self.client.log_batch(run_id, params=fresh[start : start + 100])

    def _child(self, parent: str, name: str, level: str, **tags: str) -> str:
        own = {PARENT: parent, NAME: name, "sicog.level": level, "sicog.recipe": self.recipe.name}
        labels = {**own, **self.tags, **tags}
        run: Run = self.client.create_run(self.experiment_id, tags=labels)
        return run.info.run_id

    def generation(self, index: int) -> str:
        """The run of generation `index`, made when first asked for. It repeats the recipe, so that the UI's comparison
        of any two generations shows how their recipes differ."""
        if index not in self._generations:
            tags = {"sicog.generation": str(index), SOURCE: "sicog iterate", **self._made_with(), **self._no_result()}
            run = self._child(self.run_id, f"G{index} {self.name}", "generation", **tags)
            self._generations[index] = run
            known = {"generation": index, "recipe": self.recipe.name}
            known |= {"parent_generation": f"G{index - 1}"} if index else {}
            known |= {f"code.{name}": value for name, value in code_version().items()}
            self._log_params(run, {**known, **flat(asdict(self.recipe))})
        return self._generations[index]

    def log_origin(self, index: int, origin: Mapping[str, str]) -> None:
        """What a finished generation was made of."""
        self._log_params(self.generation(index), {f"origin.{name}": value for name, value in origin.items()})

    def start_step(self, step: Step, generation: int) -> str:
        """A run for a step that is about to run."""
        run = self._child(self.generation(generation), f"G{generation} {step.name}", "step",
                          **{"sicog.step": step.name, "sicog.fingerprint": step.fingerprint})  # fmt: skip
        self._log_params(run, flat(step.identity["config"]))
        return run

    def finish_step(self, run_id: str, artifact: Artifact) -> None:
        self.log_metrics(run_id, {f"cost/{name}": value for name, value in artifact.facts.items()})
        self.client.set_tag(run_id, "sicog.artifact", str(artifact.path))
        self.client.set_terminated(run_id)

    def fail_step(self, run_id: str, error: BaseException) -> None:
        self.client.set_tag(run_id, "sicog.error", str(error)[:500])
        self.client.set_terminated(run_id, "KILLED" if isinstance(error, INTERRUPTIONS) else "FAILED")

    def link_cached(self, step: Step, generation: int, artifact: Artifact) -> None:
        """A finished step is not run again: its run here points to the one that made it."""
        run = self._child(self.generation(generation), f"G{generation} {step.name} (cached)", "step", **{
            "sicog.step": step.name, "sicog.fingerprint": step.fingerprint, "sicog.cached": "true",
            "sicog.made_by": artifact.manifest.get("made_by", "")})  # fmt: skip
        self.finish_step(run, artifact)

    def log_generation(self, index: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a generation: on its own run, and on the parent with step = generation."""
        self.log_metrics(self.generation(index), metrics)
        self.log_metrics(self.run_id, metrics, step=index)

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entries: list[Metric] = [Metric(name, float(value), now, step) for name, value in metrics.items()]
        for start in range(0, len(entries), 500):
            self.client.log_batch(run_id, metrics=entries[start : start + 500])

    def log_dataset(self, run_id: str, name: str, artifact: Artifact, context: str, rows: int) -> None:
        """A data set by our own digest of its files: MLflow's looks at few rows and columns."""
        import json

        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = json.dumps({"uri": artifact.path.as_uri()})
        profile = json.dumps({"num_rows": rows})
        data = Dataset(name, artifact.content, "local", source, profile=profile)
        self.client.log_inputs(run_id, [DatasetInput(data, [InputTag("mlflow.data.context", context)])])

    def log_file(self, path: Path, folder: str | None = None, generation: int | None = None) -> None:
        """A file as an artifact of the parent run, or of a generation's."""
        run_id = self.run_id if generation is None else self.generation(generation)
        self.client.log_artifact(run_id, str(path), folder)

    def describe(self, index: int) -> tuple[str, dict[str, str]]:
        """(description, tags) of generation `index`'s model: the way back to its run, and what it was made of."""
        run = self.client.get_run(self.generation(index)).data
        keys = [name for name in run.params if name.split(".")[0] in ("recipe", "seed", "generation", "origin", "code")]
        runs = f"#/experiments/{self.experiment_id}/runs"
        lines = [f"Generation {index} of [{self.name}]({runs}/{self.run_id}): "
                 f"[its run, with scores and data sets]({runs}/{self.generation(index)}).", ""]  # fmt: skip
        lines += [f"- {name}: `{run.params[name]}`" for name in sorted(keys)]
        tags = {f"sicog.{name}": run.params[name] for name in keys}
        return "\n".join(lines), {**tags, "sicog.run": self.generation(index), "sicog.parent_run": self.run_id}

    def register(self, index: int, artifact: Artifact) -> None:
        """Log generation `index`'s model and register it with the alias gen-<index>; not what is no result."""
        if not self._registers:
            return
        import mlflow
        from mlflow.exceptions import MlflowException

        run_id, name = self.generation(index), f"sicog-{self.recipe.name}"
        description, tags = self.describe(index)
        tags |= {"sicog.fingerprint": artifact.fingerprint, "sicog.weights": artifact.content}
        model = mlflow.initialize_logged_model(name=f"G{index}", source_run_id=run_id, tags=tags,
                                               experiment_id=self.experiment_id)  # fmt: skip
        self.client.log_model_artifacts(model.model_id, str(artifact.path))
        mlflow.finalize_logged_model(model.model_id, "READY")
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = self.client.create_model_version(name, f"models:/{model.model_id}", run_id, tags=tags,
                                                   model_id=model.model_id, description=description)  # fmt: skip
        self.client.set_registered_model_alias(name, f"gen-{index}", version.version)

    def promote(self, index: int) -> None:
        """Point the alias `champion` at generation `index`."""
        if self._registers:
            name = f"sicog-{self.recipe.name}"
            version = self.client.get_model_version_by_alias(name, f"gen-{index}")
            self.client.set_registered_model_alias(name, "champion", version.version)
        self.client.set_tag(self.run_id, "sicog.champion", f"G{index}")

    def finish(self, status: str = "FINISHED") -> None:
        for run_id in (*self._generations.values(), self.run_id):
            self.client.set_terminated(run_id, status)
