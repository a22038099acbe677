"""Benchmarks: suites of lmms-eval tasks, run in process over any engine, with every question's result kept."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sicog_exp.generation.engine import Engine
from sicog_exp.prompts import PROMPTS, final_text, normalize_answer
from sicog_exp.recipe import EvaluationConfig, RecipeError, load_as
from sicog_exp.records import read_jsonl, write_jsonl
from sicog_exp.store import file_checksum

Split = Literal["benchmark", "development"]
SAMPLES, SCORES, RESULTS = "samples.jsonl", "scores.json", "results.json"
READ_WHOLE = (".yaml", ".yml", ".py", ".json", ".jsonl", ".parquet", ".csv")
"""Files of an included folder whose content counts, not their size alone."""
DATA_VARIABLE = "SICOG_DATA"
"""Environment variable that tells the tasks in evals/tasks/ where the data set lies."""


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


@dataclass(frozen=True)
class Suite:
    """What a generation is scored on; `development` is for decisions, `benchmark` never."""

    name: str
    benchmark: tuple[SuiteTask, ...]
    development: tuple[SuiteTask, ...] = ()
    include: tuple[str, ...] = ()
    """More folders of task YAMLs, for example stock tasks over local data."""

    def tasks(self, split: Split) -> tuple[SuiteTask, ...]:
        """Raises BenchmarkError where the split has no tasks or one twice."""
        tasks = self.benchmark if split == "benchmark" else self.development
        names = [task.task for task in tasks]
        if not tasks or len(set(names)) < len(names):
            raise BenchmarkError(f"suite {self.name}: {split} names {names}; give every task once, at least one")
        return tasks


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


def check_suite(name: str, split: Split) -> None:
    """Raises BenchmarkError where the suite, its tasks for `split` or a folder that it includes do not exist."""
    suite = load_suite(name)
    with _quiet_harness():
        _task_manager([task.task for task in suite.tasks(split)], suite.include)


def suite_state(name: str) -> dict[str, str]:
    """What scores on a suite depend on, for a step's fingerprint: the suite's content, the tasks' files, the harness.

    Names alone would hide an edit, and an old score would stand for a new benchmark. In folders that it includes,
    pictures and the like count by name and size.
    """
    suite = load_suite(name)
    files = sorted(path for path in (evals_folder() / "tasks").iterdir() if path.is_file())
    digest = hashlib.sha256("".join(f"{path.name}:{file_checksum(path)};" for path in files).encode()).hexdigest()
    own = {folder: _folder_state(Path(folder)) for folder in suite.include}
    state = {"suite": json.dumps(asdict(suite), sort_keys=True), "tasks": digest, "harness": _harness()}
    return {**state, **({"included": json.dumps(own, sort_keys=True)} if own else {})}


def _folder_state(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    states = (file_checksum(path) if path.suffix in READ_WHOLE else str(path.stat().st_size) for path in files)
    names = (path.relative_to(folder) for path in files)
    return hashlib.sha256("".join(f"{name}:{state};" for name, state in zip(names, states)).encode()).hexdigest()


def evaluate(
    engine: Engine, suite: Suite, dataset_dir: Path, config: EvaluationConfig, out: Path, split: Split = "benchmark"
) -> Scores:
    """Score an engine on a suite; `out` gets samples.jsonl, scores.json and lmms-eval's results.json.

    `dataset_dir` holds `images/` and `<split>.parquet`. What the engine raises is raised here: no question is ever
    scored on an answer that was not given.
    """
    out.mkdir(parents=True, exist_ok=True)
    tasks = suite.tasks(split)
    with harness(dataset_dir, [task.task for task in tasks], suite.include) as manager:
        results = _run(engine, tasks, manager, config, out)
    samples = {task.task: _samples(task, results) for task in tasks}
    made = {task.task: _task_score(task, samples[task.task], _kind(results, task.task)) for task in tasks}
    scores = Scores(
        suite.name, split, made, _harness(), type(engine).__name__, config.batch_size, config.max_new_tokens
    )
    write_jsonl(out / SAMPLES, (asdict(sample) for rows in samples.values() for sample in rows))
    _write_json(out / SCORES, asdict(scores))
    _write_json(out / RESULTS, {key: results[key] for key in ("results", "versions", "n-samples")})
    return scores


@contextmanager
def harness(dataset_dir: Path, tasks: Sequence[str], include: Sequence[str]) -> Iterator[Any]:
    """lmms-eval's task manager, offline and quiet over our data set; raises BenchmarkError for an unknown task."""
    with _environment(dataset_dir), _quiet_harness(), _kept_random_state():
        yield _task_manager(tasks, include)


def read_samples(out: Path) -> list[Sample]:
    """Every question's result of a finished evaluation, in the order of the tasks and their questions."""
    return [Sample(**row) for row in read_jsonl(out / SAMPLES)]


def read_scores(out: Path) -> Scores:
    """The scores of a finished evaluation."""
    values = json.loads((out / SCORES).read_text(encoding="utf-8"))
    tasks = {
        name: TaskScore(**{**row, "families": {f: FamilyScore(**score) for f, score in row["families"].items()}})
        for name, row in values.pop("tasks").items()
    }
    return Scores(tasks=tasks, **values)


# Running the harness.


def _run(
    engine: Engine, tasks: Sequence[SuiteTask], manager: Any, config: EvaluationConfig, out: Path
) -> dict[str, Any]:
    """lmms-eval's results, merged over calls: its limit holds for a whole call, ours for a task."""
    by_limit: dict[int | None, list[str]] = defaultdict(list)
    for task in tasks:
        by_limit[task.limit].append(task.task)
    merged: dict[str, Any] = defaultdict(dict)
    for limit, names in by_limit.items():
        results = _simple_evaluate(engine, names, limit, manager, config, out)
        for key in ("results", "versions", "n-samples", "samples", "configs"):
            merged[key].update(results[key])
    return merged


def _simple_evaluate(
    engine: Engine, names: list[str], limit: int | None, manager: Any, config: EvaluationConfig, out: Path
) -> dict[str, Any]:
    from argparse import Namespace

    from lmms_eval import evaluator

    from sicog_exp.evaluation.lmms_model import EngineModel

    return evaluator.simple_evaluate(
        model=EngineModel(engine, config.batch_size, config.max_new_tokens),
        tasks=names,
        limit=limit,
        task_manager=manager,
        bootstrap_iters=0,  # our own intervals are clustered by image
        process_docs_parallel=1,
        # Without an output path some stock tasks write submissions/ into the working directory.
        cli_args=Namespace(output_path=str(out), process_with_media=False),
    )


def _task_manager(names: Sequence[str], include: Sequence[str]) -> Any:
    """Our tasks alone where they suffice: indexing lmms-eval's own takes seconds."""
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
def _quiet_harness() -> Iterator[None]:
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


def _harness() -> str:
    from importlib.metadata import version

    return f"lmms-eval {version('lmms-eval')}"


# Reading its results.


def _kind(results: Mapping[str, Any], task: str) -> str:
    metadata = results["configs"][task].get("metadata")
    return str(metadata.get("kind", "")) if isinstance(metadata, Mapping) else ""


def _samples(task: SuiteTask, results: Mapping[str, Any]) -> list[Sample]:
    rows = sorted(results["samples"][task.task], key=lambda row: row["doc_id"])
    expected = results["n-samples"][task.task]["effective"]
    if len(rows) != expected or len({row["doc_id"] for row in rows}) != expected:
        raise BenchmarkError(f"{task.task}: {len(rows)} results for {expected} questions")
    kind = _kind(results, task.task)
    return [_sample(task, kind, row) for row in rows]


def _sample(task: SuiteTask, kind: str, row: Mapping[str, Any]) -> Sample:
    """Stock tasks' documents have neither id nor family; each of their questions counts as an image of its own."""
    doc, response = row["doc"], row["filtered_resps"][0]
    name = str(doc.get("id") or row["doc_id"])
    images = doc.get("images") or [name]
    answer = final_text(kind, response) if kind in PROMPTS else response  # type: ignore[arg-type]
    return Sample(
        task=task.task,
        id=name,
        image=str(images[0]),
        family=str(doc.get("family") or ""),
        format=kind,
        prompt=str(row["arguments"][0]),
        response=str(response),
        answer=normalize_answer(str(answer or "")),
        target=str(row["target"]),
        correct=_value(task, row),
    )


def _value(task: SuiteTask, row: Mapping[str, Any]) -> float:
    value = row.get(task.metric)
    value = value.get("score") if isinstance(value, Mapping) else value
    if not isinstance(value, int | float):
        raise BenchmarkError(f"{task.task}: no number for metric {task.metric!r}; the results have {', '.join(row)}")
    return float(value)


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
