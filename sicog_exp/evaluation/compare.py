"""Generations compared: scores with image-clustered intervals, paired differences, and the generation to promote.

Everything comes from the per-question results (`samples.jsonl`) of evaluation directories, matched by question id.
"""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sicog_exp.evaluation.benchmarks import Sample, read_samples
from sicog_exp.evaluation.outcomes import weighted
from sicog_exp.evaluation.statistics import (
    RESAMPLES,
    Interval,
    Paired,
    Pooled,
    StatisticsError,
    corrected,
    gain_share,
    interval,
    join,
    paired,
    paired_pooled,
    told_apart,
)


@dataclass(frozen=True)
class TaskTable:
    """One generation on one task: the mean metric over all questions and over each named question family."""

    task: str
    format: str
    overall: Interval
    families: dict[str, Interval]


ScoreTable = dict[str, TaskTable]
"""Task name -> its scores, in the order of the suite."""


@dataclass(frozen=True)
class Delta:
    """Generation `after` minus generation `before` ("G0", "G1") on the same questions of one task.

    `mcnemar_p` and `holm_p` (corrected over all tests of one call of `deltas`) are None where the metric is not 0/1.
    """

    before: str
    after: str
    task: str
    format: str
    difference: float
    low: float
    high: float
    n: int
    clusters: int
    mcnemar_p: float | None = None
    holm_p: float | None = None

    @property
    def clear(self) -> bool:
        """Does the interval exclude zero?"""
        return self.low > 0 or self.high < 0


def score_table(scores: Path, resamples: int = RESAMPLES) -> ScoreTable:
    """The scores in an evaluation directory, each with its 95% interval from resampling whole images."""
    return {name: _task_table(name, samples, resamples) for name, samples in _by_task(scores).items()}


def metrics(table: ScoreTable) -> dict[str, float]:
    """A generation's metrics under the names that every generation uses; names keep MLflow's rules."""
    named: dict[str, float] = {}
    for task, score in table.items():
        prefix = f"eval/{_key(task)}"
        named[f"{prefix}/accuracy"] = score.overall.mean
        named[f"{prefix}/accuracy_low"] = score.overall.low
        named[f"{prefix}/accuracy_high"] = score.overall.high
        named |= {f"{prefix}/family/{_key(name)}": family.mean for name, family in score.families.items()}
    return named


def deltas(generations: Sequence[Path], resamples: int = RESAMPLES) -> list[Delta]:
    """Every generation against G0, then each against the one before it, per task.

    `generations` are evaluation directories in order. Raises StatisticsError where two cover different tasks or
    questions. McNemar's p-values are corrected together (Holm), as one family of tests.
    """
    results = [_by_task(path) for path in generations]
    last = len(results)
    pairs = [(0, after) for after in range(1, last)] + [(after - 1, after) for after in range(2, last)]
    found = [delta for before, after in pairs for delta in _compared(results, before, after, resamples)]
    return corrected(found)


def pooled(before: Sequence[Path], after: Sequence[Path], resamples: int = RESAMPLES) -> dict[str, Pooled]:
    """Task -> after minus before over seeds; entry i of both are evaluation directories of the same seed.

    Questions are averaged over seeds first, then images resampled, the same ones in every seed. Raises
    StatisticsError where two cover different tasks or questions.
    """
    first, second = [_by_task(path) for path in before], [_by_task(path) for path in after]
    tasks = first[0].keys()
    if any(results.keys() != tasks for results in (*first, *second)):
        raise StatisticsError("the seeds were scored on different tasks; evaluate all on one suite")
    return {task: paired_pooled([_aligned(a[task], b[task]) for a, b in zip(first, second, strict=True)], resamples)
            for task in tasks}  # fmt: skip


def ceiling_shares(floor: Sequence[Path], arm: Sequence[Path], limit: Sequence[Path],
                   resamples: int = RESAMPLES) -> dict[str, Interval | None]:  # fmt: skip
    """Task -> (arm - floor) / (limit - floor), questions averaged over seeds first, images resampled; None where the
    limit is not clearly above the floor. Entry i of each is an evaluation directory of the same seed."""
    seeds = [tuple(map(_by_task, paths)) for paths in zip(floor, arm, limit, strict=True)]
    return {task: _share([(a[task], b[task], c[task]) for a, b, c in seeds], resamples) for task in seeds[0][0]}


def _share(seeds: Sequence[tuple[list[Sample], list[Sample], list[Sample]]], resamples: int) -> Interval | None:
    gains, limits, images = [], [], [""]
    for floor, arm, limit in seeds:
        before, after, images = _aligned(floor, arm)
        gains.append(after - before)
        limits.append(_aligned(floor, limit)[1] - before)
    try:
        return gain_share(np.mean(gains, axis=0), np.mean(limits, axis=0), images, resamples)
    except StatisticsError:
        return None


def mean_gain(before: Path, after: Path, resamples: int = RESAMPLES) -> Paired:
    """After minus before over all tasks, each with the same weight: what decides whether another generation pays.

    Raises StatisticsError where two evaluation directories cover different tasks or questions.
    """
    results = [_by_task(before), _by_task(after)]
    _check_tasks(results, 0, 1)
    pairs = [_aligned(results[0][task], results[1][task]) for task in results[0]]
    return paired(*weighted([(a, b, np.array(images)) for a, b, images in pairs]), resamples)


def champion(generations: Sequence[Path], resamples: int = RESAMPLES) -> int:
    """The index of the generation to promote: never one that regresses beyond the noise.

    G0 holds the title first. Each later generation g challenges the holder c and takes over if its mean difference
    over tasks is above 0 and no task's paired (g - c) interval lies wholly below 0.
    """
    results = [_by_task(path) for path in generations]
    holder = 0
    for challenger in range(1, len(results)):
        if _takes_over(_compared(results, holder, challenger, resamples)):
            holder = challenger
    return holder


def _takes_over(challenge: Sequence[Delta]) -> bool:
    return sum(delta.difference for delta in challenge) > 0 and all(delta.high >= 0 for delta in challenge)


def _by_task(scores: Path) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = defaultdict(list)
    for sample in read_samples(scores):
        found[sample.task].append(sample)
    return dict(found)


def _task_table(name: str, samples: Sequence[Sample], resamples: int) -> TaskTable:
    by_family: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.family:
            by_family[sample.family].append(sample)
    families = {family: _interval(rows, resamples) for family, rows in sorted(by_family.items())}
    return TaskTable(name, samples[0].format, _interval(samples, resamples), families)


def _interval(samples: Sequence[Sample], resamples: int) -> Interval:
    return interval([s.correct for s in samples], [s.image for s in samples], resamples)


def _compared(results: Sequence[Mapping[str, list[Sample]]], before: int, after: int, resamples: int) -> list[Delta]:
    _check_tasks(results, before, after)
    first, second = results[before], results[after]
    return [_delta(f"G{before}", f"G{after}", first[task], second[task], resamples) for task in first]


def _check_tasks(results: Sequence[Mapping[str, list[Sample]]], before: int, after: int) -> None:
    first, second = results[before], results[after]
    if first.keys() != second.keys():
        raise StatisticsError(f"G{before} was scored on {', '.join(first)} and G{after} on {', '.join(second)}; "
                              "evaluate both on one suite")  # fmt: skip


def _delta(before: str, after: str, first: list[Sample], second: list[Sample], resamples: int) -> Delta:
    result = _paired(first, second, resamples)
    return Delta(before, after, first[0].task, first[0].format, result.difference, result.low, result.high, result.n,
                 result.clusters, result.mcnemar_p)  # fmt: skip


def _paired(first: Sequence[Sample], second: Sequence[Sample], resamples: int) -> Paired:
    return paired(*_aligned(first, second), resamples)


def _aligned(first: Sequence[Sample], second: Sequence[Sample]) -> tuple[NDArray, NDArray, list[str]]:
    """(scores in the first, scores in the second, images) of the same questions, in the order of their ids."""
    keyed, other = _keyed(first), _keyed(second)
    ids, a, b = join({k: s.correct for k, s in keyed.items()}, {k: s.correct for k, s in other.items()})
    return a, b, [keyed[key].image for key in ids]


def _keyed(samples: Sequence[Sample]) -> dict[str, Sample]:
    return dict(zip(told_apart(sample.id for sample in samples), samples, strict=True))


def _key(name: str) -> str:
    """A part of a metric name. What MLflow forbids becomes "_", with a checksum so that two names never meet."""
    safe = re.sub(r"[^\w\-. :]", "_", name).strip(".") or "_"
    return safe if safe == name else f"{safe}-{zlib.crc32(name.encode()):08x}"
