"""Does a higher score mean a better row? One finished pool under every threshold, nothing sampled or embedded again.

All scores of all candidates are kept, so the threshold can be moved afterwards: how much would be kept, how right it
would be where the truth is known, how varied and how long, and from which question families it would come. Where no
truth is known, two agreements stand in for it: of the answer formats with each other, of two encoders. They are
proxies: a model can agree with itself and be wrong.

Like `diagnosis`, this reads finished artifacts; nothing here chooses, keeps or trains on a candidate.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from sicog_exp.curation.consistency import mean_similarity_scores, seeded_index
from sicog_exp.curation.diagnosis import QUALITY_NAMES, Choice, Truth, choice_of, final_of
from sicog_exp.curation.diversity import ORDER, distinct_share, family_entropy, said
from sicog_exp.curation.files import ItemsById
from sicog_exp.curation.filters import DuplicateFilter
from sicog_exp.curation.items import GROUPS, Group, Item, Response, group_of
from sicog_exp.curation.selection import BELOW_THRESHOLD, DIRECT_DISAGREEMENT, NO_DIRECT_ANSWER
from sicog_exp.curation.similarity import Encoder, lexical_similarity, words_of
from sicog_exp.prompts import normalize_answer
from sicog_exp.recipe import UPPER_BOUNDS
from sicog_exp.records import read_jsonl
from sicog_exp.row_index import RowIndex

Bounds = Callable[[Sequence[float], Sequence[str]], tuple[float, float]]
"""(low, high) of a mean, from values and the images they are about. The statistics stand in a room above this one."""

LEVELS = 16
"""Thresholds of a sweep, today's not counted: every score that occurs, or so many spread evenly over them."""
BINS = 10
"""Groups of items, alike in score, whose quality is compared with it."""
SAMPLE = 200
"""Items whose candidates a second encoder compares."""
DRAWN = "drawn.jsonl"
"""The file that keeps the texts of these items with the run, for a machine without its step store."""
COMPARABLE = 3
"""Candidates from which encoders can disagree: of two, each is as alike to the other as the other to it."""


@dataclass(frozen=True, slots=True)
class Judged:
    """One item's chosen candidate. What needs its truth or its other candidates is None where these are unknown."""

    row: Mapping[str, Any]
    """Its row of `curated.jsonl`."""
    choice: Choice
    candidates: int
    """Candidates that took part."""
    formats: float | None
    """Agreement with the other format, see `formats_agreement`."""
    eligible: bool | None
    """Whether it meets the rules beside the threshold and the duplicate filter."""
    place: int
    """In the order, drawn from ids, in which texts are measured."""
    words: tuple[str, ...]
    """Of the response without the headers of its steps."""
    answer: str

    @property
    def image(self) -> str:
        return self.row["image"] or self.row["id"]

    @property
    def score(self) -> float:
        """What the threshold is held against; a ground truth, which nobody scored, is in no pool."""
        return float(self.row["score"])


@dataclass(frozen=True)
class Drawn:
    """The compared texts of one item and what curation scored them."""

    id: str
    group: Group
    texts: tuple[str, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Pool:
    """One group of a finished pool, in the order of its file.

    `threshold` and `near_duplicate` are None where nothing was asked of scores (a random choice), or of duplicates.
    `encoder` is "" where answers are compared as normalised words.
    """

    group: Group
    encoder: str
    items: int
    judged: tuple[Judged, ...]
    threshold: float | None
    near_duplicate: float | None
    drawn: tuple[Drawn, ...]

    def kept_at(self, threshold: float) -> list[Judged]:
        """What this threshold would keep, all other rules being as they were."""
        passed = [j for j in self.judged if j.eligible and j.score >= threshold]
        if self.near_duplicate is None:
            return passed
        seen = DuplicateFilter(self.near_duplicate)
        return [j for j in passed if not seen.reason(j.row["prompt"], j.row["image"], j.row["chosen"])]


@dataclass(frozen=True)
class Precision:
    """Mean quality (diagnosis.py) of the `n` items whose truth is known, with its interval from resampling images."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Level:
    """What one threshold would keep.

    `random`: expected quality of a random candidate of the same items; `easiness`: what is expected of them from their
    question families alone, see `Family`. `formats`: mean agreement of the formats. Texts as in diversity.py.
    """

    threshold: float
    kept: int
    keep_rate: float
    precision: Precision | None
    random: float | None
    easiness: float | None
    formats: float | None
    distinct_2: float | None
    answer_entropy: float | None
    mean_words: float | None


@dataclass(frozen=True)
class Family:
    """One question family. `easiness`: expected quality of a random candidate of all its items, before any threshold.

    `kept`, `shares` (of all that is kept) and `precision` have an entry for every level of the sweep; `today` is the
    precision at today's threshold.
    """

    name: str
    items: int
    share: float
    easiness: float | None
    kept: tuple[int, ...]
    shares: tuple[float | None, ...]
    precision: tuple[float | None, ...]
    today: Precision | None


@dataclass(frozen=True)
class Bin:
    """Items of nearly the same score: is their quality the higher, the higher it is?"""

    score: float
    precision: Precision


@dataclass(frozen=True)
class Split:
    """Quality of the items of which something holds, and of the others: what a proxy is worth where truth is known."""

    holds: Precision | None
    fails: Precision | None


@dataclass(frozen=True)
class EncoderAgreement:
    """Two encoders on the same candidates. `items` were compared; in `decided` of them the first one's scores differ.

    `same`: share of the decided items of which both choose the same text. `correlation`: Spearman's, of both encoders'
    best scores over items; None where one of them is constant.
    """

    first: str
    second: str
    items: int
    decided: int
    same: float | None
    correlation: float | None


@dataclass(frozen=True)
class Calibration:
    """One group of one pool under every threshold.

    `kept` is what the run kept, by all its rules; `random` the expected quality of a random candidate of any item;
    `formats` splits items by whether the formats agree, `lone` those that today's threshold keeps by whether a single
    candidate took part, which nothing confirms; `lone_kept` counts these.
    """

    group: Group
    quality_name: str
    encoder: str
    items: int
    choices: int
    known: int
    kept: int
    threshold: float | None
    random: float | None
    levels: tuple[Level, ...]
    families: tuple[Family, ...]
    bins: tuple[Bin, ...]
    formats: Split
    lone: Split
    lone_kept: int
    encoders: EncoderAgreement | None = None

    @property
    def today(self) -> int | None:
        """The number of the level that stands for the run: today's threshold, or the one that keeps everything."""
        if self.threshold is None:
            return 0 if self.levels else None
        return next(i for i, level in enumerate(self.levels) if level.threshold == self.threshold)


# Reading.


def read_pools(curated: Path, truths: Mapping[str, Truth], candidates: Path | None = None) -> dict[Group, Pool]:
    """The groups of a curation folder. Without `candidates`, the file that was curated, what needs the candidates that
    were not chosen stays unknown. No group where the truth chose, since no threshold did. Raises CurationError for a
    file that cannot be read. Of an item, its row of `curated.jsonl` and numbers are held, not its other candidates."""
    summary = json.loads((curated / "summary.json").read_text(encoding="utf-8"))
    if summary["config"]["select"] in UPPER_BOUNDS:
        return {}
    items, scores = ItemsById(candidates) if candidates else None, RowIndex([curated / "scores.jsonl"])
    rows: dict[Group, list[dict[str, Any]]] = {group: [] for group in GROUPS}
    for row in read_jsonl(curated / "curated.jsonl"):
        rows[group_of(row["kind"])].append(row)
    return {group: _pool(group, rows[group], items, scores, truths, summary) for group in GROUPS if rows[group]}


def _scores(index: RowIndex, id: str) -> dict[int, float]:
    """Position -> score, of an item's candidates that took part."""
    return {row["position"]: row["score"] for row in index.rows(id) if row["score"] is not None}


def _pool(group: Group, rows: Sequence[dict[str, Any]], items: ItemsById | None, scores: RowIndex,
          truths: Mapping[str, Truth], summary: Mapping[str, Any]) -> Pool:  # fmt: skip
    config, asked = summary["config"], summary["config"]["select"] == "best"
    chosen = [row for row in rows if row["chosen"] is not None and row["score"] is not None]
    judged = tuple(_judged(group, row, items.get(row["id"]) if items else None, _scores(scores, row["id"]),
                           truths.get(row["id"]), config) for row in chosen)  # fmt: skip
    # Another encoder's scores are comparable with those of an encoder alone.
    encoded = config[f"{group}_scorer"] == "similarity" and not config.get(f"{group}_blend")
    return Pool(
        group, summary["encoder"] if encoded else "", len(rows), judged,
        threshold=float(summary["thresholds"][group]) if asked else None,
        near_duplicate=config["near_duplicate"] if asked and config["dedup"] else None,
        drawn=_drawn(group, judged, items, scores) if encoded and items else (),
    )  # fmt: skip


def _judged(group: Group, row: Mapping[str, Any], item: Item | None, scores: Mapping[int, float], truth: Truth | None,
            config: Mapping[str, Any]) -> Judged:  # fmt: skip
    kind, text = row["chosen_kind"], row["chosen"]
    others = None if item is None else [c for c in item.candidates if c.position in scores]
    texts = [{"kind": kind, "text": text}] if others is None else [{"kind": c.kind, "text": c.text} for c in others]
    choice = choice_of({**row, "kind": group}, texts, truth)
    return Judged(
        row=row,
        choice=replace(choice, random=None, unanimous=None) if others is None else choice,
        candidates=len(scores),
        formats=None if others is None else formats_agreement(group, row, others),
        eligible=_eligible(group, row, others, config),
        place=seeded_index(ORDER, row["id"], 2**48),
        words=tuple(map(sys.intern, words_of(said(row)))),  # each word once, however many items say it
        answer=normalize_answer(final_of(kind, text)),
    )


def formats_agreement(group: Group, row: Mapping[str, Any], candidates: Sequence[Response]) -> float | None:
    """Does the other format (chain for direct, step by step for plain) say the same? In [0, 1]; None without it.

    Answers: 1 if the chosen answer is a most frequent one of the other format's. Captions: mean lexical similarity of
    the chosen final description to the other format's.
    """
    others = [final_of(c.kind, c.text) for c in candidates if c.kind != row["chosen_kind"]]
    if not others:
        return None
    final = final_of(row["chosen_kind"], row["chosen"])
    if group == "caption":
        return fmean(lexical_similarity(final, other) for other in others)
    return float(_is_most_frequent(normalize_answer(final), map(normalize_answer, others)))


def _is_most_frequent(answer: str, answers: Iterable[str]) -> bool:
    votes = Counter(answers)
    return bool(votes) and votes[answer] == max(votes.values())


def _eligible(group: Group, row: Mapping[str, Any], others: Sequence[Response] | None,
              config: Mapping[str, Any]) -> bool | None:  # fmt: skip
    """The rule of direct agreement was asked of no item below the threshold: there its candidates must be at hand."""
    if group == "caption" or not config["require_direct_agreement"] or config["select"] != "best":
        return True
    if others is None:
        return None if row["reason"] == BELOW_THRESHOLD else row["reason"] not in (NO_DIRECT_ANSWER,
                                                                                   DIRECT_DISAGREEMENT)  # fmt: skip
    direct = (normalize_answer(final_of(c.kind, c.text)) for c in others if c.kind == "direct")
    return _is_most_frequent(normalize_answer(final_of(row["chosen_kind"], row["chosen"])), direct)


def _drawn(group: Group, judged: Sequence[Judged], items: ItemsById, scores: RowIndex) -> tuple[Drawn, ...]:
    """Items with candidates enough for encoders to disagree on, drawn by their ids."""
    many = sorted((j for j in judged if j.row["id"] in items and j.candidates >= COMPARABLE), key=lambda j: j.place)
    found = [(items.get(j.row["id"]), _scores(scores, j.row["id"])) for j in many[:SAMPLE]]
    return tuple(_texts_of(group, item, own) for item, own in found if item is not None)


def _texts_of(group: Group, item: Item, scores: Mapping[int, float]) -> Drawn:
    valid = [c for c in item.candidates if c.position in scores]
    texts = tuple(final_of(c.kind, c.text) for c in valid)
    return Drawn(item.id, group, texts, tuple(scores[c.position] for c in valid))


# The sweep.


def calibrate(pool: Pool, bounds: Bounds) -> Calibration:
    """A pool under every threshold; intervals come from `bounds`."""
    thresholds = thresholds_of(pool)
    kept = [pool.kept_at(threshold) for threshold in thresholds]
    judged, easiness = pool.judged, _easiness(pool.judged)
    now = kept[thresholds.index(pool.threshold)] if pool.threshold is not None else list(judged)
    families = sorted({j.choice.family for j in judged if j.choice.family})
    return Calibration(
        group=pool.group,
        quality_name=QUALITY_NAMES[pool.group],
        encoder=pool.encoder,
        items=pool.items,
        choices=len(judged),
        known=sum(j.choice.quality is not None for j in judged),
        kept=sum(j.choice.kept for j in judged),
        threshold=pool.threshold,
        random=_mean(j.choice.random for j in judged),
        levels=tuple(_level(pool, t, found, easiness, bounds) for t, found in zip(thresholds, kept, strict=True)),
        families=tuple(_family(name, judged, kept, now, easiness.get(name), bounds) for name in families),
        bins=_bins(judged, bounds),
        formats=_by_formats(pool, bounds),
        lone=_split(now, [j.candidates == 1 for j in now], bounds),
        lone_kept=sum(j.candidates == 1 for j in now),
    )


def thresholds_of(pool: Pool) -> list[float]:
    """Today's threshold and the scores that occur, spread evenly over them where they are many, rounded down to four
    decimals (as a recipe takes them). Only from today's on where it is not known what a lower one would keep."""
    scores = sorted({j.score for j in pool.judged})
    if len(scores) > LEVELS:
        scores = [scores[i * (len(scores) - 1) // (LEVELS - 1)] for i in range(LEVELS)]
    thresholds = {math.floor(score * 1e4) / 1e4 for score in scores}
    if pool.threshold is not None:
        thresholds.add(pool.threshold)
        if any(j.eligible is None for j in pool.judged):
            thresholds = {t for t in thresholds if t >= pool.threshold}
    return sorted(thresholds)


def _level(pool: Pool, threshold: float, kept: Sequence[Judged], easiness: Mapping[str, float],
           bounds: Bounds) -> Level:  # fmt: skip
    words = [j.words for j in sorted(kept, key=lambda j: j.place)]
    known = [j for j in kept if j.choice.random is not None]
    answers = ((j.choice.family, j.answer) for j in kept)
    return Level(
        threshold=threshold,
        kept=len(kept),
        keep_rate=len(kept) / pool.items,
        precision=precision_of(kept, bounds),
        random=_mean(j.choice.random for j in known),
        easiness=_mean(easiness[j.choice.family] for j in known),
        formats=_mean(j.formats for j in kept),
        distinct_2=distinct_share(pair for text in words for pair in pairwise(text)),
        answer_entropy=family_entropy(answers) if pool.group == "reasoning" else None,
        mean_words=_mean(float(len(text)) for text in words),
    )


def precision_of(items: Iterable[Judged], bounds: Bounds) -> Precision | None:
    """Of the items whose truth is known; None without any."""
    known = [(j.choice.quality.precision, j.image) for j in items if j.choice.quality]
    if not known:
        return None
    values, images = zip(*known, strict=True)
    return Precision(fmean(values), *bounds(values, images), len(values))


def _easiness(judged: Iterable[Judged]) -> dict[str, float]:
    """Family -> expected quality of a random candidate of its items."""
    families: dict[str, list[float]] = defaultdict(list)
    for j in judged:
        if j.choice.random is not None:
            families[j.choice.family].append(j.choice.random)
    return {family: fmean(values) for family, values in families.items()}


def _family(name: str, judged: Sequence[Judged], kept: Sequence[Sequence[Judged]], now: Sequence[Judged],
            easiness: float | None, bounds: Bounds) -> Family:  # fmt: skip
    own = [[j for j in level if j.choice.family == name] for level in kept]
    totals = [sum(bool(j.choice.family) for j in level) for level in kept]
    count = sum(j.choice.family == name for j in judged)
    share = count / sum(bool(j.choice.family) for j in judged)
    return Family(
        name, count, share, easiness, kept=tuple(map(len, own)),
        shares=tuple(len(found) / total if total else None for found, total in zip(own, totals, strict=True)),
        precision=tuple(_mean(j.choice.quality.precision for j in found if j.choice.quality) for found in own),
        today=precision_of((j for j in now if j.choice.family == name), bounds),
    )  # fmt: skip


def _bins(judged: Sequence[Judged], bounds: Bounds) -> tuple[Bin, ...]:
    """Items of known truth in at most BINS groups of like score; items of one score stay together."""
    known = sorted((j for j in judged if j.choice.quality), key=lambda j: j.score)
    groups: list[list[Judged]] = []
    for _, same in groupby(known, key=lambda j: j.score):
        if not groups or len(groups[-1]) * BINS >= len(known):
            groups.append([])
        groups[-1].extend(same)
    found = [(fmean(j.score for j in group), precision_of(group, bounds)) for group in groups]
    return tuple(Bin(score, precision) for score, precision in found if precision)


def _by_formats(pool: Pool, bounds: Bounds) -> Split:
    """Answers agree or do not; captions agree more or less than half of them do."""
    known = [(j, j.formats) for j in pool.judged if j.formats is not None]
    if not known:
        return Split(None, None)
    limit = 1.0 if pool.group == "reasoning" else median(value for _, value in known)
    return _split([j for j, _ in known], [value >= limit for _, value in known], bounds)


def _split(items: Sequence[Judged], holds: Sequence[bool], bounds: Bounds) -> Split:
    parts = [[j for j, held in zip(items, holds, strict=True) if held == wanted] for wanted in (True, False)]
    return Split(*(precision_of(part, bounds) for part in parts))


# Two encoders.


def encoder_agreement(drawn: Sequence[Drawn], first: str, second: Encoder, include_self: bool) -> EncoderAgreement:
    """The scores of curation, which `first` gave, against those of another encoder."""
    best: list[tuple[float, float]] = []
    same: list[bool] = []
    for item, matrix in zip(drawn, second.group_similarities([d.texts for d in drawn]), strict=True):
        scores = mean_similarity_scores(matrix, include_self)
        best.append((max(item.scores), max(scores)))
        if len(set(item.scores)) > 1:
            same.append(bool(_best(item.texts, item.scores) & _best(item.texts, scores)))
    return EncoderAgreement(first, second.name, len(drawn), len(same), _mean(map(float, same)), _spearman(best))


def _best(texts: Sequence[str], scores: Sequence[float]) -> set[str]:
    return {" ".join(text.split()) for text, score in zip(texts, scores, strict=True) if score == max(scores)}


def _spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    from scipy.stats import spearmanr

    a, b = np.array(pairs, dtype=float).reshape(-1, 2).T
    if len(np.unique(a)) < 2 or len(np.unique(b)) < 2:
        return None
    return float(spearmanr(a, b).statistic)


# What is said about it.


@dataclass(frozen=True)
class Gain:
    """Where the quality of what is kept comes from, beyond a random candidate of any item; the three parts add up.

    `choosing`: the chosen candidates against random ones of the same items; `families`: those items are of easier
    question families; `items`: they are easier within their families.
    """

    total: float
    choosing: float
    families: float
    items: float


def gain_of(found: Calibration, level: Level) -> Gain | None:
    """None where truth or candidates are not known."""
    if level.precision is None or level.random is None or level.easiness is None or found.random is None:
        return None
    precision = level.precision.mean
    return Gain(precision - found.random, precision - level.random, level.easiness - found.random,
                level.random - level.easiness)  # fmt: skip


def metrics(found: Mapping[Group, Calibration]) -> dict[str, float]:
    """`curation/<group>/<name>` at today's threshold, the same names in every generation; what is unknown is left out.

    `formats_agreement`; `gain_choosing`, `gain_families` and `gain_items` as in `Gain`.
    """
    named: dict[str, float | None] = {}
    for group, one in found.items():
        if one.today is None:
            continue
        level = one.levels[one.today]
        named[f"curation/{group}/formats_agreement"] = level.formats
        gain = gain_of(one, level)
        if gain:
            parts = ("choosing", "families", "items")
            named |= {f"curation/{group}/gain_{name}": getattr(gain, name) for name in parts}
    return {name: value for name, value in named.items() if value is not None}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
