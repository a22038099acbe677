"""What an evaluation needs and a run should not find missing after hours of training: tasks, data sets, a judge."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from sicog_exp.evaluation import stock
from sicog_exp.evaluation.benchmarks import quiet_harness, task_file, task_manager, whole_task
from sicog_exp.evaluation.stock import TaskData
from sicog_exp.evaluation.suites import BenchmarkError, Split, SuiteTask, load_suite

JUDGE_KEY, JUDGE_URL = "OPENAI_API_KEY", "OPENAI_API_URL"
"""Where lmms-eval finds the judge: any server that speaks OpenAI's protocol."""


def check_suite(name: str, split: Split, judged: bool = False) -> None:
    """Raises BenchmarkError where the suite, its tasks for `split`, a folder that it includes, a hub's data set or a
    judge that was asked for cannot be had."""
    suite = load_suite(name)
    tasks = suite.tasks(split, judged)
    with quiet_harness():
        manager = task_manager([task.task for task in tasks], suite.include)
        _check_data({task.task: stock.task_data(file) for task in tasks if (file := task_file(task, manager))})
        _check_judge([task for task in tasks if task.judge], manager)


def _check_data(data: Mapping[str, TaskData]) -> None:
    """That data sets of the hub can be had, and that files of this machine are where the tasks name them."""
    gone = [f"{task}: {file}" for task, found in data.items() for file in found.files if not file.exists()]
    if gone:
        raise BenchmarkError(f"data files are missing:\n  {gone[0]}\nand {len(gone) - 1} more; put them back, or "
                             "mirror the suite again where they are now")  # fmt: skip
    absent = {task: found for task, found in data.items() if found.on_hub and not stock.in_hub_cache(found.path)}
    if absent and not stock.hub_answers():
        listed = "\n".join(f"  {task}: {found}" for task, found in absent.items())
        raise BenchmarkError(f"these data sets are not on this machine, and the hub does not answer:\n{listed}\n"
                             "Download them where there is a hub; `sicog benchmarks mirror SUITE --from DIR` then "
                             "points the tasks at local copies (docs/benchmarks.md)")  # fmt: skip


def _check_judge(tasks: Sequence[SuiteTask], manager: Any) -> None:
    """That a judge answers, and that the tasks which ask it load: some need packages that lmms-eval does not name."""
    if not tasks:
        return
    wanted = os.environ.get("API_TYPE", "openai") == "openai"
    if wanted and not os.environ.get(JUDGE_KEY):
        names = ", ".join(task.task for task in tasks)
        raise BenchmarkError(f"evaluation.judge=true: a judge model scores {names}: set {JUDGE_KEY} (and {JUDGE_URL} "
                             "for a server of your own), or leave evaluation.judge out")  # fmt: skip
    for task in tasks:
        whole_task(task, manager)
    url = os.environ.get(JUDGE_URL, "https://api.openai.com/v1")
    if wanted and not _answers(url):
        raise BenchmarkError(f"evaluation.judge=true: {url} does not answer; name the judge's address in {JUDGE_URL}")


def _answers(url: str) -> bool:
    from urllib.error import HTTPError
    from urllib.request import urlopen

    try:
        urlopen(url, timeout=stock.HUB_TIMEOUT).close()
    except HTTPError:
        return True  # it speaks; that it does not like this address says nothing
    except (OSError, ValueError):
        return False
    return True
