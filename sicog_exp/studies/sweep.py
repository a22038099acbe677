"""Search any keys of a recipe with Optuna; the development split decides, the benchmark is run once, for the winner.

All trials share one store: what a trial does not change - data, G0, the pool, embeddings - is read, not made again.
Workers join a study by running the same command; a killed study goes on where it was.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import psutil
from rich.console import Console

from sicog_exp import smoke
from sicog_exp.ahead import check_ahead
from sicog_exp.evaluation.suites import BenchmarkError, load_suite
from sicog_exp.recipe import Recipe, RecipeError, load, load_as, to_yaml
from sicog_exp.studies import findings

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

HEARTBEAT = 30
"""Seconds between the signs of life that workers leave in a database."""
NAMING = 60
"""Seconds that a worker has to write its name on a trial that it began."""
TRIES = 4
"""Tries to open a database whose tables other workers are just making."""
FAILURES = 3
"""Trials that may fail one after another before the search stops: then it is not the values' fault."""
STARTUP = 8
"""Random trials before the sampler, or a pruner, trusts what it has seen."""


@dataclass(frozen=True)
class Axis:
    """The values of one searched key: a range, or a list of choices."""

    low: float | None = None
    """Smallest value."""
    high: float | None = None
    """Largest value."""
    whole: bool = False
    """Whole numbers only."""
    log: bool = False
    """Search on a logarithmic scale."""
    choices: tuple[Any, ...] = ()
    """Search a list instead of a range."""
    when: str | None = None
    """Searched only where an axis named before has this value, for example curation.encoder=minilm."""

    def __post_init__(self) -> None:
        if bool(self.choices) == (self.low is not None and self.high is not None):
            raise RecipeError("an axis has low and high, or choices")
        if self.low is not None and self.high is not None and not self.low <= self.high:
            raise RecipeError(f"low={self.low}, high={self.high}: low must not be above high")

    def ends(self) -> tuple[Any, ...]:
        """The values that a recipe must take for all others to be taken: every choice, or both ends of the range."""
        if self.choices:
            return self.choices
        low, high = cast(float, self.low), cast(float, self.high)
        return (round(low), round(high)) if self.whole else (low, high)

    def suggest(self, trial: Trial, key: str) -> Any:
        if self.choices:
            return trial.suggest_categorical(key, self.choices)
        low, high = cast(float, self.low), cast(float, self.high)
        if self.whole:
            return trial.suggest_int(key, round(low), round(high), log=self.log)
        return trial.suggest_float(key, low, high, log=self.log)


@dataclass(frozen=True)
class Objective:
    """What a trial is judged by: a metric of its last generation on the development split, or a cost of the trial."""

    metric: str = "eval/mean/accuracy"
    """`eval/<task>/accuracy`, `eval/mean/accuracy` (over the suite's tasks), `cost/flops` or `cost/seconds`."""
    direction: Literal["maximize", "minimize"] = "maximize"


@dataclass(frozen=True)
class StudyConfig:
    """One search: `experiments/sweeps/*.yaml`."""

    name: str
    """Names the study in its storage and in MLflow."""
    recipe: str
    """The recipe whose keys are searched."""
    space: Mapping[str, Axis]
    """Recipe key -> its values."""
    overrides: tuple[str, ...] = ()
    """Fixed changes to the recipe."""
    objectives: tuple[Objective, ...] = (Objective(),)
    """One, or several for a Pareto front."""
    trials: int = 40
    """Finished trials, pruned ones included, over all workers."""
    seed: int = 0
    """Seed of the search."""
    rungs: tuple[float, ...] = (1.0,)
    """Shares of pretrain.steps, rising to 1, at which a trial is scored and may be pruned; each rung trains anew with
    its own schedule, on the same pool."""
    pruner: Literal["median", "hyperband", "none"] = "median"
    """When to give a trial up; needs several rungs and one objective."""
    storage: str | None = None
    """Database URL for many machines; without one, a journal file beside the store."""

    def __post_init__(self) -> None:
        if not self.space or not self.objectives or self.trials < 1:
            raise RecipeError(f"study {self.name}: needs a space, an objective and at least one trial")
        if list(self.rungs) != sorted(set(self.rungs)) or not self.rungs or self.rungs[0] <= 0 or self.rungs[-1] != 1:
            raise RecipeError(f"rungs={list(self.rungs)}: must rise from above 0 to 1")
        if len(self.rungs) > 1 and len(self.objectives) > 1:
            raise RecipeError("rungs: Optuna does not prune studies of several objectives; use rungs=[1.0]")


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """The study in a YAML file; its recipe and every searched key are checked. Raises RecipeError."""
    if not Path(path).is_file():
        raise RecipeError(f"{path}: no such study; the shipped ones are in experiments/sweeps/")
    study = load_as(StudyConfig, path, overrides)
    try:
        _check(study)
    except (RecipeError, BenchmarkError) as error:
        raise RecipeError(f"{path}: {error}") from None
    return study


def _check(study: StudyConfig) -> None:
    """That the recipe takes both ends of every axis, and that every objective is measured."""
    recipe = load(study.recipe, study.overrides)
    for position, (key, axis) in enumerate(study.space.items()):
        for value in axis.ends():
            try:
                load(study.recipe, [*study.overrides, _override(key, value)])
            except RecipeError as error:
                raise RecipeError(f"space.{key}: {error}") from None
        earlier = list(study.space)[:position]
        if axis.when and axis.when.partition("=")[0] not in earlier:
            raise RecipeError(f"space.{key}.when={axis.when}: names no axis before this one; before it stand "
                              f"{', '.join(earlier) or 'none'}")  # fmt: skip
    if recipe.iterations < 1:
        raise RecipeError(f"iterations={recipe.iterations}: a sweep needs a generation after G0")
    tasks = load_suite(recipe.evaluation.suite).tasks("development", recipe.evaluation.judge)
    known = ["eval/mean/accuracy", "cost/flops", "cost/seconds", *(f"eval/{task.task}/accuracy" for task in tasks)]
    for metric in (objective.metric for objective in study.objectives):
        of_a_task = metric.startswith(tuple(f"eval/{task.task}/" for task in tasks))
        if metric not in known and not of_a_task:
            raise RecipeError(f"objectives: {metric} is not measured here; there are {', '.join(known)}")


def _override(key: str, value: Any) -> str:
    return f"{key}={json.dumps(value)}"


def suggested(study: StudyConfig, trial: Trial) -> dict[str, Any]:
    """A trial's values by key; conditional axes only where their condition holds."""
    values: dict[str, Any] = {}
    for key, axis in study.space.items():
        name, _, wanted = (axis.when or "").partition("=")
        if not axis.when or str(values.get(name)) == wanted:
            values[key] = axis.suggest(trial, key)
    return values


def recipe_of(study: StudyConfig, values: Mapping[str, Any], split: str, share: float = 1.0) -> Recipe:
    """The recipe of a trial, at a share of its pre-training steps."""
    fixed = [f"name={study.name}", f"evaluation.split={split}"]
    recipe = load(study.recipe, [*study.overrides, *fixed, *(_override(key, values[key]) for key in values)])
    return replace(recipe, pretrain=replace(recipe.pretrain, steps=math.ceil(recipe.pretrain.steps * share)))


# The search.


def run_sweep(study: StudyConfig, console: Console) -> Path:
    """Search until the study has its trials, then score the winner on the benchmark. Returns the winner's recipe."""
    import optuna

    from sicog_exp import tracking

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    base = recipe_of(study, {}, "development")
    smoke.refuse(base, "sweep")
    check_ahead(base)
    client = tracking.connect(base.tracking)
    search = open_study(study, base)
    retry_the_dead(search, console)
    known = search.user_attrs.get("mlflow_run", "")
    run_id = tracking.open_study(client, base.tracking, study.name, "sicog sweep", known)
    search.set_user_attr("mlflow_run", run_id)
    client.log_text(run_id, to_yaml(study), "study.yaml")
    console.print(f"{study.name}: {len(findings.finished(search))} of {study.trials} trials are done")
    failures = 0
    while len(findings.finished(search)) < study.trials:
        trial = search.ask()
        trial.set_user_attr("owner", _owner())
        error = Attempt(study, search, run_id, console).run(trial)
        failures = failures + 1 if error else 0
        if error and failures == FAILURES:
            raise error
    return conclude(study, search, run_id, console)


def open_study(study: StudyConfig, base: Recipe) -> Study:
    import optuna

    from sicog_exp.studies.sampler import SeededByTrial

    directions = [objective.direction for objective in study.objectives]
    search = optuna.create_study(storage=_storage(study, base), study_name=study.name, directions=directions,
                                 pruner=_pruner(study), load_if_exists=True)  # fmt: skip
    # A sampler seeded alike would propose the same trials again after each restart, and to every worker.
    search.sampler = SeededByTrial(study.seed, lambda seed: optuna.samplers.TPESampler(
        seed=seed, multivariate=True, group=True, n_startup_trials=STARTUP, constant_liar=True))  # fmt: skip
    search.set_metric_names([objective.metric for objective in study.objectives])
    return search


def _storage(study: StudyConfig, base: Recipe) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from sqlalchemy.exc import SQLAlchemyError

    if study.storage:
        try:
            return _database(study.storage)
        except (SQLAlchemyError, ImportError) as error:
            first = str(error).strip().splitlines()[0]
            raise RecipeError(f"storage={study.storage}: no database answers there ({first}); correct the URL, such as "
                              "postgresql+psycopg://USER@HOST/DATABASE or sqlite:///FILE") from None  # fmt: skip
    folder = Path(base.store) / "studies"
    folder.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(folder / f"{study.name}.journal")))


def _database(url: str) -> Any:
    """Optuna makes its tables without a lock: of two workers that begin on an empty database one may fail, and finds
    them made when it tries again."""
    from optuna.storages import RDBStorage, RetryFailedTrialCallback
    from sqlalchemy.exc import IntegrityError, ProgrammingError

    def opened() -> Any:
        return RDBStorage(url, heartbeat_interval=HEARTBEAT, grace_period=4 * HEARTBEAT,
                          failed_trial_callback=RetryFailedTrialCallback())  # fmt: skip

    for _ in range(TRIES):
        try:
            return opened()
        except (IntegrityError, ProgrammingError):
            time.sleep(1)
    return opened()


def _pruner(study: StudyConfig) -> Any:
    from optuna import pruners

    if len(study.rungs) == 1 or study.pruner == "none":
        return pruners.NopPruner()
    if study.pruner == "hyperband":
        return pruners.HyperbandPruner(min_resource=1, max_resource=len(study.rungs))
    return pruners.MedianPruner(n_startup_trials=STARTUP)


def _owner() -> str:
    """This process, told from a later one that gets the same number."""
    return f"{socket.gethostname()} {os.getpid()} {psutil.Process().create_time():.0f}"


def _alive(owner: str) -> bool:
    """Whether the process that runs a trial still does; of another machine's nothing is known here."""
    host, _, rest = owner.partition(" ")
    if host != socket.gethostname() or not rest:
        return bool(rest)
    pid, started = rest.split()
    try:
        return f"{psutil.Process(int(pid)).create_time():.0f}" == started
    except psutil.NoSuchProcess:
        return False


def _just_begun(trial: FrozenTrial) -> bool:
    """Whether its worker may be about to write its name: a trial runs before it has an owner."""
    return trial.datetime_start is not None and datetime.now() - trial.datetime_start < timedelta(seconds=NAMING)


def retry_the_dead(search: Study, console: Console) -> None:
    """Fail the trials whose worker was killed on this machine, and queue their values again: their finished steps are
    in the store. (Databases see to it by heartbeat, for workers on other machines too.)"""
    from optuna.trial import TrialState

    for trial in search.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        owner = trial.user_attrs.get("owner", "")
        if not (_alive(owner) if owner else _just_begun(trial)):
            search.tell(trial.number, state=TrialState.FAIL)
            search.enqueue_trial(trial.params)
            console.print(f"trial {trial.number}: its process is gone; its values are tried again")


class Attempt:
    """One trial: from its values to its scores, watched in an MLflow run of its own."""

    def __init__(self, study: StudyConfig, search: Study, study_run: str, console: Console) -> None:
        self.study, self.search, self.study_run, self.console = study, search, study_run, console

    def run(self, trial: Trial) -> Exception | None:
        """The error of a trial that failed, such as a loss that is no number any more."""
        from optuna import TrialPruned
        from optuna.trial import TrialState

        values = suggested(self.study, trial)
        recipe = recipe_of(self.study, values, "development")
        tracker = self._tracker(recipe, trial, values)
        self.console.rule(f"{self.study.name}, trial {trial.number}: {findings.shown(values)}")
        try:
            measured = self._climb(trial, values, tracker)
        except TrialPruned:
            self.search.tell(trial, state=TrialState.PRUNED)
            self._close(tracker, "pruned", "FINISHED")
        except Exception as error:
            self.search.tell(trial, state=TrialState.FAIL)
            self._close(tracker, f"failed: {error}", "FAILED")
            self.console.print(f"trial {trial.number} failed: {error}")
            return error
        else:
            self.search.tell(trial, [measured[objective.metric] for objective in self.study.objectives])
            self._close(tracker, "complete", "FINISHED")
        return None

    def _tracker(self, recipe: Recipe, trial: Trial, values: Mapping[str, Any]) -> Any:
        from sicog_exp.tracking import Tracker

        tracker = Tracker(recipe, self.study_run, f"trial {trial.number}")
        trial.set_user_attr("mlflow_run", tracker.run_id)
        tracker.client.set_tag(tracker.run_id, "sicog.trial", str(trial.number))
        return tracker

    def _climb(self, trial: Trial, values: Mapping[str, Any], tracker: Any) -> dict[str, float]:
        """Scores at each rung; raises TrialPruned below the last one."""
        from optuna import TrialPruned

        measured: dict[str, float] = {}
        for rung, share in enumerate(self.study.rungs, 1):
            measured = self._measure(recipe_of(self.study, values, "development", share), tracker, rung)
            if rung < len(self.study.rungs):
                trial.report(measured[self.study.objectives[0].metric], rung)
                if trial.should_prune():
                    raise TrialPruned
        return measured

    def _measure(self, recipe: Recipe, tracker: Any, rung: int) -> dict[str, float]:
        """Run the recipe and log its last generation's metrics on the trial, with step = rung."""
        from sicog_exp import loop
        from sicog_exp.evaluation import compare
        from sicog_exp.planning.plan import expected_work
        from sicog_exp.progress import Display
        from sicog_exp.reporting import collect, costs
        from sicog_exp.runner import Runner
        from sicog_exp.store import Store

        with Display(expected_work(recipe), self.console) as display:
            runner = Runner(Store(recipe.store), tracker, display)
            lineage = loop.iterate(recipe, runner)
        table = compare.score_table(lineage.generations[-1].scores.path, recipe.evaluation.bootstrap)
        measured = compare.metrics(table)
        measured["eval/mean/accuracy"] = sum(score.overall.mean for score in table.values()) / len(table)
        rows = collect.cost_rows(runner.done)
        measured["cost/flops"] = costs.cumulative(rows)[-1].flops
        measured["cost/seconds"] = sum(row.seconds for row in rows)
        tracker.log_metrics(tracker.run_id, measured, rung)
        return measured

    @staticmethod
    def _close(tracker: Any, state: str, status: str) -> None:
        tracker.client.set_tag(tracker.run_id, "sicog.state", state[:500])
        tracker.finish(status)


# The end.


def conclude(study: StudyConfig, search: Study, run_id: str, console: Console) -> Path:
    """Write the winner's recipe, score it on the benchmark, show what mattered."""
    from sicog_exp.experiment import run_experiment
    from sicog_exp.tracking import connect

    best = findings.ranked(search)[0]
    recipe = replace(recipe_of(study, best.params, "benchmark"), name=f"{study.name}-best")
    folder = Path(recipe.store) / "studies"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{study.name}-best.yaml"
    path.write_text(to_yaml(recipe))
    findings.show(study.name, search, console)
    console.rule(f"{study.name}: the winner, trial {best.number}, on the benchmark")
    run_experiment(recipe, console)
    client = connect(recipe.tracking)
    client.log_artifact(run_id, str(path))
    logarithmic = [key for key, axis in study.space.items() if axis.log]
    for picture in findings.draw(study.name, search, list(study.space), logarithmic, folder):
        client.log_artifact(run_id, str(picture))
    client.log_dict(run_id, findings.importances(search), "importances.json")
    client.set_tag(run_id, "sicog.best_trial", str(best.number))
    client.set_terminated(run_id)
    console.print(f"the winner's recipe: {path}   (sicog iterate {path})")
    return path
