"""How far an evaluation's questions are answered: lmms-eval asks call by call, a run shows one bar."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sicog_exp.store import Progress


class Asked:
    """lmms-eval's task manager for the calls of one evaluation, and who hears of the answers.

    What a call asks is known when its tasks are loaded. Those to come count with their limits, so that the total is
    right from the start unless a task has fewer questions than its limit.
    """

    def __init__(self, manager: Any, calls: Sequence[tuple[int | None, Sequence[str]]], progress: Progress) -> None:
        """`calls`: the limit and the tasks of each, in order."""
        self._manager, self._progress = manager, progress
        self._to_come = [(limit or 0) * len(tasks) for limit, tasks in calls]
        self._tasks: list[Any] = []
        self._known = 0
        self._answered: set[str] = set()

    def load_task_or_group(self, names: Any = None, task_type: Any = "simple") -> dict[str, Any]:
        """What lmms-eval asks its manager for, once a call."""
        loaded = self._manager.load_task_or_group(names, task_type)
        self._tasks = list(_leaves(loaded))
        del self._to_come[:1]
        return loaded

    def answered(self, ids: Iterable[str]) -> None:
        """Requests (task/document/number) were answered; a question of several choices counts with its first."""
        self._known += sum(len({instance.doc_id for instance in task.instances}) for task in self._tasks)
        self._tasks = []
        self._answered.update(id.rpartition("/")[0] for id in ids)
        self._progress(len(self._answered), self._known + sum(self._to_come))


def _leaves(loaded: Mapping[Any, Any]) -> Iterator[Any]:
    for value in loaded.values():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        else:
            yield value
