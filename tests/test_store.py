"""The step store: what names a step, what is whole, what is continued, and what happens when two come at once."""

from __future__ import annotations

import gc
import json
import multiprocessing
import random
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sicog_exp import store as store_module
from sicog_exp.store import MANIFEST, Artifact, Step, Store, StoreError, Workplace, canonical, digest_of


@dataclass(frozen=True)
class Config:
    size: int = 3
    names: tuple[str, ...] = ("a", "b")


@dataclass(frozen=True)
class Unnameable:
    chosen: frozenset[str] = frozenset({"a"})


class Writer:
    """A step function that notes its calls and writes two files."""

    def __init__(self, text: str = "hello") -> None:
        self.calls, self.text = 0, text

    def __call__(self, config: Any, inputs: Mapping[str, Artifact], workplace: Workplace) -> None:
        self.calls += 1
        (workplace.directory / "text.txt").write_text(self.text)
        (workplace.directory / "deep").mkdir(exist_ok=True)
        (workplace.directory / "deep" / "size.txt").write_text(str(getattr(config, "size", 0)))
        workplace.add(samples=2)
        workplace.add(samples=1)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


# What names a step.

PLAIN: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(value=st.dictionaries(st.text(), PLAIN, max_size=5), seed=st.integers(0, 99))
def test_canonical_does_not_depend_on_order_and_loses_nothing(value: dict[str, Any], seed: int) -> None:
    keys = list(value)
    random.Random(seed).shuffle(keys)
    assert canonical({key: value[key] for key in keys}) == canonical(value)
    assert json.loads(canonical(value)) == value


@pytest.mark.parametrize("value", [{1, 2}, frozenset(), object(), float("nan"), float("inf"), b"bytes", Path("x"),
                                   {1: "a"}, len, Config, np.int64(3), np.zeros(2), [1, {"deep": {2}}]])  # fmt: skip
def test_canonical_raises_on_what_has_no_one_form(value: Any) -> None:
    with pytest.raises(TypeError):
        canonical(value)


def test_a_config_without_a_canonical_form_is_rejected_before_the_step_runs(store: Store) -> None:
    run = Writer()
    with pytest.raises(TypeError, match="frozenset has no canonical form"):
        store.run(Step("s", run, Unnameable()))
    assert run.calls == 0
    assert not list(store.root.iterdir())


def test_the_fingerprint_changes_with_each_of_its_parts(store: Store) -> None:
    first = store.run(Step("first", Writer(), Config()))
    second = store.run(Step("first", Writer(), Config(4)))
    step = Step("s", Writer(), Config(), {"x": first}, 0, 1)
    changed = [replace(step, name="t"), replace(step, revision=2), replace(step, config=Config(4)),
               replace(step, config=Config(names=("ab",))), replace(step, inputs={"x": second}),
               replace(step, inputs={"y": first}), replace(step, inputs={}), replace(step, seed=1)]  # fmt: skip
    prints = [step.fingerprint, *(other.fingerprint for other in changed)]
    assert len(set(prints)) == len(prints)
    assert replace(step, run=Writer("other")).fingerprint == step.fingerprint


def test_what_is_derived_from_a_step_changes_with_it(store: Store) -> None:
    def chain(revision: int) -> list[str]:
        first = store.run(Step("first", Writer(), Config(), revision=revision))
        second = store.run(Step("second", Writer(), Config(), {"x": first}))
        return [first.fingerprint, second.fingerprint]

    assert not set(chain(1)) & set(chain(2))


def test_names_with_a_dot_have_places_of_their_own(store: Store) -> None:
    steps = [Step("v1.5", Writer(str(i)), Config(i)) for i in range(2)]
    places: list[Path] = []

    def run(config: Any, inputs: Any, workplace: Workplace) -> None:
        places.append(workplace.directory)
        Writer()(config, inputs, workplace)

    for step in steps:
        store.run(replace(step, run=run))
    assert places[0] != places[1]


# Finished steps.


def test_a_finished_step_is_read_not_run(store: Store) -> None:
    run = Writer()
    step = Step("s", run, Config())
    made = store.run(step)
    read = Store(store.root).run(step)
    assert (run.calls, made.cached, read.cached) == (1, False, True)
    assert (made.path, made.content, made.fingerprint) == (read.path, read.content, read.fingerprint)
    assert dict(made.facts) == dict(read.facts)
    assert read.facts["samples"] == 3
    assert read.facts["seconds"] >= 0
    assert (read / "text.txt").read_text() == "hello"
    assert set(read.manifest["outputs"]) == {"text.txt", "deep/size.txt"}
    assert {"step", "revision", "config", "inputs", "seed", "libraries", "python"} <= set(read.manifest)


def test_content_follows_the_files_not_the_place(tmp_path: Path) -> None:
    step = Step("s", Writer(), Config())
    one, two = Store(tmp_path / "one").run(step), Store(tmp_path / "two").run(step)
    other = Store(tmp_path / "three").run(replace(step, run=Writer("other")))
    assert one.content == two.content != other.content


DAMAGES: dict[str, Callable[[Path], object]] = {
    "edited": lambda path: (path / "text.txt").write_text("hellO"),
    "deleted": lambda path: (path / "deep" / "size.txt").unlink(),
    "added": lambda path: (path / "more.txt").write_text("x"),
    "torn manifest": lambda path: (path / MANIFEST).write_text((path / MANIFEST).read_text()[:50]),
    "manifest of something else": lambda path: (path / MANIFEST).write_text("[]"),
    "no outputs listed": lambda path: (path / MANIFEST).write_text('{"outputs": null}'),
    "no manifest": lambda path: (path / MANIFEST).unlink(),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_artifact_is_moved_aside_and_redone(store: Store, damage: str, capsys: Any) -> None:
    run = Writer()
    step = Step("s", run, Config())
    made = store.run(step)
    DAMAGES[damage](made.path)
    again = store.run(step)
    assert run.calls == 2
    assert not again.cached
    assert again.content == made.content
    assert len(list(store.root.glob("*.damaged-*"))) == 1
    assert "is damaged" in capsys.readouterr().out
    assert store.run(step).cached


def test_check_and_find_move_damage_aside_too(store: Store) -> None:
    step = Step("s", Writer(), Config())
    assert store.find(step) is None
    assert not store.check(store.path_of(step).name)
    made = store.run(step)
    assert store.check(made.path.name)
    (made.path / "text.txt").write_text("no")
    assert not store.check(made.path.name)
    assert store.find(step) is None
    assert len(list(store.root.glob("*.damaged-*"))) == 1


# Killed and failed steps.


def test_a_half_written_step_continues_from_its_scratch(store: Store) -> None:
    seen: list[bool] = []

    def run(config: Any, inputs: Any, workplace: Workplace) -> None:
        seen.append((workplace.scratch / "checkpoint").exists())
        (workplace.scratch / "checkpoint").write_text("step 3")
        if len(seen) == 1:
            raise KeyboardInterrupt
        (workplace.directory / "out.txt").write_text("done")

    step = Step("s", run, Config())
    with pytest.raises(KeyboardInterrupt):
        store.run(step)
    assert store.find(step) is None
    made = store.run(step)
    assert seen == [False, True]
    assert {file.name for file in made.path.iterdir()} == {"out.txt", MANIFEST}
    assert not list(store.root.glob("*.partial"))


@pytest.mark.parametrize("where", ["manifest half written", "manifest whole", "scratch removed"])
def test_a_kill_while_publishing_leaves_no_trace_in_the_outputs(store: Store, where: str) -> None:
    step = Step("s", Writer(), Config())
    wanted = store.run(step).content
    partial = store.path_of(step).with_name(store.path_of(step).name + ".partial")
    store.path_of(step).rename(partial)
    if where == "manifest half written":
        (partial / MANIFEST).unlink()
        (partial / "scratch").mkdir()
        (partial / "scratch" / MANIFEST).write_text('{"step": "s", "out')
    elif where == "manifest whole":
        (partial / "scratch").mkdir()
    assert store.run(step).content == wanted
    assert store.run(step).cached
    assert not list(store.root.glob("*.damaged-*"))


def test_the_seconds_of_killed_attempts_count(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A SIGKILL leaves no word: what counts is what the step's progress has kept."""
    now = [1000.0]
    monkeypatch.setattr(store_module.time, "time", lambda: now[0])
    shown: list[tuple[int, int]] = []

    def run(config: Any, inputs: Any, workplace: Workplace) -> None:
        now[0] += 40
        workplace.progress(1, 2)
        if len(shown) < 3:
            raise KeyboardInterrupt
        now[0] += 2
        workplace.add(samples=1)

    step = Step("s", run, Config())
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            store.run(step, lambda *call: shown.append(call))
        now[0] += 10_000
    made = store.run(step, lambda *call: shown.append(call))
    assert shown == [(1, 2)] * 3
    assert made.facts["earlier_seconds"] == 80
    assert made.facts["seconds"] == 122
    assert "earlier_seconds" not in store.run(Step("t", Writer(), Config())).facts


def test_a_step_says_what_computed_it_and_its_own_peak(store: Store) -> None:
    def large(config: Any, inputs: Any, workplace: Workplace) -> None:
        workplace.device = "2 CPU threads"
        bytearray(300_000_000)

    before = store.run(Step("small", Writer(), Config())).facts["peak_mb"]
    made = store.run(Step("large", large, Config()))
    assert made.device == "2 CPU threads"
    assert made.facts["peak_mb"] > before + 250
    after = store.run(Step("after", Writer(), Config()))
    assert after.device == "CPU"
    assert after.facts["peak_mb"] < made.facts["peak_mb"] - 250


def test_a_step_s_model_is_gone_when_it_returns(store: Store) -> None:
    """Trainers stand in cycles: without a collection, models of all stages would pile up."""
    left: list[weakref.ref[Any]] = []

    class Trainer:
        def __init__(self) -> None:
            self.itself = self

    def train(config: Any, inputs: Any, workplace: Workplace) -> None:
        left.append(weakref.ref(Trainer()))
        workplace.add(model_seconds=1)

    gc.disable()
    try:
        store.run(Step("train", train, Config()))
        assert left[0]() is None
    finally:
        gc.enable()


def test_an_error_in_the_step_leaves_no_artifact(store: Store) -> None:
    def run(config: Any, inputs: Any, workplace: Workplace) -> None:
        (workplace.directory / "out.txt").write_text("half")
        raise ValueError("broken data")

    with pytest.raises(ValueError, match="broken data"):
        store.run(Step("s", run, Config()))
    assert store.find(Step("s", run, Config())) is None


def fill_disk(config: Any, inputs: Any, workplace: Workplace) -> None:
    (workplace.directory / "out.bin").write_bytes(b"begun")
    with Path("/dev/full").open("w") as full:
        full.write("x" * 100_000)


def fill_disk_from_rust(config: Any, inputs: Any, workplace: Workplace) -> None:
    raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")


def test_a_full_disk_says_so_and_the_same_command_continues(store: Store, monkeypatch: Any) -> None:
    step = Step("s", fill_disk, Config())
    with pytest.raises(StoreError, match=r"disk full while step s wrote to .*free some space and run the same command"):
        store.run(step)
    assert store.find(step) is None
    assert not store.path_of(step).exists()
    assert store.run(replace(step, run=Writer())).facts["samples"] == 3


def test_a_full_disk_behind_another_library_s_error(store: Store, monkeypatch: Any) -> None:
    step = Step("s", fill_disk_from_rust, Config())
    with pytest.raises(RuntimeError, match="PytorchStreamWriter"):
        store.run(step)
    usage = shutil.disk_usage(store.root)
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda path: usage._replace(free=4096))
    with pytest.raises(StoreError, match="disk full"):
        store.run(step)


def test_a_full_disk_while_publishing(store: Store, monkeypatch: Any) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    step = Step("s", Writer(), Config())
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "_fsync", full)
        with pytest.raises(StoreError, match="disk full"):
            store.run(step)
    assert store.find(step) is None
    assert not store.run(step).cached


# Two at once.


def append_and_wait(config: Any, inputs: Any, workplace: Workplace) -> None:
    import time

    with (workplace.directory.parent / "calls.log").open("a") as log:
        log.write("call\n")
    time.sleep(0.5)
    (workplace.directory / "out.txt").write_text("done")


def run_at_once(root: str, ready: Any, results: Any) -> None:
    ready.wait()
    artifact = Store(root).run(Step("s", append_and_wait, Config()))
    results.put((artifact.cached, artifact.content))


def test_several_processes_run_a_step_once(store: Store) -> None:
    context = multiprocessing.get_context("fork")
    ready, results = context.Barrier(3), context.Queue()
    workers = [context.Process(target=run_at_once, args=(str(store.root), ready, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
    assert sorted(cached for cached, _ in found) == [False, True, True]
    assert len({content for _, content in found}) == 1
    assert (store.root / "calls.log").read_text() == "call\n"


def repair_at_once(root: str, ready: Any, results: Any) -> None:
    ready.wait()
    store, step = Store(root), Step("s", append_and_wait, Config())
    artifact = store.find(step) or store.run(step)
    results.put((artifact.cached, artifact.content))


def test_several_processes_that_find_one_damage_redo_it_once(store: Store) -> None:
    made = store.run(Step("s", append_and_wait, Config()))
    (made.path / "out.txt").write_text("damaged")
    context = multiprocessing.get_context("fork")
    ready, results = context.Barrier(4), context.Queue()
    workers = [context.Process(target=repair_at_once, args=(str(store.root), ready, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
    assert {content for _, content in found} == {made.content}
    assert (store.root / "calls.log").read_text() == "call\n" * 2
    assert len(list(store.root.glob("*.damaged-*"))) == 1


def test_a_dead_owner_s_lock_is_free(store: Store) -> None:
    """The lock file stays behind, with the pid of a process that is gone."""
    code = f"""
import os
from pathlib import Path
from sicog_exp.store import Step, Store
Store({str(store.root)!r}).run(Step("s", lambda c, i, w: os.kill(os.getpid(), 9), {{}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.returncode == -9
    step = Step("s", Writer(), {})
    assert list(store.root.glob("*.lock"))
    assert not store.run(step).cached


def test_digests_are_short_and_stable() -> None:
    assert digest_of({"a": 1, "b": [1.5, None, True, "é"]}) == digest_of({"b": (1.5, None, True, "é"), "a": 1})
    assert digest_of(Config()) == digest_of({"size": 3, "names": ["a", "b"]})
    assert len(digest_of({})) == 16
