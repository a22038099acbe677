"""What a search found: ranks, the Pareto front, what mattered, and its pictures."""

from __future__ import annotations

import io
from pathlib import Path

import optuna
import pytest
from optuna.study import Study
from optuna.trial import TrialState
from PIL import Image
from rich.console import Console

from sicog_exp.studies import findings

optuna.logging.set_verbosity(optuna.logging.WARNING)


def search(directions: list[str], *results: tuple[float, ...]) -> Study:
    made = optuna.create_study(directions=directions, sampler=optuna.samplers.RandomSampler(seed=0))
    made.set_metric_names(["accuracy", "flops"][: len(directions)])
    for values in results:
        trial = made.ask()
        trial.suggest_float("curation.caption_threshold", 0.1, 0.9, log=True)
        trial.suggest_categorical("curation.require_direct_agreement", [False, True])
        made.tell(trial, values)
    return made


def printed(study: Study) -> str:
    page = io.StringIO()
    findings.show("mine", study, Console(file=page, width=200))
    return page.getvalue()


def test_the_front_is_what_no_trial_beats_in_every_objective() -> None:
    study = search(["maximize", "minimize"], (0.5, 10.0), (0.6, 30.0), (0.4, 20.0), (0.6, 20.0))
    assert findings.front(study) == {0, 3}
    text = printed(study)
    assert "the Pareto front (2) of 4 trials" in text
    assert [line.split()[1] for line in text.splitlines() if line.startswith("│")] == ["3", "0"]


@pytest.mark.parametrize(("direction", "order"), [("maximize", [1, 0, 2]), ("minimize", [2, 0, 1])])
def test_trials_are_ranked_by_the_first_objective(direction: str, order: list[int]) -> None:
    study = search([direction], (0.5,), (0.6,), (0.4,))
    assert [trial.number for trial in findings.ranked(study)] == order
    assert findings.front(study) == set()


def test_a_pruned_trial_counts_and_is_not_ranked() -> None:
    study = search(["maximize"], (0.5,))
    trial = study.ask()
    trial.report(0.9, 1)
    study.tell(trial, state=TrialState.PRUNED)
    study.tell(study.ask(), state=TrialState.FAIL)
    assert len(findings.finished(study)) == 2
    assert [trial.number for trial in findings.ranked(study)] == [0]


def test_the_key_that_decides_has_the_variance() -> None:
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(lambda trial: trial.suggest_float("decides", 0, 1) + 0 * trial.suggest_float("idle", 0, 1), 20)
    shares = findings.importances(study)
    assert shares["decides"] > 0.8 > 0.2 > shares["idle"]
    assert findings.importances(search(["maximize"], (0.5,), (0.6,))) == {}, "two trials say nothing"


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_what_counts_is_what_makes_trials_good(direction: str) -> None:
    """Far from the best, where another key decides, the variance does not matter."""
    sign = 1 if direction == "maximize" else -1

    def value(trial: optuna.Trial) -> float:
        near, far = trial.suggest_float("near", 0, 1), trial.suggest_float("far", 0, 1)
        return sign * (near if near > 0.5 else 0.3 * far)

    study = optuna.create_study(direction=direction, sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(value, 60)
    shares = findings.importances(study)
    assert shares["near"] > 0.8 > 0.2 > shares["far"]


@pytest.mark.parametrize(("directions", "pictures"), [
    (["maximize"], ["mine-slices.png"]), (["maximize", "minimize"], ["mine-slices.png", "mine-front.png"]),
])  # fmt: skip
def test_pictures_are_drawn(directions: list[str], pictures: list[str], tmp_path: Path) -> None:
    results = [(0.1 * i, 2.0 + i * i)[: len(directions)] for i in range(6)]
    keys = ["curation.caption_threshold", "curation.require_direct_agreement"]
    drawn = findings.draw("mine", search(directions, *results), keys, keys[:1], tmp_path)
    assert [path.name for path in drawn] == pictures
    for path in drawn:
        colors = Image.open(path).convert("RGB").getcolors(1 << 24) or []
        assert (192, 57, 43) in {color for _, color in colors}, "the best is red"
