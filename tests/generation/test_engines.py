"""Which engine a recipe means, and which steps it changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sicog_exp.ahead import check_engine
from sicog_exp.generation.engines import open_engine
from sicog_exp.loop import mixture_task
from sicog_exp.recipe import EngineConfig, ModelConfig, Recipe, RecipeError, SamplingConfig, load
from sicog_exp.selfdata import PoolTask
from sicog_exp.store import canonical

VLLM = EngineConfig(kind="vllm")


def pool_task(engine: EngineConfig) -> PoolTask:
    return PoolTask(SamplingConfig(), ModelConfig(), "caption", 0, 0, engine=engine)


def test_only_what_changes_candidates_is_part_of_a_pool() -> None:
    plain = canonical(pool_task(EngineConfig()))
    assert canonical(pool_task(EngineConfig(workers=4, worker_gpus=1.0, ray="auto"))) == plain
    assert canonical(pool_task(VLLM)) != plain
    assert canonical(pool_task(replace(VLLM, memory=0.5))) == canonical(pool_task(VLLM))
    server = EngineConfig(kind="openai", server="http://a/v1")
    moved = replace(server, server="http://b/v1", in_flight=2, wait=9.0)
    assert canonical(pool_task(server)) == canonical(pool_task(moved)) != plain


def test_training_knows_nothing_of_the_engine() -> None:
    assert canonical(mixture_task(Recipe(engine=VLLM))) == canonical(mixture_task(Recipe()))


def test_benchmarks_may_stay_with_transformers() -> None:
    assert VLLM.of_evaluation == VLLM
    for engine in (replace(VLLM, evaluates=False, max_length=512), replace(VLLM, evaluates=False, workers=2)):
        assert engine.of_evaluation.workers == engine.workers
        assert canonical(engine.of_evaluation) == canonical(EngineConfig())


@pytest.mark.parametrize(("overrides", "message"), [
    (["engine.kind=vlm"], "engine.kind='vlm': allowed: transformers, vllm, openai"),
    (["engine.kind=openai"], "a server's URL belongs to engine.kind=openai"),
    (["engine.server=http://a/v1"], "a server's URL belongs to engine.kind=openai"),
    (["engine.kind=openai", "engine.server=a:8000"], "must be an http or https URL"),
    (["engine.kind=openai", "engine.server=http://a/v1", "engine.workers=2"], "set engine.in_flight instead"),
    (["engine.workers=-1"], "must be 0 or more"), (["engine.memory=1.5"], "above 0 and at most 1"),
    (["engine.worker=2"], "did you mean workers")])  # fmt: skip
def test_wrong_values_are_named_at_start(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load("experiments/embedded.yaml", overrides)
    assert message in str(error.value)


def test_a_missing_package_is_named_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_engine(EngineConfig())
    for engine, meant in ((VLLM, "engine.kind=vllm: needs the vllm"), (EngineConfig(workers=2), "engine.workers=2")):
        with pytest.raises(RecipeError, match=meant):
            check_engine(engine)


def test_the_default_is_transformers(tiny_model: Path) -> None:
    with open_engine(tiny_model, ModelConfig(device="cpu", threads=1), EngineConfig()) as opened:
        assert type(opened.engine).__name__ == "TransformersEngine"
        assert opened.device == "1 CPU threads"
        assert opened.work.language > 0
