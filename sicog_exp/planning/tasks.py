"""What a suite asks, from its tasks' files alone: lmms-eval itself takes many seconds to say it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sicog_exp.evaluation import stock
from sicog_exp.evaluation.suites import Split, SuiteTask, evals_folder, load_suite
from sicog_exp.planning.contents import Held
from sicog_exp.prompts import KINDS, Kind
from sicog_exp.recipe import EvaluationConfig

UNKNOWN_QUESTIONS = 1000
"""Questions of a task that says nothing of them, where the recipe's `plan` does not either."""


@dataclass(frozen=True)
class Asked:
    """One task: its questions, their answer format, the most tokens that it gives an answer."""

    task: str
    questions: float
    kind: Kind
    max_new_tokens: int | None
    per_picture: float
    """Questions about a picture."""
    known: bool
    """Whether the number of questions was looked up."""


def read_tasks(config: EvaluationConfig, split: Split, splits: Mapping[str, Held], unknown: float) -> list[Asked]:
    """The tasks of a suite. `splits`: the data set's own, `unknown`: questions of a task whose data are not at hand.

    Raises BenchmarkError for a suite, StockError for a task that is none.
    """
    suite = load_suite(config.suite)
    folders = [evals_folder() / "tasks", *map(Path, suite.include)]
    return [_asked(task, stock.find_task(task.task, folders), splits, unknown)
            for task in suite.tasks(split, config.judge)]  # fmt: skip


def _asked(task: SuiteTask, path: Path, splits: Mapping[str, Held], unknown: float) -> Asked:
    file = stock.read_task(path)
    known = _held(path, file, splits)
    held = known or Held(unknown, unknown)
    metadata, options = file.get("metadata"), file.get("generation_kwargs")
    kind = metadata.get("kind", "direct") if isinstance(metadata, Mapping) else "direct"
    tokens = options.get("max_new_tokens") if isinstance(options, Mapping) else None
    per_picture = held.questions / held.pictures if held.pictures else 1.0
    questions = min(held.questions, task.limit or float("inf"))
    return Asked(task.task, questions, kind if kind in KINDS else "direct", tokens, per_picture, known is not None)


def _held(path: Path, file: Mapping[str, Any], splits: Mapping[str, Held]) -> Held | None:
    """What a task holds, where that can be looked up: in the data set, easy-vqa, Parquet files of this machine."""
    source = str(file.get("dataset_kwargs", "")).removeprefix("records.")
    if source == "easyvqa":
        return _easyvqa()
    files = stock.task_data(path).files
    if not files or not all(name.is_file() and name.suffix == ".parquet" for name in files):
        return splits.get(source)
    import pyarrow.parquet as pq

    rows = sum(pq.read_metadata(name).num_rows for name in files)
    return Held(rows, rows)


def _easyvqa() -> Held:
    import easy_vqa

    questions, _, pictures = easy_vqa.get_test_questions()
    return Held(len(questions), len(set(pictures)))
