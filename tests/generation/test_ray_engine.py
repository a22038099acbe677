"""Ray workers on a cluster of this machine: real processes, one of them killed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from sicog_exp.generation.engine import Decoding, Request
from sicog_exp.generation.engines import make_engine
from sicog_exp.generation.pool import generate_pool
from sicog_exp.prompts import prompt
from sicog_exp.ray_pool import RayPool, RayPoolError
from sicog_exp.recipe import EngineConfig, ModelConfig
from sicog_exp.records import user

ray = pytest.importorskip("ray")
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not import tests
ONE_CORE = ModelConfig(device="cpu", threads=1)
WARM = Decoding(1.0, 0.95, 16, 5, 2)


class Squares:
    """A worker's object whose calls tell what happened to them; it dies once where `home` says so."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def square(self, number: int) -> tuple[int, int]:
        if number == 7 and not (self.home / "died").exists():
            (self.home / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number, number**2

    def refuse(self) -> None:
        raise RayPoolError("said in the worker")

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[RayPool]:
    made = RayPool(partial(Squares, tmp_path), 2)
    yield made
    made.close()


def requests(images: list[Path]) -> list[Request]:
    return [Request(f"s{i}", kind, (user(prompt(kind, "What is red?"), 1),), (image,), 2)
            for i, image in enumerate(images) for kind in ("dd", "direct")]  # fmt: skip


def test_a_lost_call_is_made_again_in_its_place(pool: RayPool) -> None:
    assert list(pool.map("square", ((n,) for n in range(40)))) == [(n, n**2) for n in range(40)]
    assert pool.lost == 1
    walk = pool.map("square", ((n,) for n in range(40)))
    assert next(walk) == (0, 0)
    walk.close()
    assert list(pool.map("square", [(3,), (2,)])) == [(3, 9), (2, 4)], "an abandoned walk leaves nothing behind"
    with pytest.raises(RayPoolError, match="said in the worker"):
        pool.call("refuse")
    with pytest.raises(RayPoolError, match=r"3 Ray workers died over one call"):
        pool.call("die")


def test_more_workers_than_the_cluster_has_room_for(pool: RayPool, tmp_path: Path) -> None:
    with pytest.raises(RayPoolError, match=r"engine.workers=4000 need 4000 CPUs"):
        RayPool(partial(Squares, tmp_path), 4000)


def test_a_killed_worker_changes_nothing(tiny_model: Path, world_images: list[Path], tmp_path: Path) -> None:
    """The pool of two workers, one of them killed half-way, is the file that the engine alone writes."""
    from sicog_exp.generation.ray_engine import RayEngine

    asked = requests(world_images)
    alone, work = make_engine(tiny_model, ONE_CORE, EngineConfig())
    facts = generate_pool(alone, asked, WARM, tmp_path / "a", tmp_path / "alone.jsonl")
    engine = RayEngine(partial(make_engine, tiny_model, ONE_CORE, EngineConfig()), 2)
    killed: list[int] = []

    def kill_one(done: int, total: int) -> None:
        if done >= total / 4 and not killed:
            killed.append(min(engine.pool.pids.values()))
            os.kill(killed[0], signal.SIGKILL)

    try:
        spread = generate_pool(engine, asked, WARM, tmp_path / "b", tmp_path / "spread.jsonl", kill_one)
        assert engine.pool.lost == 1
        assert killed[0] not in engine.pool.pids.values()
    finally:
        engine.close()
    assert (tmp_path / "spread.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    assert {**spread, "seconds": 0} == {**facts, "seconds": 0}
    assert (engine.name, engine.work) == ("TransformersEngine", work)
