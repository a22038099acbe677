"""Per-question results from anywhere - our evaluations, lmms-eval's sample files, MLflow runs - compared honestly.

Nothing is compared that was not asked alike: other questions, other wordings, another metric or harness version are an
error that says what differs.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from sicog_exp.evaluation.statistics import (
    LEVEL,
    RESAMPLES,
    StatisticsError,
    cluster_error,
    corrected,
    join,
    paired,
    paired_pooled,
    told_apart,
)

OVERALL = "overall"
"""The mean over tasks, each with the same weight."""
POWER = 0.8
NOT_METRICS = {"doc_id", "target", "filtered_resps", "resps", "input", "doc_hash", "prompt_hash", "target_hash"}
SAMPLE_FILE = re.compile(r"_samples_(?P<task>.+)\.jsonl$")


@dataclass(frozen=True)
class Outcomes:
    """One model on one task: question -> its value, the image it is about, the words that were asked."""

    task: str
    metric: str
    values: Mapping[str, float]
    images: Mapping[str, str]
    prompts: Mapping[str, str]
    harness: str = ""


@dataclass(frozen=True)
class Comparison:
    """B - A on one task, as a fraction, with its 95% interval from resampling images.

    `mcnemar_p` (exact) and `holm_p` (corrected over the call's tasks) are None where values are not 0 or 1.
    `detectable` is the smallest true difference that this many images would show with a power of 80% at the 5% level,
    from the cluster-robust standard error `error`. `spread` is the standard deviation over seeds, None for one.
    """

    a: str
    b: str
    task: str
    metric: str
    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    n: int
    clusters: int
    error: float
    detectable: float
    mcnemar_p: float | None = None
    holm_p: float | None = None
    per_seed: tuple[float, ...] = ()
    spread: float | None = None


# Reading.


def read_outcomes(source: str, metric: str | None = None) -> dict[str, Outcomes]:
    """Task -> outcomes of a generation.

    `source` is an evaluation's folder, a finished run's folder (its last generation; FOLDER:G1 names another), a sample
    file of ours or of lmms-eval (`*_samples_TASK.jsonl`), or the id of an MLflow run of an experiment or a generation.
    `metric` names the value to take from lmms-eval's files that hold several. Raises StatisticsError.
    """
    name, _, generation = source.partition(":G")
    if generation and not generation.isdecimal():
        raise StatisticsError(f"{source}: behind :G stands the number of a generation, such as {name}:G1")
    path = Path(name)
    if not path.exists():
        path, generation = _from_mlflow(name, generation), ""
    if path.is_dir() and (path / "summary.json").is_file():
        evaluations = json.loads((path / "summary.json").read_text())["evaluations"]
        _check_generation(source, generation, range(len(evaluations)))
        path = path.parent / evaluations[int(generation) if generation else -1]
    return _of_folder(path) if path.is_dir() else _of_file(path, metric)


def _check_generation(source: str, generation: str, known: Collection[int]) -> None:
    if generation and int(generation) not in known:
        names = ", ".join(f"G{index}" for index in sorted(known))
        raise StatisticsError(f"{source}: no generation G{generation}; there are {names}")


def _from_mlflow(run_id: str, generation: str) -> Path:
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    from sicog_exp.recipe import TrackingConfig
    from sicog_exp.tracking import check_tracking, connect, generation_runs

    uri = os.environ.get("MLFLOW_TRACKING_URI") or TrackingConfig().uri
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise StatisticsError(f"{run_id}: neither a file, nor a folder, nor a run, for {uri} does not exist yet")
    check_tracking(TrackingConfig())
    client: MlflowClient = connect(TrackingConfig())
    try:
        run = client.get_run(run_id)
    except MlflowException:
        raise StatisticsError(f"{run_id}: neither a file, nor a folder, nor a run of {client.tracking_uri}") from None
    if run.data.tags.get("sicog.level") == "experiment":
        by_index = generation_runs(client, run)
        if not by_index:
            raise StatisticsError(f"run {run_id} has no generation yet")
        _check_generation(run_id, generation, by_index)
        run = by_index[int(generation) if generation else max(by_index)]
    return Path(download_artifacts(run_id=run.info.run_id, artifact_path="eval/samples.jsonl",
                                   tracking_uri=client.tracking_uri))  # fmt: skip


def _of_folder(folder: Path) -> dict[str, Outcomes]:
    if not (folder / "samples.jsonl").is_file():
        raise StatisticsError(f"{folder}: no samples.jsonl there; name an evaluation's folder, or its sample file")
    scores = folder / "scores.json"
    harness = json.loads(scores.read_text())["harness"] if scores.is_file() else ""
    return {task: replace(found, harness=harness) for task, found in _of_file(folder / "samples.jsonl", None).items()}


def _of_file(path: Path, metric: str | None) -> dict[str, Outcomes]:
    rows = list(_rows(path))
    if not rows:
        raise StatisticsError(f"{path}: no rows; name our samples.jsonl, or lmms-eval's *_samples_TASK.jsonl")
    if "doc_id" in rows[0]:
        found = _harness_file(path, rows, metric)
        return {found.task: found}
    if not {"task", "id", "image", "correct"} <= rows[0].keys():
        raise StatisticsError(f"{path}: row 1 is neither ours (task, id, image, correct) nor lmms-eval's (doc_id)")
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row)
    return {task: _ours(task, _by_question(group, "id")) for task, group in by_task.items()}


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                number += 1
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"a {type(row).__name__}")
                yield row
    except UnicodeDecodeError:
        raise StatisticsError(f"{path}: not UTF-8 text; name our samples.jsonl, or lmms-eval's "
                              "*_samples_TASK.jsonl") from None  # fmt: skip
    except ValueError as error:
        raise StatisticsError(f"{path}, row {number}: no JSON object ({error}); name a whole samples file") from None


def _by_question(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, Mapping[str, Any]]:
    return dict(zip(told_apart(str(row[key]) for row in rows), rows, strict=True))


def _ours(task: str, rows: Mapping[str, Mapping[str, Any]]) -> Outcomes:
    values = {i: float(row["correct"]) for i, row in rows.items()}
    images, prompts = ({i: row.get(key, "") for i, row in rows.items()} for key in ("image", "prompt"))
    return Outcomes(task, "correct", values, images, prompts)


def _harness_file(path: Path, rows: Sequence[Mapping[str, Any]], metric: str | None) -> Outcomes:
    """lmms-eval's file of one task. It names no image (unless the metric's mapping does): a question is its own."""
    match = SAMPLE_FILE.search(path.name)
    task = match["task"] if match else path.stem
    name = metric or _only_metric(path, rows)
    keyed = _by_question(rows, "doc_id")
    values = {i: _number(path, number, row, name) for number, (i, row) in enumerate(keyed.items(), 1)}
    images = {i: _image(row, i) for i, row in keyed.items()}
    return Outcomes(task, name, values, images, {i: str(row.get("input", "")) for i, row in keyed.items()})


def _only_metric(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    names = [name for name, value in rows[0].items() if name not in NOT_METRICS and _value(value) is not None]
    if len(names) != 1:
        raise StatisticsError(f"{path}: metrics {', '.join(names) or 'none'}; name one with --metric")
    return names[0]


def _value(value: Any) -> float | None:
    """A metric's number: itself, a mapping's `score` or `correct`, or the mean of a list of numbers."""
    if isinstance(value, bool | int | float):
        return float(value)
    if isinstance(value, Mapping):
        return next((_value(value[key]) for key in ("score", "correct", "exact_match") if key in value), None)
    if isinstance(value, list) and value and all(isinstance(item, bool | int | float) for item in value):
        return float(np.mean(value))
    return None


def _number(path: Path, number: int, row: Mapping[str, Any], metric: str) -> float:
    value = _value(row.get(metric))
    if value is None:
        raise StatisticsError(f"{path}, row {number}: no number for metric {metric!r}")
    return value


def _image(row: Mapping[str, Any], fallback: str) -> str:
    """The image that a row names, in itself or inside a metric's mapping."""
    places = (row, *(value for value in row.values() if isinstance(value, Mapping)))
    for place, key in itertools.product(places, ("image", "image_id", "image_path")):
        if isinstance(place.get(key), str | int):
            return str(place[key])
    return fallback


# Comparing.


def compare(a: str, b: str, metric: str | None = None, resamples: int = RESAMPLES) -> list[Comparison]:
    """B - A per task and overall. Each side is a source, or several joined by commas: its seeds, in one order."""
    sides = [[read_outcomes(source, metric) for source in side.split(",")] for side in (a, b)]
    if len(sides[0]) != len(sides[1]):
        raise StatisticsError(f"{a} names {len(sides[0])} seeds and {b} {len(sides[1])}: give as many on both sides")
    first, second = sides
    for before, after in zip(first, second):
        check_comparable(before, after)
    for other in (*first, *second):
        check_comparable(first[0], other)
    tasks = list(first[0])
    pairs = {task: [_aligned(x[task], y[task]) for x, y in zip(first, second)] for task in tasks}
    found = [_compared(a, b, task, first[0][task].metric, pairs[task], resamples) for task in tasks]
    if len(tasks) > 1:
        overall = [weighted([pairs[task][seed] for task in tasks]) for seed in range(len(first))]
        metrics = {first[0][task].metric for task in tasks}
        name = metrics.pop() if len(metrics) == 1 else "each task's"
        found.append(_compared(a, b, OVERALL, name, overall, resamples))
    return corrected(found)


def check_comparable(a: Mapping[str, Outcomes], b: Mapping[str, Outcomes]) -> None:
    """Raises StatisticsError where tasks, metrics, harness or wordings differ, saying what does."""
    if a.keys() != b.keys():
        names = f"{', '.join(a)} against {', '.join(b)}"
        raise StatisticsError(f"different benchmarks: {names}; evaluate both on one suite")
    for task in a:
        one, two = a[task], b[task]
        if one.metric != two.metric:
            raise StatisticsError(f"{task}: different metrics, {one.metric} against {two.metric}")
        if one.harness and two.harness and one.harness != two.harness:
            raise StatisticsError(f"{task}: different harness versions, {one.harness} against {two.harness}")
        join(one.values, two.values)
        for i, prompt in one.prompts.items():
            if prompt != two.prompts[i]:
                raise StatisticsError(f"{task}, question {i}: different prompts, {prompt!r} against {two.prompts[i]!r}")


Pair = tuple[NDArray, NDArray, NDArray]
"""Values in A, values in B and images of the same questions."""


def _aligned(a: Outcomes, b: Outcomes) -> Pair:
    ids, before, after = join(a.values, b.values)
    return before, after, np.array([a.images[i] for i in ids])


def weighted(tasks: Sequence[Pair]) -> Pair:
    """All tasks' questions as one set in which every task weighs the same."""
    total = sum(len(before) for before, _, _ in tasks)
    weights = [total / (len(tasks) * len(before)) for before, _, _ in tasks]
    before = np.concatenate([w * x for w, (x, _, _) in zip(weights, tasks)])
    after = np.concatenate([w * y for w, (_, y, _) in zip(weights, tasks)])
    return before, after, np.concatenate([images for _, _, images in tasks])


def _compared(a: str, b: str, task: str, metric: str, seeds: Sequence[Pair], resamples: int) -> Comparison:
    before = np.mean([pair[0] for pair in seeds], axis=0)
    after = np.mean([pair[1] for pair in seeds], axis=0)
    images = seeds[0][2]
    result = paired(before, after, images, resamples)
    error = cluster_error(after - before, images)
    made = Comparison(a, b, task, metric, float(before.mean()), float(after.mean()), result.difference, result.low,
                      result.high, result.n, result.clusters, error, detectable(error))  # fmt: skip
    if len(seeds) == 1:
        return replace(made, mcnemar_p=None if task == OVERALL else result.mcnemar_p)
    pooled = paired_pooled(list(seeds), resamples)
    return replace(made, per_seed=pooled.per_seed, spread=pooled.spread)


def detectable(error: float) -> float:
    from scipy.stats import norm

    return float(error * (norm.ppf(1 - (1 - LEVEL) / 2) + norm.ppf(POWER)))


# Showing.


def to_json(found: Sequence[Comparison]) -> str:
    """All figures as they are; an infinite one (a single image has no error) is null."""
    rows = [{name: None if value == float("inf") else value for name, value in asdict(c).items()} for c in found]
    return json.dumps(rows, indent=1)


def show(found: Sequence[Comparison], console: Console) -> None:
    """A table in percent and points."""
    letters = {source: chr(ord("B") + i) for i, source in enumerate(dict.fromkeys(c.b for c in found))}
    for source, letter in {found[0].a: "A", **letters}.items():
        console.print(f"{letter}: {source}", highlight=False)
    table = Table(title="Difference to A, points [95% interval, images resampled]")
    for column in ("", "task", "A, %", "%", "difference", "detectable", "McNemar p", "Holm p", "questions / images"):
        table.add_column(column, overflow="fold")
    for c in found:
        seeds = f" (seeds {' '.join(f'{100 * x:+.1f}' for x in c.per_seed)})" if c.per_seed else ""
        difference = f"{100 * c.difference:+.1f} [{100 * c.low:+.1f}, {100 * c.high:+.1f}]{seeds}"
        p_values = ["" if p is None else f"{p:.2g}" for p in (c.mcnemar_p, c.holm_p)]
        table.add_row(letters[c.b], c.task, f"{100 * c.mean_a:.1f}", f"{100 * c.mean_b:.1f}", difference,
                      f"{100 * c.detectable:.1f}", *p_values, f"{c.n} / {c.clusters}")  # fmt: skip
    console.print(table)
