"""Trials of a study are drawn apart, whoever draws them; one worker draws the same, restarted or not."""

from __future__ import annotations

from pathlib import Path

import pytest
from optuna.study import Study

from sicog_exp.studies.sweep import STARTUP, Axis, StudyConfig, open_study, recipe_of, suggested

TRIALS = STARTUP + 4
"""Past the random ones, so that the model-based ones are seen too."""
SPACE = {"curation.reasoning_threshold": Axis(0.0, 0.6), "pretrain.language_lr": Axis(1e-5, 1e-2, log=True)}


def opened(folder: Path, seed: int = 0) -> tuple[StudyConfig, Study]:
    """The study as a new process opens it."""
    config = StudyConfig("drawn", "tests/tiny.yaml", SPACE, (f"store={folder}",), seed=seed)
    return config, open_study(config, recipe_of(config, {}, "development"))


def draw(folder: Path, restarted: bool, seed: int = 0) -> list[tuple[float, ...]]:
    """The values of one worker's trials."""
    config, search = opened(folder, seed)
    drawn = []
    for _ in range(TRIALS):
        trial = search.ask()
        values = tuple(suggested(config, trial).values())
        drawn.append(values)
        search.tell(trial, values[0] * (1 - values[0]))
        if restarted:
            _, search = opened(folder, seed)
    return drawn


def test_one_worker_is_reproducible_restarted_or_not(tmp_path: Path) -> None:
    first = draw(tmp_path / "a", restarted=False)
    assert draw(tmp_path / "b", restarted=False) == first
    assert draw(tmp_path / "c", restarted=True) == first
    assert len(set(first)) == TRIALS
    assert draw(tmp_path / "d", restarted=False, seed=1)[0] not in first


@pytest.mark.parametrize("workers", [2, 5])
def test_workers_that_begin_in_the_same_instant_draw_apart(tmp_path: Path, workers: int) -> None:
    """All have opened the study before any asks; trials are asked for in turn, and told at the end of a round."""
    config, _ = opened(tmp_path)
    searches = [opened(tmp_path)[1] for _ in range(workers)]
    drawn = []
    for _ in range(TRIALS // workers + 1):
        trials = [search.ask() for search in searches]
        drawn += [tuple(suggested(config, trial).values()) for trial in trials]
        for search, trial in zip(searches, trials):
            search.tell(trial, 0.5)
    assert len(set(drawn)) == len(drawn)
