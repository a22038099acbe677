"""Which part of a recipe does the work? Arms of one recipe over several seeds, compared in pairs, compute counted.

All arms and seeds share one store: what an arm does not change - data, G0, a pool - is made once. An ablation goes on
where it was killed, and one that is finished shows its result again.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from rich.console import Console

from sicog_exp import smoke
from sicog_exp.interruption import INTERRUPTIONS
from sicog_exp.recipe import Recipe, RecipeError, StopConfig, load, load_as, to_yaml
from sicog_exp.store import Artifact, Step, Store, StoreError, Workplace

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from sicog_exp.reporting.ablation import AblationData, ArmRun, Difference, Score, Share

REVISION = 1
OWN = ("name", "seed")
"""Recipe keys that the study sets for every run."""
SHARED = ("store", "tracking.", "evaluation.", "data.source", "data.seed", "data.questions_per_image",
          "data.development", "data.benchmark", "data.holdout", "data.root")  # fmt: skip
"""How the recipe keys begin that arms must have in common to be compared question by question; all of `data.` where
what is scored is held out of the rest."""


class AblationError(RuntimeError):
    """An ablation without its result; the message says what failed and what to do."""


@dataclass(frozen=True)
class Pair:
    """One comparison, after - before. Each end is an arm, meaning its last generation; ARM:G0 means that one."""

    before: str
    after: str


@dataclass(frozen=True)
class AblationConfig:
    """One ablation: `experiments/ablations/*.yaml`."""

    name: str
    """Names the study in MLflow; arms and seeds that are added later join it."""
    recipe: str
    """The recipe that the arms change."""
    reference: str
    """The arm that the others are compared with."""
    arms: Mapping[str, tuple[str, ...]]
    """Arm -> its changes to the recipe."""
    overrides: tuple[str, ...] = ()
    """Changes to the recipe for all arms; an arm's own come after them."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Every arm is run with each of them."""
    pairs: tuple[Pair, ...] = ()
    """What is compared; if nothing is said, the reference with its G0, and every other arm with the reference."""
    ceiling: Pair | None = None
    """A floor and a bound, such as a random candidate and the selection oracle: every other arm's gain over the floor
    is shown as a share of the bound's."""

    def __post_init__(self) -> None:
        if self.reference not in self.arms:
            raise RecipeError(f"reference={self.reference}: no such arm; there are {', '.join(self.arms) or 'none'}")
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise RecipeError(f"seeds={list(self.seeds)}: different whole numbers from 0, at least one")
        named = [("pairs", pair) for pair in self.pairs] + ([("ceiling", self.ceiling)] if self.ceiling else [])
        for key, end in ((key, end) for key, pair in named for end in (pair.before, pair.after)):
            if end_of(end)[0] not in self.arms:
                raise RecipeError(f"{key}: {end}: no such arm; there are {', '.join(self.arms)}")

    @property
    def compared(self) -> tuple[Pair, ...]:
        """The pairs, or what stands for them."""
        others = (Pair(self.reference, arm) for arm in self.arms if arm != self.reference)
        return self.pairs or (Pair(f"{self.reference}:G0", self.reference), *others)


def end_of(text: str) -> tuple[str, int | None]:
    """(arm, generation) of a pair's end; None is the last one."""
    arm, mark, generation = text.rpartition(":G")
    return (arm, int(generation)) if mark and generation.isdecimal() else (text, None)


def load_ablation(path: str | Path, overrides: Sequence[str] = ()) -> AblationConfig:
    """The ablation in a YAML file; every arm's recipe is checked. Overrides change keys of the study or, for all arms,
    of the recipe. Raises RecipeError."""
    if not Path(path).is_file():
        raise RecipeError(f"{path}: no such study; the shipped ones are in experiments/ablations/")
    own = [text for text in overrides if re.split(r"[.=]", text)[0] in AblationConfig.__dataclass_fields__]
    study = load_as(AblationConfig, path, own)
    study = replace(study, overrides=(*study.overrides, *(text for text in overrides if text not in own)))
    try:
        _check(study)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    return study


def arm_recipe(study: AblationConfig, arm: str, seed: int) -> Recipe:
    """The recipe of one arm and seed."""
    recipe = load(study.recipe, [*study.overrides, *study.arms[arm]])
    return replace(recipe, seed=seed, name=f"{study.name}-{re.sub(r'[^a-zA-Z0-9.]+', '-', arm).strip('-')}")


# What would be known only after hours.


def _check(study: AblationConfig) -> None:
    """That every arm is a recipe of its own with a generation to compare, and that all share one benchmark."""
    _check_keys("overrides", study.overrides)
    load(study.recipe, study.overrides)
    recipes: dict[str, Recipe] = {}
    for arm, changes in study.arms.items():
        try:
            _check_keys("an arm", changes)
            recipe = replace(arm_recipe(study, arm, 0), name="")
            _check_comparable(study, recipe)
        except RecipeError as error:
            raise RecipeError(f"arms.{arm}: {error}") from None
        twin = next((name for name, other in recipes.items() if other == recipe), None)
        if twin is not None:
            raise RecipeError(f"arms.{arm}: the same recipe as {twin}'s, so there is nothing to compare; change a key "
                              "or leave the arm out")  # fmt: skip
        recipes[arm] = recipe
    for end in (end for pair in study.compared for end in (pair.before, pair.after)):
        arm, generation = end_of(end)
        if generation is not None and generation > recipes[arm].iterations:
            raise RecipeError(f"pairs: {end}: {arm} ends with G{recipes[arm].iterations}")


def _check_keys(place: str, overrides: Sequence[str]) -> None:
    for text in overrides:
        key = text.partition("=")[0]
        if key in OWN:
            raise RecipeError(f"{text}: {place} cannot set {key}; the study's name and seeds (--seeds) do")


def _check_comparable(study: AblationConfig, recipe: Recipe) -> None:
    from sicog_exp.tracking import flat

    if recipe.iterations < 1:
        raise RecipeError(f"iterations={recipe.iterations}: the arms differ from G1 on; use iterations=1 or more")
    if recipe.stop != StopConfig():
        raise RecipeError("stop: arms that end at different generations are not compared at equal steps; leave stop.* "
                          "out and set iterations")  # fmt: skip
    common = flat(asdict(load(study.recipe, study.overrides)))
    shared = (*SHARED, "data.") if _held_out(recipe) else SHARED
    for key, value in flat(asdict(recipe)).items():
        if key.startswith(shared) and value != common[key]:
            raise RecipeError(f"{key}={value}: the other arms have {common[key]}; arms are compared in one store on "
                              "one benchmark, so set it for all, in overrides")  # fmt: skip


def _held_out(recipe: Recipe) -> bool:
    """Whether the scored split is what other data leave of one source, and so changes with them."""
    data, split = recipe.data, recipe.evaluation.split
    if data.source == "own":
        return getattr(data, split) is None
    return data.source == "easyvqa" and split == "development"


def check_out(out: Path) -> None:
    """That the result can be written there. Raises RecipeError."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"--out {out}: {error.strerror}: {error.filename}; name a file that can be written") from None
    if out.is_dir() or out.suffix != ".json":
        raise RecipeError(f"--out {out}: {'a folder' if out.is_dir() else 'no JSON file'}; name a file, such as "
                          f"{out / 'ablation.json' if out.is_dir() else out.with_suffix('.json')}")  # fmt: skip


# The runs.


def run_ablation(study: AblationConfig, console: Console, out: Path | None = None) -> Artifact:
    """Run the arms, or continue them, or say that nothing is to be done; show the result, and copy it to `out` and
    beside it. Raises AblationError where runs failed."""
    from sicog_exp.ahead import check_ahead
    from sicog_exp.experiment import SUMMARY, check_memory, whole
    from sicog_exp.reporting import ablation
    from sicog_exp.tracking import mark_no_op

    if out:
        check_out(out)
    recipes = [arm_recipe(study, arm, study.seeds[0]) for arm in study.arms]
    store = Store(recipes[0].store)
    step = ablation_step(study, store, console)
    finished = whole(store, step, study.name, console)
    if finished is None:
        for recipe in recipes:
            smoke.refuse(recipe, "ablate")
            check_memory(recipe)
            check_ahead(recipe)
        finished = store.run(step)
    else:
        mark_no_op(recipes[0].tracking, json.loads((finished / SUMMARY).read_text())["run_id"])
    ablation.show(ablation.from_json((finished / ablation.DATA).read_bytes()), console)
    for path in _hand_over(finished, out):
        console.print(f"written: {path}", highlight=False)
    return finished


def _hand_over(finished: Artifact, out: Path | None) -> Iterator[Path]:
    """The result's files, copied to `out` and its neighbours where that is wanted."""
    from sicog_exp.reporting import ablation

    for path in (finished / name for name in (ablation.DATA, ablation.PLOT, ablation.PAGE, ablation.TABLES)):
        yield Path(shutil.copyfile(path, out.with_suffix(path.suffix))) if out else path


def ablation_step(study: AblationConfig, store: Store, console: Console) -> Step:
    """The whole ablation as one step: it is finished when its result is."""
    from sicog_exp.experiment import experiment_step

    runs = {f"{arm}, seed {seed}": experiment_step(arm_recipe(study, arm, seed), store, console).fingerprint
            for arm in study.arms for seed in study.seeds}  # fmt: skip

    def run(config: Any, inputs: Mapping[str, Artifact], workplace: Workplace) -> None:
        _run(study, workplace, console)

    return Step("ablate", run, {"study": study, "runs": runs}, revision=REVISION)


def _run(study: AblationConfig, workplace: Workplace, console: Console) -> None:
    from sicog_exp.tracking import connect

    recipe = arm_recipe(study, study.reference, study.seeds[0])
    client = connect(recipe.tracking)
    run_id = _open(client, study, recipe)
    try:
        found = gather(study, client, run_id, console)
        _conclude(study, found, client, run_id, workplace.directory)
    except BaseException as error:
        client.set_terminated(run_id, "KILLED" if isinstance(error, INTERRUPTIONS) else "FAILED")
        raise
    client.set_terminated(run_id)


def _open(client: MlflowClient, study: AblationConfig, recipe: Recipe) -> str:
    """The study's run: the one that an earlier command of this study's name opened, or a new one."""
    from sicog_exp import tracking

    known = tracking.study_of_name(client, recipe.tracking, study.name)
    run_id = tracking.open_study(client, recipe.tracking, study.name, "sicog ablate", known)
    client.set_tag(run_id, "sicog.study", study.name)
    client.log_text(run_id, to_yaml(study), "study.yaml")
    tracking.mark_no_op(recipe.tracking, run_id, "goes on in another run")
    return run_id


def gather(study: AblationConfig, client: MlflowClient, run_id: str, console: Console) -> dict[str, list[Artifact]]:
    """Arm -> its finished runs, seed by seed; runs what is missing. A run that fails by an error of ours leaves the
    others their turn; it is raised when they are done. Raises AblationError."""
    from sicog_exp.experiment import Part, run_experiment

    found: dict[str, list[Artifact]] = {arm: [] for arm in study.arms}
    failed = []
    for seed, arm in ((seed, arm) for seed in study.seeds for arm in study.arms):
        console.rule(f"{study.name}: {arm}, seed {seed}")
        tags = {"sicog.study": study.name, "sicog.arm": arm, "sicog.seed": str(seed)}
        try:
            finished = run_experiment(arm_recipe(study, arm, seed), console, Part(run_id, f"s{seed} {arm}", tags))
        except StoreError:
            raise
        except Exception as error:
            if not type(error).__module__.startswith("sicog_exp."):
                raise
            failed.append(f"{arm}, seed {seed}: {error}")
            console.print(f"failed: {failed[-1]}", highlight=False)
            continue
        found[arm].append(finished)
    if failed:
        raise AblationError(f"{len(failed)} of {len(study.arms) * len(study.seeds)} runs failed; correct what is named "
                            f"and run the same command again, the others are kept. {'; '.join(failed)}")  # fmt: skip
    return found


# The result.


def _conclude(study: AblationConfig, found: Mapping[str, Sequence[Artifact]], client: MlflowClient, run_id: str,
              folder: Path) -> None:  # fmt: skip
    """Measure, write and log the result, with what it was made of."""
    from sicog_exp.experiment import SUMMARY
    from sicog_exp.reporting import ablation

    for path in ablation.write(measured(study, found, run_id), folder):
        client.log_artifact(run_id, str(path))
    runs = [run for runs in found.values() for run in runs]
    parts = {name for run in runs for name in (run.path.name, *_summary(run)["artifacts"])}
    (folder / SUMMARY).write_text(json.dumps({"run_id": run_id, "artifacts": sorted(parts)}, indent=1))


def measured(study: AblationConfig, found: Mapping[str, Sequence[Artifact]], run_id: str) -> AblationData:
    """Scores, differences and compute of all arms."""
    from sicog_exp.reporting import ablation

    recipe = arm_recipe(study, study.reference, study.seeds[0])
    runs = tuple(arm_run(run, arm, seed) for arm, runs in found.items() for seed, run in zip(study.seeds, runs))
    data = ablation.AblationData(
        study.name, study.recipe, study.reference, recipe.evaluation.split, study.seeds, study.arms, study.overrides,
        date.today().isoformat(), run_id, tuple(scores(found)),
        tuple(differences(study, found, recipe.evaluation.bootstrap)), runs,
        shares=tuple(shares(study, found, recipe.evaluation.bootstrap)))  # fmt: skip
    return replace(data, notes=tuple(ablation.unequal(data)))


def _summary(run: Artifact) -> dict[str, Any]:
    from sicog_exp.experiment import SUMMARY

    return json.loads((run / SUMMARY).read_text())


def scores(found: Mapping[str, Sequence[Artifact]]) -> Iterator[Score]:
    """Accuracy of every arm's generations, task by task, over seeds."""
    from sicog_exp.reporting.ablation import Score

    for arm, runs in found.items():
        seeds = [_summary(run)["generations"] for run in runs]
        for index, generations in enumerate(zip(*seeds)):  # generations that every seed has
            for task in generations[0]:
                values = tuple(generation[task]["mean"] for generation in generations)
                spread = stdev(values) if len(values) > 1 else None
                yield Score(arm, index, task, mean(values), spread, values)


def differences(study: AblationConfig, found: Mapping[str, Sequence[Artifact]], resamples: int) -> list[Difference]:
    """Every pair on every task, pooled over seeds, its p corrected (Holm) for all pairs of the task."""
    from sicog_exp.evaluation.compare import pooled
    from sicog_exp.evaluation.statistics import holm
    from sicog_exp.reporting.ablation import Difference

    results = [(pair, pooled(_evaluations(found, pair.before), _evaluations(found, pair.after), resamples))
               for pair in study.compared]  # fmt: skip
    adjusted = {task: iter(holm([tasks[task].p for _, tasks in results])) for task in results[0][1]}
    return [Difference(pair.before, pair.after, task, one.difference, one.low, one.high, one.spread, one.per_seed,
                       one.n, one.clusters, one.p, next(adjusted[task]))
            for pair, tasks in results for task, one in tasks.items()]  # fmt: skip


def shares(study: AblationConfig, found: Mapping[str, Sequence[Artifact]], resamples: int) -> Iterator[Share]:
    """How much of the ceiling each arm reaches, where the study names one."""
    from sicog_exp.evaluation.compare import ceiling_shares
    from sicog_exp.reporting.ablation import Share

    if not study.ceiling:
        return
    floor, bound = study.ceiling.before, study.ceiling.after
    for arm in (arm for arm in study.arms if arm not in (floor, bound)):
        floors, arms, bounds = (_evaluations(found, end) for end in (floor, arm, bound))
        for task, share in ceiling_shares(floors, arms, bounds, resamples).items():
            if share:
                yield Share(arm, task, share.mean, share.low, share.high)


def _evaluations(found: Mapping[str, Sequence[Artifact]], end: str) -> list[Path]:
    """Seed by seed the evaluation folder of a pair's end."""
    arm, generation = end_of(end)
    index = -1 if generation is None else generation
    return [run.path.parent / _summary(run)["evaluations"][index] for run in found[arm]]


def arm_run(finished: Artifact, arm: str, seed: int) -> ArmRun:
    """The FLOPs of a finished run by stage, from the facts of the artifacts that it is made of."""
    from sicog_exp.reporting import collect, costs
    from sicog_exp.reporting.ablation import ArmRun

    summary, store = _summary(finished), Store(finished.path.parent)
    rows = collect.cost_rows([(0, store.read(name)) for name in summary["artifacts"]])
    stages: dict[str, float] = defaultdict(float)
    for row in rows:
        if row.flops:
            stages[row.stage] += row.flops
    (made,) = costs.cumulative(rows)
    return ArmRun(arm, seed, summary["run_id"], stages, made.trained, made.flops - made.trained)
