"""kill -9 in the middle of an evaluation: it goes on with the answers that it had, to the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from runs import REPOSITORY, environment

from sicog_exp import loop, origins
from sicog_exp.evaluation.answers import ANSWERS
from sicog_exp.generation.transformers_engine import TransformersEngine
from sicog_exp.recipe import Recipe, load
from sicog_exp.store import Artifact, Step, Store

EVALUATION = """
import sys
from sicog_exp import loop, origins
from sicog_exp.recipe import load
from sicog_exp.store import Store

recipe = load("tests/tiny.yaml", sys.argv[1:])
store = Store(recipe.store)
base, data = store.run(origins.base_step(recipe)), store.run(origins.data_step(recipe))
loop.evaluate(store, recipe, "evaluate", base, data)
"""


def overrides(model: Path, store: Path) -> list[str]:
    return [f"model.base={model}", f"store={store}", "evaluation.batch_size=1", "evaluation.max_new_tokens=60",
            "data.benchmark_images=10"]  # fmt: skip


class Watched(Store):
    """Stands for a runner; notes how far its last step said to be."""

    told: list[tuple[int, int]]

    def run(self, step: Step, *_: Any) -> Artifact:
        self.told = []
        return super().run(step, lambda *call: self.told.append(call))


def scored(recipe: Recipe) -> tuple[Artifact, list[tuple[int, int]]]:
    """In this process."""
    store = Watched(recipe.store)
    base, data = store.run(origins.base_step(recipe)), store.run(origins.data_step(recipe))
    return loop.evaluate(store, recipe, "evaluate", base, data), store.told  # type: ignore[arg-type]


def killed_after(lines: int, given: Sequence[str], folder: Path) -> int:
    """Start an evaluation and kill it once that many batches are kept; returns how many were in the end."""
    surroundings = environment(folder) | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen([sys.executable, "-c", EVALUATION, *given], cwd=REPOSITORY, env=surroundings,
                               start_new_session=True)  # fmt: skip
    while process.poll() is None:
        for file in folder.glob(f"store/evaluate-*.partial/scratch/{ANSWERS}"):
            if file.read_bytes().count(b"\n") >= lines:
                os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.005)
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    (file,) = folder.glob(f"store/evaluate-*.partial/scratch/{ANSWERS}")
    return file.read_bytes().count(b"\n")


def test_a_killed_evaluation_goes_on(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    given = overrides(tiny_model, tmp_path / "store")
    kept = killed_after(5, given, tmp_path)
    computed: list[int] = []
    real = TransformersEngine.sample_batches

    def counted(self, batches, decoding):
        computed.append(len(batches))
        return real(self, batches, decoding)

    monkeypatch.setattr(TransformersEngine, "sample_batches", counted)
    resumed, told = scored(load("tests/tiny.yaml", given))
    asked, computed[:] = sum(computed), []
    whole, told_whole = scored(load("tests/tiny.yaml", overrides(tiny_model, tmp_path / "whole")))
    assert asked == sum(computed) - kept, "only what was missing is computed"
    assert told == told_whole == [(done, len(told)) for done in range(1, len(told) + 1)]
    assert len(told) == whole.facts["samples"], "a batch of one is one question"
    assert resumed.manifest["outputs"] == whole.manifest["outputs"]
    assert not (resumed.path / "scratch").exists()
