"""Benchmarks: lmms-eval tasks, run in process over any engine, with every question's result kept."""

from __future__ import annotations

import inspect
import json
import os
import random
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sicog_exp.evaluation.answers import PICTURES, KeptAnswers
from sicog_exp.evaluation.asked import Asked
from sicog_exp.evaluation.suites import BenchmarkError, Split, Suite, SuiteTask, evals_folder, harness_version
from sicog_exp.generation.engine import Engine
from sicog_exp.prompts import PROMPTS, final_text, normalize_answer
from sicog_exp.recipe import EvaluationConfig
from sicog_exp.records import read_jsonl, write_jsonl
from sicog_exp.store import REJECTED, Workplace

SAMPLES, SCORES, RESULTS = "samples.jsonl", "scores.json", "results.json"
DATA_VARIABLE = "SICOG_DATA"
"""Environment variable that tells the tasks in evals/tasks/ where the data set lies."""
VALUES = ("score", "true_false")
"""What stock tasks call the value in a metric that is a mapping."""
VARIANT = 1_000_000
"""MMBench numbers the circular variants of question N as N + 1,000,000, N + 2,000,000, ..."""


@dataclass(frozen=True)
class FamilyScore:
    """Mean metric of one question family and the number of its questions."""

    accuracy: float
    n: int


@dataclass(frozen=True)
class TaskScore:
    """One task's score with what is needed to read it: the wording, the answer format and the limits it ran under."""

    accuracy: float
    n: int
    families: dict[str, FamilyScore]
    metric: str
    format: str
    prompt: str
    limit: int | None


@dataclass(frozen=True)
class Scores:
    """All scores of one model on one suite; per-question results lie beside them in `samples.jsonl`."""

    suite: str
    split: Split
    tasks: dict[str, TaskScore]
    harness: str
    engine: str
    batch_size: int
    max_new_tokens: int


@dataclass(frozen=True)
class Sample:
    """One question's result. `answer` is the parsed, normalised response ("" where its format is broken)."""

    task: str
    id: str
    image: str
    family: str
    format: str
    prompt: str
    response: str
    answer: str
    target: str
    correct: float


def evaluate(
    engine: Engine, suite: Suite, dataset_dir: Path, config: EvaluationConfig, out: Path, split: Split = "benchmark",
    workplace: Workplace | None = None,
) -> Scores:  # fmt: skip
    """Score an engine on a suite; `out` gets samples.jsonl, scores.json and lmms-eval's results.json.

    `dataset_dir` holds `images/` and `<split>.parquet`. What the engine raises is raised here: no question is ever
    scored on an answer that was not given. One that the model cannot be asked is left out, and rejected.jsonl lists it.
    With `KeptAnswers` as the engine a killed evaluation goes on, and `workplace` hears how far it is.
    """
    out.mkdir(parents=True, exist_ok=True)
    tasks = suite.tasks(split, config.judge)
    with harness(dataset_dir, [task.task for task in tasks], suite.include) as manager:
        results, put = _run(engine, tasks, manager, config, out, workplace)
        samples = {task.task: _samples(task, results, put, manager) for task in tasks}
    _list_refused(put.refused, results, out, workplace)
    made = {task.task: _task_score(task, samples[task.task], _kind(results, task.task)) for task in tasks}
    asked = engine.engine if isinstance(engine, KeptAnswers) else engine
    scores = Scores(
        suite.name, split, made, harness_version(), engine_name(asked), config.batch_size, config.max_new_tokens
    )
    write_jsonl(out / SAMPLES, (asdict(sample) for rows in samples.values() for sample in rows))
    _write_json(out / SCORES, asdict(scores))
    _write_json(out / RESULTS, {key: results[key] for key in ("results", "versions", "n-samples")})
    return scores


def engine_name(engine: Engine) -> str:
    """Of what computed: where workers share the work, that of their engine."""
    return getattr(engine, "name", type(engine).__name__)


@contextmanager
def harness(dataset_dir: Path, tasks: Sequence[str], include: Sequence[str]) -> Iterator[Any]:
    """lmms-eval's task manager, offline and quiet over our data set; raises BenchmarkError for an unknown task."""
    with _environment(dataset_dir), quiet_harness(), _kept_random_state():
        yield task_manager(tasks, include)


def read_samples(out: Path) -> list[Sample]:
    """Every question's result of a finished evaluation, in the order of the tasks and their questions."""
    return [Sample(**row) for row in read_jsonl(out / SAMPLES)]


# Running the harness.


@dataclass(frozen=True)
class _Put:
    """How questions, (task, document), were put: a digest of the picture shown, where its pixels came from the task;
    why it could not be put at all."""

    shown: dict[tuple[str, int], str]
    refused: dict[tuple[str, int], str]


def _run(engine: Engine, tasks: Sequence[SuiteTask], manager: Any, config: EvaluationConfig, out: Path,
         workplace: Workplace | None) -> tuple[dict[str, Any], _Put]:  # fmt: skip
    """lmms-eval's results, merged over calls: its limit holds for a whole call, ours for a task."""
    from sicog_exp.evaluation.lmms_model import EngineModel

    pictures = engine.scratch / PICTURES if isinstance(engine, KeptAnswers) else None
    refused: dict[tuple[str, int], str] = {}
    model = EngineModel(engine, config.batch_size, config.max_new_tokens, pictures, refused)
    by_limit: dict[int | None, list[str]] = defaultdict(list)
    for task in tasks:
        by_limit[task.limit].append(task.task)
    calls = sorted(by_limit.items(), key=lambda call: call[0] is not None)  # first what is asked without end
    if isinstance(engine, KeptAnswers) and workplace and workplace.progress:
        manager = Asked(manager, calls, workplace.progress)
        engine.heard = manager.answered
    merged: dict[str, Any] = defaultdict(dict)
    for limit, names in calls:
        results = _simple_evaluate(model, names, limit, manager, out)
        for key in ("results", "versions", "n-samples", "samples", "configs"):
            merged[key].update(results[key])
    return merged, _Put(model.shown, refused)


def _list_refused(refused: Mapping[tuple[str, int], str], results: Mapping[str, Any], out: Path,
                  workplace: Workplace | None) -> None:  # fmt: skip
    """Say which questions were left out, and count them; nothing where there are none."""
    if not refused:
        return
    names = {(task, row["doc_id"]): _name(row) for task in {task for task, _ in refused}
             for row in results["samples"][task]}  # fmt: skip
    rows = [{"id": names[key], "task": key[0], "reason": reason} for key, reason in sorted(refused.items())]
    write_jsonl(out / REJECTED, rows)
    if workplace:
        workplace.add(rejected=len(rows))
    print(f"evaluation: {len(rows)} questions cannot be put to this model and are left out, for example "
          f"{rows[0]['id']} of {rows[0]['task']} ({rows[0]['reason']}); {REJECTED} lists them")  # fmt: skip


def _simple_evaluate(model: Any, names: list[str], limit: int | None, manager: Any, out: Path) -> dict[str, Any]:
    from argparse import Namespace

    from lmms_eval import evaluator

    return evaluator.simple_evaluate(
        model=model,
        tasks=names,
        limit=limit,
        task_manager=manager,
        bootstrap_iters=0,  # our own intervals are clustered by image
        process_docs_parallel=1,
        # Without an output path some stock tasks write submissions/ into the working directory.
        cli_args=Namespace(output_path=str(out), process_with_media=False),
    )


def task_manager(names: Sequence[str], include: Sequence[str]) -> Any:
    """lmms-eval's index of tasks: ours alone where they suffice: indexing lmms-eval's own takes seconds."""
    from lmms_eval.tasks import TaskManager
    from yaml import YAMLError

    folders = [str(evals_folder() / "tasks"), *(str(Path(folder).resolve()) for folder in include)]
    missing = [folder for folder in folders if not Path(folder).is_dir()]
    if missing:
        raise BenchmarkError(f"include: no folder {missing[0]}")
    try:
        manager = TaskManager(include_path=folders, include_defaults=False)
    except (OSError, YAMLError) as error:
        raise BenchmarkError(f"include: lmms-eval cannot read the tasks in {', '.join(folders[1:])} ({error}); a suite "
                             "stands beside such a folder, in which every YAML file is a task") from None  # fmt: skip
    if set(names) <= set(manager.all_tasks):
        return manager
    manager = TaskManager(include_path=folders)
    unknown = sorted(set(names) - set(manager.all_tasks))
    if unknown:
        raise BenchmarkError(f"unknown tasks {', '.join(unknown)}: neither lmms-eval's own nor in {', '.join(folders)}")
    return manager


def task_file(task: SuiteTask, manager: Any) -> Path | None:
    """The task's own file; None for a group of tasks."""
    path = Path(str(manager.task_index[task.task]["yaml_path"]))
    return path if path.is_file() else None


def whole_task(task: SuiteTask, manager: Any) -> dict[str, Any]:
    """The configuration of a task with its functions."""
    from lmms_eval.utils import load_yaml_config

    file = task_file(task, manager)
    try:
        return load_yaml_config(str(file), mode="full") if file else {}
    except Exception as error:  # the file runs the task's own code
        raise BenchmarkError(f"{task.task}: {file} does not load ({type(error).__name__}: {error}); install what is "
                             "missing, or leave the task out of the suite") from error  # fmt: skip


@contextmanager
def _environment(dataset_dir: Path) -> Iterator[None]:
    """Offline, our data set, and one process: spreading work is the engine's business, not the harness's."""
    wanted: dict[str, str | None] = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        DATA_VARIABLE: str(dataset_dir.absolute()),
        **dict.fromkeys(("RANK", "LOCAL_RANK", "WORLD_SIZE")),
    }
    before = {name: os.environ.get(name) for name in wanted}
    _set_environment(wanted)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def quiet_harness() -> Iterator[None]:
    """No log lines and no progress bars of lmms-eval's: the run shows its own."""
    import datasets
    import lmms_eval.api.task
    import lmms_eval.evaluator
    from loguru import logger
    from tqdm import tqdm

    modules: tuple[Any, ...] = (lmms_eval.api.task, lmms_eval.evaluator)
    logger.disable("lmms_eval")
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    for module in modules:
        module.tqdm = lambda *args, **options: tqdm(*args, **{**options, "disable": True})
    try:
        yield
    finally:
        for module in modules:
            module.tqdm = tqdm
        if not bars:
            datasets.enable_progress_bars()
        logger.enable("lmms_eval")


@contextmanager
def _kept_random_state() -> Iterator[None]:
    """lmms-eval seeds the global generators; a run that goes on training must not notice."""
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


# Reading its results.


def _kind(results: Mapping[str, Any], task: str) -> str:
    metadata = results["configs"][task].get("metadata")
    return str(metadata.get("kind", "")) if isinstance(metadata, Mapping) else ""


Row = Mapping[str, Any]
Shown = Mapping[tuple[str, int], str]


def _samples(task: SuiteTask, results: Mapping[str, Any], put: _Put, manager: Any) -> list[Sample]:
    rows = sorted(results["samples"][task.task], key=lambda row: row["doc_id"])
    expected = results["n-samples"][task.task]["effective"]
    if len(rows) != expected or len({row["doc_id"] for row in rows}) != expected:
        raise BenchmarkError(f"{task.task}: {len(rows)} results for {expected} questions")
    kind, units = _kind(results, task.task), _left(task, rows, put.refused)
    for row in rows if task.judge else ():
        if (task.task, row["doc_id"]) not in put.refused:
            _check_judged(task, row)
    if not task.unit:
        return [_sample(task, kind, name, [row], _value(task, row), put.shown) for name, (row,) in units]
    aggregate = _aggregation(task, manager)
    return [_sample(task, kind, name, group, _share(task, aggregate([dict(row[task.metric]) for row in group])),
                    put.shown) for name, group in units]  # fmt: skip


def _left(task: SuiteTask, rows: Sequence[Row], refused: Mapping[tuple[str, int], str]
          ) -> list[tuple[str, list[Row]]]:  # fmt: skip
    """The rows of each question that was put, in all its rows. Raises BenchmarkError where that is none."""
    units = list(_units(task, task.unit, rows).items()) if task.unit else [(_name(row), [row]) for row in rows]
    left = [(name, group) for name, group in units
             if not any((task.task, row["doc_id"]) in refused for row in group)]  # fmt: skip
    if units and not left:
        first = next(reason for (name, _), reason in refused.items() if name == task.task)
        raise BenchmarkError(f"{task.task}: none of its questions can be put to this model ({first}); leave the task "
                             "out of the suite")  # fmt: skip
    return left


def _name(row: Row) -> str:
    """Stock tasks' documents have no id."""
    return str(row["doc"].get("id") or row["doc_id"])


def _sample(task: SuiteTask, kind: str, name: str, rows: Sequence[Row], correct: float, shown: Shown) -> Sample:
    """One question, asked in one row or several. Where its document names no pictures, the pixels do; without either it
    counts as a picture of its own."""
    first, responses = rows[0], [str(row["filtered_resps"][0]) for row in rows]
    images = first["doc"].get("images") or [shown.get((task.task, first["doc_id"]), name)]
    answers = [final_text(kind, text) if kind in PROMPTS else text for text in responses]  # type: ignore[arg-type]
    return Sample(
        task=task.task,
        id=name,
        image=str(images[0]),
        family=str(first["doc"].get(task.family) or ""),
        format=kind,
        prompt=str(first["arguments"][0]),
        response="\n".join(responses),
        answer="\n".join(normalize_answer(str(answer or "")) for answer in answers),
        target="\n".join(str(row["target"]) for row in rows),
        correct=correct,
    )


def _value(task: SuiteTask, row: Row) -> float:
    value = row.get(task.metric)
    if isinstance(value, Mapping):
        value = next((value[key] for key in VALUES if key in value), None)
    if not isinstance(value, int | float):
        raise BenchmarkError(f"{task.task}: no number for metric {task.metric!r}; the results have {', '.join(row)}")
    return _share(task, value)


def _share(task: SuiteTask, value: float) -> float:
    share = float(value) / task.scale
    return share if task.higher_is_better else 1 - share


def _units(task: SuiteTask, unit: str, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each question."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        value = row.get(task.metric)
        if isinstance(value, Mapping) and unit in value:
            key = value[unit]
            found[str(key % VARIANT if isinstance(key, int) else key)].append(row)
    if not found:
        raise BenchmarkError(f"{task.task}: no result has a metric {task.metric!r} with {unit!r}; "
                             f"the results have {', '.join(rows[0])}")  # fmt: skip
    return found


def _aggregation(task: SuiteTask, manager: Any) -> Callable[[list[dict[str, Any]]], float]:
    """The stock task's own aggregation of our metric, without the tables and files that it makes on the way."""
    from argparse import Namespace

    from lmms_eval.api.registry import get_aggregation

    metrics = whole_task(task, manager).get("metric_list", ())
    found = next((metric["aggregation"] for metric in metrics if metric["metric"] == task.metric), "mean")
    function = get_aggregation(found) if isinstance(found, str) else found

    def aggregate(rows: list[dict[str, Any]]) -> float:
        with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            given = {"args": Namespace(output_path=folder)} if "args" in inspect.signature(function).parameters else {}
            return function(rows, **given)

    return aggregate


def _check_judged(task: SuiteTask, row: Row) -> None:
    """Stock tasks score a question 0 where the judge failed; that is no score."""
    value = row.get(task.metric)
    if not isinstance(value, Mapping):
        return
    silent = value.get("eval_model") == "" or (value.get("extraction") == "" and row["filtered_resps"][0].strip())
    if silent:
        raise BenchmarkError(f"{task.task}: the judge gave no answer for question {row['doc_id']}; the answers of the "
                             "model are kept: run the same command when the judge can be reached")  # fmt: skip


def _task_score(task: SuiteTask, samples: Sequence[Sample], kind: str) -> TaskScore:
    families: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        families[sample.family].append(sample.correct)
    return TaskScore(
        accuracy=_mean([sample.correct for sample in samples]),
        n=len(samples),
        families={name: FamilyScore(_mean(values), len(values)) for name, values in sorted(families.items())},
        metric=task.metric,
        format=kind,
        prompt=PROMPTS.get(kind, ""),  # type: ignore[call-overload]
        limit=task.limit,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, default=str)
    path.write_text(text + "\n", encoding="utf-8")
