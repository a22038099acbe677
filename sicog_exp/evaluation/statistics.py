"""Are two generations really different? Paired, image-clustered statistics over per-question scores.

Questions about one image share that image's difficulty, so images, not questions, are resampled (the cluster
bootstrap); a comparison is paired by question id. With few images (below about 30) percentile intervals are too
narrow: the number of clusters stands in every result for that reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000
LEVEL = 0.95
T = TypeVar("T", bound=Any)
BLOCK = 2_000_000
"""Cluster draws made at a time: bounds the memory of large benchmarks."""


class StatisticsError(ValueError):
    """Scores that cannot be compared; the message says why."""


@dataclass(frozen=True)
class Interval:
    """A mean with its percentile interval. `low` and `high` equal the mean where there is only one cluster."""

    mean: float
    low: float
    high: float
    n: int
    clusters: int


@dataclass(frozen=True)
class Paired:
    """B against A on the same questions. `difference` is mean(B) - mean(A).

    `mcnemar_p` is the exact two-sided test where every score is 0 or 1, else None. It takes questions as
    independent, which the interval does not: where the two disagree, trust the interval.
    """

    difference: float
    low: float
    high: float
    mcnemar_p: float | None
    n: int
    clusters: int

    @property
    def clear(self) -> bool:
        """Does the interval exclude zero?"""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Pooled:
    """B against A over several seeds: the questions' mean differences with an interval, and the spread over seeds.

    `spread` is the standard deviation (n - 1) of `per_seed`, None for one seed. `p` is the two-sided t test with the
    standard error of `cluster_error`: like the interval it takes images as independent, not questions.
    """

    difference: float
    low: float
    high: float
    per_seed: tuple[float, ...]
    spread: float | None
    n: int
    clusters: int
    p: float

    @property
    def clear(self) -> bool:
        """Does the interval exclude zero?"""
        return self.low > 0 or self.high < 0


def interval(scores: ArrayLike, clusters: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The mean score with its 95% bootstrap interval; whole images (`clusters`) are resampled."""
    values, groups = _checked(scores, clusters)
    low, high, count = _bootstrap(values, groups, resamples, seed)
    return Interval(float(values.mean()), low, high, len(values), count)


def paired(a: ArrayLike, b: ArrayLike, clusters: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> Paired:
    """B - A for scores of the same questions in the same order (see `join`), with interval and exact McNemar p."""
    before, groups = _checked(a, clusters)
    after, _ = _checked(b, clusters)
    difference = after - before
    low, high, count = _bootstrap(difference, groups, resamples, seed)
    return Paired(float(difference.mean()), low, high, _mcnemar(before, after), len(before), count)


def paired_pooled(
    seeds: Sequence[tuple[ArrayLike, ArrayLike, ArrayLike]], resamples: int = RESAMPLES, seed: int = 0
) -> Pooled:
    """B - A over runs with several seeds; each entry is (a, b, clusters) with the questions in one order.

    A question's difference is averaged over seeds first, then images are resampled, the same ones in every seed:
    the interval speaks of new images, `per_seed` and `spread` of new seeds. Raises StatisticsError where the seeds'
    questions differ.
    """
    if not seeds:
        raise StatisticsError("no seeds to pool: give at least one (a, b, clusters)")
    groups = np.asarray(seeds[0][2])
    rows = []
    for number, (a, b, clusters) in enumerate(seeds):
        if not np.array_equal(np.asarray(clusters), groups):
            raise StatisticsError(f"seed number {number} has other questions or another order than number 0")
        rows.append(_checked(b, clusters)[0] - _checked(a, clusters)[0])
    means = np.mean(rows, axis=0)
    low, high, count = _bootstrap(means, groups, resamples, seed)
    per_seed = tuple(float(row.mean()) for row in rows)
    spread = float(np.std(per_seed, ddof=1)) if len(rows) > 1 else None
    difference, p = float(means.mean()), _t_test(means, groups)
    return Pooled(difference, low, high, per_seed, spread, len(means), count, p)


def gain_share(gains: NDArray[np.float64], limits: NDArray[np.float64], clusters: ArrayLike,
               resamples: int = RESAMPLES, seed: int = 0) -> Interval:  # fmt: skip
    """What share of a possible gain was reached: mean(`gains`) / mean(`limits`), both by question, with the interval
    from resampling images for both at once.

    Raises StatisticsError where the limit is not above 0 in every resample: a share of it is no number.
    """
    values, groups = _checked(gains, clusters)
    most, _ = _checked(limits, clusters)
    _, index = np.unique(groups, return_inverse=True)
    totals = _resamples(np.stack([np.bincount(index, weights=one) for one in (values, most)], axis=1), resamples, seed)
    if (totals[:, 1] <= 0).any():
        raise StatisticsError("the limit is not clearly above 0, so that no share of it can be given")
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(totals[:, 0] / totals[:, 1], [tail, 1 - tail])
    return Interval(float(values.mean() / most.mean()), float(low), float(high), len(values), int(index.max()) + 1)


def cluster_error(differences: NDArray, images: NDArray) -> float:
    """Standard error of the mean, robust to questions about one image being alike; with one question an image it is
    scipy.stats.sem. Infinite for a single image."""
    _, index = np.unique(images, return_inverse=True)
    sums = np.bincount(index, weights=differences - differences.mean())
    count = len(sums)
    if count < 2:
        return float("inf")
    return float(np.sqrt(count / (count - 1) * (sums**2).sum()) / len(differences))


def _t_test(differences: NDArray, images: NDArray) -> float:
    """Two-sided p that the mean is 0, with as many degrees of freedom as images less one; 1.0 for a single image."""
    from scipy.stats import t

    mean, error, count = float(differences.mean()), cluster_error(differences, images), len(np.unique(images))
    if mean == 0 or count < 2:
        return 1.0
    return float(2 * t.sf(abs(mean) / error, count - 1)) if error else 0.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction for several tests: adjusted p-values, in the order given."""
    values = np.asarray(p_values, dtype=float)
    if values.size and not ((values >= 0) & (values <= 1)).all():
        raise StatisticsError("p-values must lie between 0 and 1")
    order = np.argsort(values, kind="stable")
    stepped = values[order] * np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
    return adjusted.tolist()


def corrected(found: Sequence[T]) -> list[T]:
    """The same dataclasses with `holm_p` set: Holm's correction over all that have a `mcnemar_p`."""
    adjusted = iter(holm([one.mcnemar_p for one in found if one.mcnemar_p is not None]))
    return [one if one.mcnemar_p is None else replace(one, holm_p=next(adjusted)) for one in found]


def told_apart(names: Iterable[str]) -> Iterator[str]:
    """Question ids, each once: stock tasks may give several questions one id, a later one gets its turn behind it."""
    turns: Counter[str] = Counter()
    for name in names:
        turns[name] += 1
        yield name if turns[name] == 1 else f"{name}#{turns[name]}"


def join(a: Mapping[str, float], b: Mapping[str, float]) -> tuple[list[str], NDArray[np.float64], NDArray[np.float64]]:
    """(ids in sorted order, scores in A, scores in B), matched by id. Raises StatisticsError if the ids differ."""
    if a.keys() != b.keys():
        only_a, only_b = sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())
        example, side = (only_a[0], "the first") if only_a else (only_b[0], "the second")
        raise StatisticsError(
            f"the results cover different questions: {len(a)} against {len(b)}, {len(only_a)} only in the first and "
            f"{len(only_b)} only in the second (for example {example!r}, only in {side}); evaluate both on one set"
        )
    ids = sorted(a)
    return ids, np.array([a[i] for i in ids], dtype=float), np.array([b[i] for i in ids], dtype=float)


def _checked(scores: ArrayLike, clusters: ArrayLike) -> tuple[NDArray[np.float64], NDArray]:
    values, groups = np.asarray(scores, dtype=float), np.asarray(clusters)
    if values.ndim != 1 or values.shape != groups.shape:
        raise StatisticsError(f"scores {values.shape} and clusters {groups.shape}: need one image id per score")
    if not len(values):
        raise StatisticsError("no scores: there is nothing to compare")
    if not np.isfinite(values).all():
        raise StatisticsError(f"{int((~np.isfinite(values)).sum())} of {len(values)} scores are not finite numbers")
    return values, groups


def _bootstrap(values: NDArray[np.float64], groups: NDArray, resamples: int, seed: int) -> tuple[float, float, int]:
    """(low, high, number of clusters) of the mean, from each cluster's sum and size."""
    _, index, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    totals = _resamples(np.stack([np.bincount(index, weights=values), sizes.astype(float)], axis=1), resamples, seed)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(totals[:, 0] / totals[:, 1], [tail, 1 - tail])
    return float(low), float(high), len(sizes)


def _resamples(parts: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """(resamples, columns): each resample's sums of the clusters' `parts`."""
    rng = np.random.default_rng(seed)
    block = max(1, BLOCK // len(parts))
    return np.concatenate([_resampled(parts, min(block, resamples - done), rng)
                           for done in range(0, resamples, block)])  # fmt: skip


def _resampled(parts: NDArray[np.float64], rows: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """The sums of `rows` resamples. A resample is a row that counts how often each cluster was drawn."""
    count = len(parts)
    drawn = rng.integers(count, size=(rows, count)) + np.arange(rows)[:, None] * count
    weights = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
    return weights @ parts


def _mcnemar(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    """Two-sided exact p: are wins and losses among the changed questions equally likely?"""
    from scipy.stats import binomtest

    if not (np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all()):
        return None
    wins, losses = int(((b == 1) & (a == 0)).sum()), int(((b == 0) & (a == 1)).sum())
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
