"""A whole run: what makes it another one, and what its start refuses."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from runs import REPOSITORY

from sicog_exp.ahead import check_packages
from sicog_exp.experiment import check_memory, experiment_step
from sicog_exp.models.loading import EMBEDDED_BASE
from sicog_exp.recipe import Recipe, RecipeError, load
from sicog_exp.store import Store

TINY = REPOSITORY / "tests" / "tiny.yaml"


def recipe(*overrides: str) -> Recipe:
    return load(TINY, overrides)


def test_an_edited_suite_is_another_run(tmp_path: Path) -> None:
    suite, store = tmp_path / "mine.yaml", Store(tmp_path / "store")
    text = (REPOSITORY / "tests" / "tiny_suite.yaml").read_text()
    suite.write_text(text)
    before = experiment_step(recipe(f"evaluation.suite={suite}"), store, Console()).fingerprint
    assert experiment_step(recipe(f"evaluation.suite={suite}"), store, Console()).fingerprint == before
    suite.write_text(text.replace("sicog_world_direct", "sicog_world_cot"))
    assert experiment_step(recipe(f"evaluation.suite={suite}"), store, Console()).fingerprint != before


def test_a_changed_encoder_is_another_run_where_self_data_train(tmp_path: Path) -> None:
    encoder, store = tmp_path / "encoder", Store(tmp_path / "store")
    encoder.mkdir()

    def fingerprint(content: str, *overrides: str) -> str:
        (encoder / "config.json").write_text(content)
        return experiment_step(recipe(f"curation.encoder={encoder}", *overrides), store, Console()).fingerprint

    assert fingerprint("one") != fingerprint("two")
    assert fingerprint("one", "self_data=false") == fingerprint("two", "self_data=false")


def test_preference_tuning_needs_what_training_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    preference = ("preference.steps=1", "sampling.cot=2")
    with pytest.raises(RecipeError, match=r"preference\.optimizer=adamw_8bit: needs a GPU"):
        check_packages(recipe(*preference, "preference.optimizer=adamw_8bit", "model.device=cpu"))
    weights = sum(path.stat().st_size for path in EMBEDDED_BASE.glob("*.safetensors"))
    memory = namedtuple("memory", "total")(2 * weights)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    frozen = [f"{stage}.language_lr=0" for stage in ("develop", "align", "pretrain", "instruct")]
    check_memory(recipe(*frozen, "model.device=cpu"))
    with pytest.raises(RecipeError, match="training needs about"):
        check_memory(recipe(*frozen, *preference, "model.device=cpu"))
