"""Suites: which lmms-eval tasks score a generation, how their metrics are read, and what those scores depend on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from sicog_exp.evaluation import stock
from sicog_exp.recipe import RecipeError, load_as
from sicog_exp.store import file_checksum

Split = Literal["benchmark", "development"]
READ_WHOLE = (".yaml", ".yml", ".py", ".json", ".jsonl", ".parquet", ".csv")
"""Files of an included folder whose content counts, not their size alone."""


class BenchmarkError(RuntimeError):
    """A suite that cannot be run or results that are not whole; the message says what to change."""


@dataclass(frozen=True)
class SuiteTask:
    """One lmms-eval task of a suite."""

    task: str
    """A task of evals/tasks/, or one of lmms-eval's own."""
    limit: int | None = None
    """Only the first questions."""
    metric: str = "accuracy"
    """The per-question metric that counts; a number, or a mapping with a `score`."""
    scale: float = 1.0
    """The metric's value for a perfect answer, such as 100; a score is kept as a share of it."""
    higher_is_better: bool = True
    """False where the metric counts errors; a score is then 1 minus their share, so that more is better everywhere."""
    judge: bool = False
    """Scored by a judge model, which has to be reached; left out unless evaluation.judge asks for it."""
    family: str = "family"
    """The document's key with the question's family."""
    unit: str | None = None
    """The key in the metric's mapping by which several rows are one question; the stock aggregation over them is its
    value, and rows without the metric are no part of the score."""

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise RecipeError(f"{self.task}: scale={self.scale}: must be above 0")
        if self.unit and self.limit is not None:
            raise RecipeError(f"{self.task}: limit={self.limit} would tear rows that {self.unit} makes one question; "
                              "leave the limit out")  # fmt: skip


@dataclass(frozen=True)
class Suite:
    """What a generation is scored on; `development` is for decisions, `benchmark` never."""

    name: str
    benchmark: tuple[SuiteTask, ...]
    development: tuple[SuiteTask, ...] = ()
    include: tuple[str, ...] = ()
    """More folders of task YAMLs, for example stock tasks over local data."""

    def tasks(self, split: Split, judged: bool = False) -> tuple[SuiteTask, ...]:
        """The split's tasks, those that a judge scores only if `judged`. Raises BenchmarkError where it has none or
        one twice."""
        tasks = self._split(split)
        names = [task.task for task in tasks]
        if not tasks or len(set(names)) < len(names):
            raise BenchmarkError(f"suite {self.name}: {split} names {names}; give every task once, at least one")
        asked = tuple(task for task in tasks if judged or not task.judge)
        if not asked:
            raise BenchmarkError(f"suite {self.name}: a judge scores every task of {split}; evaluation.judge=true "
                                 "asks for it")  # fmt: skip
        return asked

    def judged(self, split: Split) -> tuple[str, ...]:
        """The names of the split's tasks that a judge scores."""
        return tuple(task.task for task in self._split(split) if task.judge)

    def _split(self, split: Split) -> tuple[SuiteTask, ...]:
        return self.benchmark if split == "benchmark" else self.development


def evals_folder() -> Path:
    """The checkout's `evals/`. Raises BenchmarkError for a package installed without its repository."""
    folder = Path(__file__).resolve().parents[2] / "evals"
    if not (folder / "tasks").is_dir():
        raise BenchmarkError(f"{folder} is missing: tasks and suites are not installed with the package; "
                             "run from a checkout (git clone, pip install -e .)")  # fmt: skip
    return folder


def load_suite(name: str) -> Suite:
    """A suite of evals/suites/ by name, or one by its path."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        folder = evals_folder() / "suites"
        path = folder / f"{name}.yaml"
        if not path.is_file():
            shipped = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
            raise BenchmarkError(f"evaluation.suite={name}: no such suite; there are {shipped}, or give a .yaml path")
    elif not path.is_file():
        raise BenchmarkError(f"evaluation.suite={name}: no such file; correct it or name a suite of evals/suites/")
    try:
        return load_as(Suite, path)
    except RecipeError as error:
        raise BenchmarkError(str(error)) from None


def suite_state(name: str, judged: bool = False) -> dict[str, str]:
    """What scores on a suite depend on, for a step's fingerprint: the suite's content, the tasks' files, the harness.

    Names alone would hide an edit, and an old score would stand for a new benchmark. In folders that it includes,
    pictures and the like count by name and size; the data files that its tasks name count wherever they lie.
    """
    suite = load_suite(name)
    files = sorted(path for path in (evals_folder() / "tasks").iterdir() if path.is_file())
    digest = hashlib.sha256("".join(f"{path.name}:{file_checksum(path)};" for path in files).encode()).hexdigest()
    own = {folder: _folder_state(Path(folder)) for folder in suite.include}
    state = {"suite": json.dumps(asdict(suite), sort_keys=True), "tasks": digest, "harness": harness_version()}
    asked = {"judged": "true"} if judged else {}
    return {**state, **asked, **({"included": json.dumps(own, sort_keys=True)} if own else {})}


def _folder_state(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    states = (file_checksum(path) if path.suffix in READ_WHOLE else str(path.stat().st_size) for path in files)
    names = (path.relative_to(folder) for path in files)
    text = "".join(f"{name}:{state};" for name, state in zip(names, states))
    return hashlib.sha256((text + _data_state(folder)).encode()).hexdigest()


def _data_state(folder: Path) -> str:
    """The content of data files that lie elsewhere, as a mirror's do; paths are no part of it."""
    files = stock.task_files(folder).values()
    named = {path for file in files for path in stock.task_data(file).files if path.is_file()}
    elsewhere = sorted(path for path in named if not path.resolve().is_relative_to(folder.resolve()))
    return "".join(f"{path.name}:{_checksum(path, path.stat().st_mtime_ns)};" for path in elsewhere)


@cache
def _checksum(path: Path, changed: int) -> str:
    """Benchmarks' data take gigabytes; each file is read once a process unless it changes."""
    return file_checksum(path)


def harness_version() -> str:
    """Which lmms-eval scores."""
    from importlib.metadata import version

    return f"lmms-eval {version('lmms-eval')}"
