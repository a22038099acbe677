"""What suites hold: tasks, metrics, who scores them, where their documents are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sicog_exp.evaluation import stock
from sicog_exp.evaluation.stock import TaskData
from sicog_exp.evaluation.suites import SuiteTask, evals_folder, load_suite


@dataclass(frozen=True)
class Listed:
    """A task of a suite. `place` is "hub" or "local", `data` says where there; `scored_by` is "rule" or "judge"."""

    task: str
    split: str
    metric: str
    scored_by: str
    questions: str
    place: str
    data: str


def suite_names() -> list[str]:
    """The shipped suites."""
    return sorted(path.stem for path in (evals_folder() / "suites").glob("*.yaml"))


def listed(name: str) -> list[Listed]:
    """The tasks of a suite, read from their files; the harness is not imported. Raises BenchmarkError, StockError."""
    suite = load_suite(name)
    folders = [evals_folder() / "tasks", *map(Path, suite.include)]
    splits = {"benchmark": suite.benchmark, "development": suite.development}
    return [_listed(task, split, folders) for split, tasks in splits.items() for task in tasks]


def _listed(task: SuiteTask, split: str, folders: Sequence[Path]) -> Listed:
    data = stock.task_data(stock.find_task(task.task, folders))
    metric = task.metric if task.scale == 1 else f"{task.metric} / {task.scale:g}"
    scored_by = "judge" if task.judge else "rule"
    questions = f"first {task.limit:,}" if task.limit else "all"
    place = "hub" if data.on_hub else "local"
    return Listed(task.task, split, metric, scored_by, questions, place, _where(data))


def _where(data: TaskData) -> str:
    if data.on_hub:
        part = "/".join(name for name in (data.config, data.split) if name)
        return f"{data.path}, {part}{', login' if data.login else ''}"
    folders = sorted({str(file.parent) for file in data.files})
    return ", ".join(folders) or "made by the task"


def show(names: Sequence[str], console: Console) -> None:
    """A table per suite and split."""
    for name in names:
        rows = listed(name)
        for split in dict.fromkeys(one.split for one in rows):
            console.print(_table(f"{name}, {split}", [one for one in rows if one.split == split]))


def _table(title: str, rows: Sequence[Listed]) -> Table:
    table = Table(title=title)
    for column in ("task", "metric", "scored by", "questions", "data"):
        table.add_column(column, overflow="fold")
    for one in rows:
        table.add_row(one.task, one.metric, one.scored_by, one.questions, f"{one.place}: {one.data}")
    return table
