"""What a suite asks and shows, read from its lmms-eval tasks' documents: the held-out side of contamination."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from sicog_exp.curation.contamination import Picture, Question, picture_of
from sicog_exp.data.images import upright_rgb
from sicog_exp.evaluation.benchmarks import harness
from sicog_exp.evaluation.suites import Suite, SuiteTask, evals_folder
from sicog_exp.prompts import KINDS, question_of


@dataclass
class Contents:
    """All questions of a suite's tasks, both splits', and their pictures by pixel hash.

    `unread` says what could not be looked at: a task (its data are not on this machine) or documents of one.
    """

    questions: list[Question] = field(default_factory=list)
    pictures: dict[str, Picture] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    _own_tasks: Path = field(default_factory=lambda: evals_folder() / "tasks")
    _by_file: dict[str, str] = field(default_factory=dict)
    _by_name: dict[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)

    def images(self, leaf: Any, doc: Any) -> tuple[str, ...]:
        """The keys of a document's pictures. Our own tasks open the files that it names, once for all its questions."""
        code = getattr(leaf.config.doc_to_visual, "__code__", None)
        if code is None or not code.co_filename.startswith(f"{self._own_tasks}{os.sep}"):
            return tuple(self.picture(visual) for visual in leaf.doc_to_visual(doc) or ())
        name = (code.co_name, *doc["images"])
        if name not in self._by_name:
            self._by_name[name] = tuple(self.picture(visual) for visual in leaf.doc_to_visual(doc))
        return self._by_name[name]

    def picture(self, visual: Any) -> str:
        """The key of a picture as a task hands it over: an image or a file's path. Raises what decoding raises."""
        from PIL import Image

        if isinstance(visual, str | Path):
            visual = Image.open(visual)
        if not isinstance(visual, Image.Image):
            raise TypeError(f"a {type(visual).__name__} is no picture")
        # Tiles are what is still to be decoded: then the pixels are the file's, and tasks share files.
        file = str(getattr(visual, "filename", "") or "") if getattr(visual, "tile", None) else ""
        if file and file in self._by_file:
            visual.close()
            return self._by_file[file]
        picture = picture_of(upright_rgb(visual))
        self.pictures.setdefault(picture.digest, picture)
        if file:
            self._by_file[file] = picture.digest
        return picture.digest


def read_contents(suite: Suite, dataset_dir: Path, judged: bool = False) -> Contents:
    """Every document of every task, up to the tasks' limits, offline; tasks that a judge scores only if `judged`."""
    tasks = {task.task: task for task in (*suite.benchmark, *suite.development) if judged or not task.judge}
    contents = Contents()
    with harness(dataset_dir, list(tasks), suite.include) as manager:
        for name, task in tasks.items():
            try:
                loaded = list(_leaves(manager.load_task_or_group(name)))
            except Exception as error:  # tasks are anybody's code over anybody's data
                contents.unread[name] = _reason(error)
                continue
            for leaf in loaded:
                _read_task(task, leaf, contents)
    return contents


def _leaves(loaded: Mapping[Any, Any]) -> Iterator[Any]:
    """The tasks of a task or of a group of groups."""
    for value in loaded.values():
        yield from _leaves(value) if isinstance(value, Mapping) else [value]


def _read_task(task: SuiteTask, leaf: Any, contents: Contents) -> None:
    failed: list[str] = []
    metadata = leaf.config.metadata
    kind = str(metadata.get("kind", "")) if isinstance(metadata, Mapping) else ""
    for number, doc in enumerate(islice(leaf.eval_docs, task.limit)):
        try:
            contents.questions.append(_question(task.task, kind, number, doc, leaf, contents))
        except Exception as error:
            failed.append(_reason(error))
    if failed:
        contents.unread[task.task] = f"{len(failed)} documents, the first: {failed[0]}"


def _question(task: str, kind: str, number: int, doc: Any, leaf: Any, contents: Contents) -> Question:
    text = str(leaf.doc_to_text(doc))
    question = question_of(kind, text) if kind in KINDS else text  # type: ignore[arg-type]
    name = str((doc.get("id") if isinstance(doc, Mapping) else None) or number)
    return Question(task, name, question, _answer(leaf, doc), contents.images(leaf, doc))


def _answer(leaf: Any, doc: Any) -> str:
    """The target as text; some tasks have none, or an index into choices that says nothing here."""
    try:
        target = leaf.doc_to_target(doc)
    except Exception:
        return ""
    first = target[0] if isinstance(target, list | tuple) and target else target
    return first if isinstance(first, str) else ""


def _reason(error: Exception) -> str:
    lines: Iterable[str] = str(error).strip().splitlines()
    return f"{type(error).__name__}: {next(iter(lines), '')[:200]}"
