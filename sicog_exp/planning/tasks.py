"""What a suite asks, from its tasks' YAML alone: lmms-eval itself takes many seconds to say it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sicog_exp.evaluation.benchmarks import Split, evals_folder, load_suite
from sicog_exp.planning.contents import Held
from sicog_exp.prompts import KINDS, Kind

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


def read_tasks(suite: str, split: Split, splits: Mapping[str, Held], unknown: float) -> list[Asked]:
    """The tasks of a suite. `splits`: the data set's own, `unknown`: questions of a task that is not ours."""
    found = load_suite(suite)
    folders = [evals_folder() / "tasks", *map(Path, found.include)]
    return [_asked(task.task, task.limit, _task_file(task.task, folders), splits, unknown)
            for task in found.tasks(split)]  # fmt: skip


def _asked(name: str, limit: int | None, file: Mapping[str, Any], splits: Mapping[str, Held], unknown: float) -> Asked:
    source = str(file.get("dataset_kwargs", "")).removeprefix("records.")
    known = _easyvqa() if source == "easyvqa" else splits.get(source)
    held = known or Held(unknown, unknown)
    questions = min(held.questions, limit or float("inf"))
    metadata, options = file.get("metadata"), file.get("generation_kwargs")
    kind = metadata.get("kind", "direct") if isinstance(metadata, Mapping) else "direct"
    tokens = options.get("max_new_tokens") if isinstance(options, Mapping) else None
    per_picture = held.questions / held.pictures if held.pictures else 1.0
    return Asked(name, questions, kind if kind in KINDS else "direct", tokens, per_picture, known is not None)


def _easyvqa() -> Held:
    import easy_vqa

    questions, _, pictures = easy_vqa.get_test_questions()
    return Held(len(questions), len(set(pictures)))


def _task_file(name: str, folders: list[Path]) -> dict[str, Any]:
    """A task's YAML with what it includes; nothing for one of lmms-eval's own."""
    for folder in folders:
        for path in _named(folder, name):
            return _with_included(path)
    return {}


def _named(folder: Path, name: str) -> Iterator[Path]:
    for path in (folder / f"{name}.yaml", *sorted(folder.glob("*.yaml"))):
        if path.is_file() and _read(path).get("task") == name:
            yield path


def _with_included(path: Path) -> dict[str, Any]:
    own = _read(path)
    included = own.pop("include", None)
    other = path.parent / str(included)
    return {**(_with_included(other) if included and other.is_file() else {}), **own}


def _function_name(loader: Any, node: Any) -> Any:
    return loader.construct_scalar(node)


def _read(path: Path) -> dict[str, Any]:
    """A task's YAML; a function that it names stays a name."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", _function_name)
    loaded = yaml.load(path.read_text(encoding="utf-8"), Loader)
    return loaded if isinstance(loaded, dict) else {}
