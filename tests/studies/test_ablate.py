"""Ablations: arms over seeds in one store, killed and continued, compared in pairs, their compute counted."""

from __future__ import annotations

import contextlib
import io
import json
import re
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from runs import REPOSITORY
from scipy.stats import ttest_1samp

from sicog_exp import loop
from sicog_exp.cli import main
from sicog_exp.evaluation.benchmarks import Sample
from sicog_exp.evaluation.statistics import holm
from sicog_exp.recipe import CurationConfig, RecipeError, load_as
from sicog_exp.records import write_jsonl
from sicog_exp.reporting import ablation
from sicog_exp.reporting.ablation import AblationData
from sicog_exp.store import Artifact
from sicog_exp.studies import ablate
from sicog_exp.studies.ablate import AblationConfig, Pair, arm_recipe, check_out, end_of, load_ablation

pytestmark = pytest.mark.timeout(900)
SHIPPED = sorted((REPOSITORY / "experiments/ablations").glob("*.yaml"))
ARMS = {"curated": [], "random": ["curation.select=random"], "annotated": ["self_data=false", "pretrain.steps=4"]}


def write(folder: Path, **changes: Any) -> Path:
    suite = f"evaluation.suite={REPOSITORY / 'tests/tiny_suite.yaml'}"
    steps = [f"{stage}.steps=6" for stage in ("develop", "pretrain", "instruct")]
    values = {"name": "tiny's", "recipe": str(REPOSITORY / "tests/tiny.yaml"), "reference": "curated", "arms": ARMS,
              "overrides": ["iterations=1", "tracking.register=false", suite, *steps], "seeds": [0, 1], **changes}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


# The study file.


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_studies_name_recipes_that_load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arms that select with the truth need that choice, which not every version knows."""
    monkeypatch.chdir(REPOSITORY)
    study = load_as(AblationConfig, path)
    known = typing.get_args(typing.get_type_hints(CurationConfig)["select"])
    ahead = {f"curation.select={word}" for word in ("truth", "oracle") if word not in known}
    kept = {arm: list(changes) for arm, changes in study.arms.items() if not ahead & set(changes)}
    if len(kept) == len(study.arms):
        load_ablation(path)
    assert len(study.arms) - len(kept) <= 2
    seeds = {arm_recipe(study, arm, 7).seed for arm in kept}
    recipes = [replace(arm_recipe(study, arm, 7), name="") for arm in kept]
    assert seeds == {7}
    assert all(recipes.count(recipe) == 1 for recipe in recipes)


def test_pairs_stand_for_themselves_or_are_the_reference_with_its_g0_and_the_others_with_it(tmp_path: Path) -> None:
    study = load_ablation(write(tmp_path))
    default = [("curated:G0", "curated"), ("curated", "random"), ("curated", "annotated")]
    assert study.compared == tuple(Pair(*ends) for ends in default)
    one = {"before": "random", "after": "curated"}
    assert load_ablation(write(tmp_path, pairs=[one])).compared == (Pair("random", "curated"),)


def test_overrides_change_the_study_or_the_recipe_of_all_arms_and_an_arms_own_win(tmp_path: Path) -> None:
    study = load_ablation(write(tmp_path), ["seeds=[4]", "name=other", "pretrain.steps=9", "store=S"])
    assert (study.seeds, study.name) == ((4,), "other")
    recipes = {arm: arm_recipe(study, arm, 4) for arm in ARMS}
    assert [recipes[arm].pretrain.steps for arm in ("curated", "random", "annotated")] == [9, 9, 4]
    assert recipes["random"].name == "other-random"
    assert {(recipe.seed, recipe.store) for recipe in recipes.values()} == {(4, "S")}


@given(st.text(), st.integers(0, 99))
def test_an_end_is_an_arm_by_its_last_generation_or_a_named_one(arm: str, generation: int) -> None:
    assert end_of(f"{arm}:G{generation}") == (arm, generation)
    plain = arm.replace(":G", "")
    assert end_of(plain) == (plain, None)


def test_a_generation_that_no_run_reaches_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, pairs=[{"before": "random:G1", "after": "curated"}])
    assert load_ablation(path).pairs
    path = write(tmp_path, pairs=[{"before": "random:G2", "after": "curated"}])
    with pytest.raises(RecipeError, match="random:G2: random ends with G1"):
        load_ablation(path)


@pytest.mark.parametrize(("common", "change", "refused"), [
    (["data.source=own", "data.annotated=a.jsonl", "data.unlabeled=b"], "data.annotated=c.jsonl", True),
    (["data.source=own", "data.annotated=a.jsonl", "data.unlabeled=b"], "data.max_bad_share=0.9", True),
    (["data.source=own", "data.annotated=a.jsonl", "data.unlabeled=b", "data.benchmark=d.jsonl"],
     "data.annotated=c.jsonl", False),
    (["data.source=easyvqa", "evaluation.split=development"], "data.annotated_images=5", True),
    (["data.source=easyvqa"], "data.annotated_images=5", False),
    ([], "data.annotated_images=5", False),
])  # fmt: skip
def test_arms_share_the_data_that_their_benchmark_is_held_out_of(common: list[str], change: str, refused: bool,
                                                                 tmp_path: Path) -> None:  # fmt: skip
    path = write(tmp_path, arms={"curated": [], "other": [change]}, overrides=["iterations=1", *common])
    if not refused:
        assert load_ablation(path)
        return
    with pytest.raises(RecipeError, match=rf"arms\.other: {change.replace('.', '[.]')}: the other arms have"):
        load_ablation(path)


# A study that was killed, continued, asked again, and extended.


@dataclass(frozen=True)
class Studied:
    """What the commands left: their exit statuses and what they printed."""

    folder: Path
    killed: tuple[int, str]
    continued: tuple[int, str]
    again: tuple[int, str]

    @property
    def data(self) -> AblationData:
        return ablation.from_json((self.folder / "out/r.json").read_bytes())

    @property
    def manifests(self) -> dict[str, dict[str, Any]]:
        found = self.folder.glob("store/*/manifest.json")
        return {path.parent.name: json.loads(path.read_text()) for path in found}

    def runs(self, level: str) -> list[Any]:
        client = MlflowClient(f"sqlite:///{self.folder}/mlflow.db")
        (experiment,) = [e for e in client.search_experiments() if e.name == "sicog"]
        return client.search_runs([experiment.experiment_id], f"tags.`sicog.level` = '{level}'", max_results=500)


def ask(*words: str) -> tuple[int, str]:
    """(status, output) of a command."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = main(["ablate", *words])
    return status, printed.getvalue()


@pytest.fixture(scope="module")
def home(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A working directory with a tracking store of its own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("ablation")
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        yield folder


@pytest.fixture(scope="module")
def studied(home: Path, tiny_model: Path) -> Studied:
    """Stopped while the second arm is scored, started again, and once more."""
    words = [str(write(home)), f"model.base={tiny_model}", "store=store", "--out", "out/r.json"]
    scored, evaluate = [], loop.evaluate

    def stopped(*given: Any) -> Any:
        scored.append(given)
        if len(scored) == 4:
            raise KeyboardInterrupt
        return evaluate(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate", stopped)
        killed = ask(*words)
    return Studied(home, killed, ask(*words), ask(*words))


def test_a_killed_study_goes_on_and_a_finished_one_shows_its_result(studied: Studied) -> None:
    assert studied.killed[0] == 130
    status, printed = studied.continued
    assert status == 0
    assert printed.count("finished before, nothing to do") == 1
    assert "differences, points" in printed
    status, again = studied.again
    assert status == 0
    assert "tiny's: finished before, nothing to do" in again
    assert again[again.index("sicog_world_direct: differences") :] == printed[printed.index(
        "sicog_world_direct: differences") :]  # fmt: skip
    statuses = Counter(run.info.status for run in studied.runs("experiment"))
    assert statuses == {"FINISHED": 6, "KILLED": 1}


def test_shared_steps_run_once(studied: Studied) -> None:
    steps = Counter(manifest["step"] for manifest in studied.manifests.values())
    wanted = {"data": 1, "base": 1, "develop": 2, "generate-caption": 2, "generate-reasoning": 2, "curate": 4,
              "pretrain": 6, "iterate": 6, "ablate": 1}  # fmt: skip
    assert {name: steps[name] for name in wanted} == wanted


def test_every_arm_generation_and_pair_is_in_the_result(studied: Studied) -> None:
    data = studied.data
    tasks = ["sicog_world_direct", "sicog_world_cot"]
    wanted = {(arm, g, task) for arm in ARMS for g in (0, 1) for task in tasks}
    assert {(s.arm, s.generation, s.task) for s in data.scores} == wanted
    assert {(d.label, d.task) for d in data.differences} == {
        (f"{after} \N{MINUS SIGN} {before}", task) for task in tasks
        for before, after in [("curated:G0", "curated"), ("curated", "random"), ("curated", "annotated")]}  # fmt: skip
    assert {len(d.per_seed) for d in (*data.scores, *data.differences)} == {2}
    assert {(d.n, d.clusters) for d in data.differences} == {(18, 6)}


def test_compute_is_summed_from_the_artifacts_of_each_run(studied: Studied) -> None:
    manifests = studied.manifests
    for run in studied.data.runs:
        (finished,) = [name for name in manifests if name.startswith("iterate") and json.loads(
            (studied.folder / "store" / name / "summary.json").read_text())["run_id"] == run.run_id]  # fmt: skip
        parts = json.loads((studied.folder / "store" / finished / "summary.json").read_text())["artifacts"]
        flops = [(manifests[name]["step"], manifests[name]["facts"].get("flops", 0.0)) for name in parts]
        sampled = sum(value for step, value in flops if step.startswith("generate"))
        assert run.generation == pytest.approx(sampled)
        assert run.training == pytest.approx(sum(v for step, v in flops if step in ("instruct", "develop", "pretrain")))
    compute = {arm: ablation.compute(studied.data, arm) for arm in ARMS}
    assert compute["annotated"]["generation"] == 0 < compute["curated"]["generation"]
    assert {"develop", "instruct", "pretrain", "generate-caption"} <= compute["curated"].keys()
    (note,) = [note for note in studied.data.notes if note.startswith("annotated")]
    share = 1 - compute["annotated"]["training"] / compute["curated"]["training"]
    assert f"{share:.1%} fewer FLOPs than curated" in note
    assert note in " ".join(studied.again[1].split())


def test_mlflow_holds_a_tagged_run_for_every_arm_and_seed(studied: Studied) -> None:
    (study,) = studied.runs("study")
    assert (study.info.status, study.info.run_name) == ("FINISHED", "tiny's")
    runs = [run for run in studied.runs("experiment") if run.info.status == "FINISHED"]
    assert {run.data.tags["mlflow.parentRunId"] for run in runs} == {study.info.run_id}
    tags = [tuple(run.data.tags[f"sicog.{name}"] for name in ("study", "arm", "seed")) for run in runs]
    assert sorted(tags) == sorted(("tiny's", arm, str(seed)) for arm in ARMS for seed in (0, 1))
    counted = {run.run_id: run for run in studied.data.runs}
    for run in runs:
        one = counted[run.info.run_id]
        assert run.data.metrics["cost/flops"] == pytest.approx(one.training + one.generation)
        assert run.data.metrics["cost/training_flops"] == pytest.approx(one.training)
        assert "eval/sicog_world_direct/accuracy" in run.data.metrics
        points = MlflowClient(f"sqlite:///{studied.folder}/mlflow.db").get_metric_history(run.info.run_id, "cost/flops")
        assert [point.step for point in points] == [0, 1]
    generations = [run for run in studied.runs("generation") if run.data.tags["sicog.arm"] == "random"]
    assert {run.data.tags["sicog.generation"] for run in generations} == {"0", "1"}
    client = MlflowClient(f"sqlite:///{studied.folder}/mlflow.db")
    files = {file.path for file in client.list_artifacts(study.info.run_id)}
    assert files == {"study.yaml", ablation.DATA, ablation.PLOT, ablation.PAGE, ablation.TABLES}


def test_the_result_is_written_where_it_is_wanted(studied: Studied) -> None:
    out = studied.folder / "out"
    assert {path.name for path in out.iterdir()} == {"r.json", "r.png", "r.html", "r.md"}
    assert (out / "r.png").read_bytes().startswith(b"\x89PNG")
    assert "| random \N{MINUS SIGN} curated |" in (out / "r.md").read_text()
    assert f"written: {Path('out/r.html')}" in studied.again[1]


def test_more_seeds_and_arms_join_the_study_and_failed_runs_leave_the_others_their_turn(
    studied: Studied, tiny_model: Path
) -> None:
    starved = ["curation.min_words=999", "mixture.annotated=0", "mixture.text=0"]
    arms = {"curated": [], "starved": starved, "random": ["curation.select=random"]}
    words = [str(write(studied.folder, arms=arms)), f"model.base={tiny_model}", "store=store"]
    status, printed = ask(*words)
    assert status == 2
    message = printed[printed.index("sicog ablate:") :]
    assert "2 of 6 runs failed" in message
    assert re.search("starved, seed 0: no training rows.*; starved, seed 1: no training rows", message)
    assert printed.count("finished before, nothing to do") == 4
    (study,) = studied.runs("study")
    assert study.info.status == "FAILED"
    status, printed = ask(str(write(studied.folder)), f"model.base={tiny_model}", "store=store", "--seeds", "0")
    assert status == 0
    assert printed.count("finished before, nothing to do") == 3
    (study,) = studied.runs("study")
    assert study.info.status == "FINISHED"


def test_a_run_that_mlflow_opened_points_to_the_studys(
    studied: Studied, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `mlflow run` opens one for every command."""
    client = MlflowClient(f"sqlite:///{studied.folder}/mlflow.db")
    (study,) = studied.runs("study")
    for name in ("goes on in another run", "nothing to do"):
        given = client.create_run(study.info.experiment_id).info.run_id
        monkeypatch.setenv("MLFLOW_RUN_ID", given)
        words = [str(write(studied.folder)), f"model.base={tiny_model}", "store=store", "--seeds", "1"]
        assert ask(*words)[0] == 0
        tags = client.get_run(given).data.tags
        assert (tags["mlflow.runName"], tags["sicog.finished_run"]) == (name, study.info.run_id)
    assert len(studied.runs("study")) == 1


def test_a_damaged_step_is_made_again(studied: Studied, tiny_model: Path) -> None:
    """A study whose artifacts changed under it is no longer finished."""
    words = [str(write(studied.folder)), f"model.base={tiny_model}", "store=store", "--seeds", "0"]
    status, printed = ask(*words)
    assert status == 0
    (result,) = re.findall(r"written: (.*)/ablation\.json", printed)
    parts = json.loads((Path(result) / "summary.json").read_text())["artifacts"]
    samples = Path(result).parent / next(name for name in parts if name.startswith("evaluate")) / "samples.jsonl"
    samples.write_text(samples.read_text() + "\n")
    status, printed = ask(*words)
    assert status == 0
    assert "is damaged" in printed
    assert "tiny's: finished before" not in printed


# Figures of runs whose every answer is known (the tiny model answers nothing right).


def finished(folder: Path, outcomes: Sequence[Mapping[str, Sequence[float]]]) -> Artifact:
    """A run's folders as the loop leaves them; `outcomes`: each generation's values by task, an image a question."""
    names = []
    for g, tasks in enumerate(outcomes):
        names.append(f"evaluate-{folder.name}-{g}")
        rows = [Sample(task, f"{task}{i}", f"{i}.png", "", "", "Red?", "yes", "yes", "yes", value)
                for task, values in tasks.items() for i, value in enumerate(values)]  # fmt: skip
        (folder.parent / names[-1]).mkdir(parents=True)
        write_jsonl(folder.parent / names[-1] / "samples.jsonl", map(asdict, rows))
    means = [{task: {"mean": mean(values)} for task, values in tasks.items()} for tasks in outcomes]
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"evaluations": names, "generations": means}))
    return Artifact(folder, {}, cached=True)


def test_differences_are_after_less_before_pooled_over_seeds_and_corrected_within_a_task(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    arms, tasks, seeds = {"full": (), "less": ("seed=1",)}, ("a", "b"), (0, 1, 2)
    study = AblationConfig("s", "r.yaml", "full", arms, seeds=seeds)
    right = {"full": (0.3, 0.6), "less": (0.3, 0.5)}
    values = {(arm, seed, g, task): (rng.random(80) < right[arm][g]).astype(float).tolist()
              for arm in arms for seed in seeds for g in (0, 1) for task in tasks}  # fmt: skip
    found = {arm: [finished(tmp_path / f"{arm}{seed}", [{t: values[arm, seed, g, t] for t in tasks} for g in (0, 1)])
                   for seed in seeds] for arm in arms}  # fmt: skip
    for score in ablate.scores(found):
        each = [mean(values[score.arm, seed, score.generation, score.task]) for seed in seeds]
        assert score.per_seed == pytest.approx(each)
        assert (score.mean, score.spread) == (pytest.approx(mean(each)), pytest.approx(stdev(each)))
    ends = {("full:G0", "full"): (("full", 0), ("full", 1)), ("full", "less"): (("full", 1), ("less", 1))}
    made = ablate.differences(study, found, 200)
    assert [(d.before, d.after) for d in made] == [pair for pair in ends for _ in tasks]
    for d in made:
        sides = ends[d.before, d.after]
        before, after = (np.array([values[arm, seed, g, d.task] for seed in seeds]) for arm, g in sides)
        changes = (after - before).mean(axis=1)
        assert d.per_seed == pytest.approx(changes.tolist())
        assert (d.difference, d.spread) == (pytest.approx(changes.mean()), pytest.approx(np.std(changes, ddof=1)))
        assert d.low < d.difference < d.high
        assert d.p == pytest.approx(ttest_1samp((after - before).mean(axis=0), 0).pvalue)
    for task in tasks:
        assert [d.holm_p for d in made if d.task == task] == pytest.approx(holm([d.p for d in made if d.task == task]))
    assert made[0].difference > 0.2


def test_arms_reach_shares_of_the_ceiling_where_the_study_names_one(tmp_path: Path) -> None:
    right = {"chance": 10, "chosen": 25, "bound": 40}  # of 80 answers; task b leaves no room
    found = {arm: [finished(tmp_path / f"{arm}{seed}", [{"a": [float(i < n) for i in range(80)], "b": [1.0] * 80}])
                   for seed in (0, 1)] for arm, n in right.items()}  # fmt: skip
    study = AblationConfig("s", "r.yaml", "chance", dict.fromkeys(right, ()), seeds=(0, 1),
                           ceiling=Pair("chance", "bound"))  # fmt: skip
    (share,) = ablate.shares(study, found, 500)
    assert (share.arm, share.task, share.share) == ("chosen", "a", pytest.approx(0.5))
    assert 0.2 < share.low < 0.5 < share.high < 0.8
    assert list(ablate.shares(replace(study, ceiling=None), found, 500)) == []
    with pytest.raises(RecipeError, match="ceiling: truth: no such arm"):
        replace(study, ceiling=Pair("chance", "truth"))


def test_a_place_for_the_result_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    check_out(tmp_path / "new" / "r.json")
    assert (tmp_path / "new").is_dir()
    with pytest.raises(RecipeError, match="a folder"):
        check_out(tmp_path)
