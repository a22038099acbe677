"""Selection: from the scores of an item's candidates to what is kept of it.

The best candidate is kept if it reaches a threshold, absolute or by rank; kinds of rows may be decided apart, question
families may have a quota, rows a weight. `select=random` keeps one at random. No truth is known here: a `Judge` that
knows it decides in place of all this (`oracle.py`).
"""

from __future__ import annotations

import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from sicog_exp.curation.consistency import choose, choose_randomly, lower_half, seeded_index
from sicog_exp.curation.filters import BROKEN_FORMAT
from sicog_exp.curation.items import (
    GROUPS,
    ROW_KINDS,
    CandidateScore,
    Decision,
    Examined,
    Group,
    Item,
    KeptRow,
    Response,
)
from sicog_exp.curation.scorers import Scores
from sicog_exp.curation.spool import Spool
from sicog_exp.prompts import STEPS, final_text
from sicog_exp.recipe import CurationConfig

NO_CANDIDATES = "no_candidates"
NO_VALID_CANDIDATE = "no_valid_candidate"
BELOW_THRESHOLD = "below_threshold"
NO_DIRECT_ANSWER = "no_direct_answer"
DIRECT_DISAGREEMENT = "direct_disagreement"
INVALID_CANDIDATE = "invalid_candidate"
UNUSED = "unused"
OVER_QUOTA = "over_quota"

TEMPLATE_WORDS = 2
"""First words of a question that name its form, where its source names no family: "how many", "where is"."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A scored item before any threshold. `best` and `chain` are places in `entry.valid`: of the best candidate, and of
    the best one in steps where kinds of rows are decided separately."""

    entry: Examined
    scores: Scores
    best: int | None
    chain: int | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's choice; `reason` says why it is not kept."""

    chosen: Response | None
    reason: str | None


class Judge(Protocol):
    """Chooses in place of scores and thresholds."""

    def __call__(self, entry: Examined, scores: Scores) -> Verdict: ...


@dataclass(frozen=True, slots=True)
class Cut:
    """The lowest (score, tie-break) that is kept; a tie-break of 0 keeps all of that score."""

    score: float
    tie: int = 0

    def admits(self, score: float, id: str) -> bool:
        if score != self.score or not self.tie:
            return score >= self.score
        return _tie(id) >= self.tie


def _tie(id: str) -> int:
    """Orders items of equal score, in [1, 2^62]: by their ids alone, so in every order of the rows."""
    return 1 + seeded_index("tie", id, 1 << 62)


@dataclass(frozen=True, slots=True)
class _Rules:
    """What decides beside the scores: cuts by group, or by row kind of the groups in `apart`, whose kinds of rows are
    decided separately."""

    config: CurationConfig
    apart: frozenset[Group]
    cuts: Mapping[str, Cut]


def select(entries: Iterable[tuple[Examined, Scores]], config: CurationConfig,
           folder: Path | None = None) -> Iterator[Decision]:  # fmt: skip
    """One decision an item, in order. A threshold by rank and a quota need all scores first: then the items wait in a
    file in `folder`, 16 bytes each in memory."""
    apart = frozenset(group for group in GROUPS if row_thresholds(config, group))
    drafts: Iterable[Draft] = (_draft(entry, scores, config, apart) for entry, scores in entries)
    by_rank = config.select == "best" and config.threshold_by == "quantile"
    has_quota = config.select == "best" and config.family_quota < 1
    with ExitStack() as stack:
        if by_rank or has_quota:
            drafts = stack.enter_context(Spool(drafts, folder))
        rules = _Rules(config, apart, _quantile_cuts(drafts, config) if by_rank else _absolute_cuts(config))
        quotas = _quotas((_decide(draft, rules) for draft in drafts), config.family_quota) if has_quota else {}
        for draft in drafts:
            decision = _decide(draft, rules)
            yield _within_quota(decision, quotas) if quotas else decision


def judge(entries: Iterable[tuple[Examined, Scores]], decide: Judge) -> Iterator[Decision]:
    """One decision an item, by a judge; thresholds, quotas and weights play no part."""
    for entry, scores in entries:
        verdict = decide(entry, scores)
        at = next((i for i, (c, _) in enumerate(entry.valid) if c is verdict.chosen), None)
        score = scores.values[at] if at is not None else None
        rejected = _rejected(entry, scores.values, at) if at is not None else None
        yield Decision(entry.item, verdict.chosen, score, verdict.reason is None, verdict.reason, rejected,
                       _table(entry, scores))  # fmt: skip


def missing_reason(entry: Examined) -> str:
    """Why an item without a valid candidate has none."""
    return NO_VALID_CANDIDATE if entry.item.candidates or entry.item.invalid else NO_CANDIDATES


def best_of(entry: Examined, scores: Scores, places: Sequence[int] | None = None) -> int | None:
    """The place in `entry.valid` of the best candidate, or of the best one among `places`; None where there is none."""
    if places is None:
        kinds, evidence = [c.kind for c, _ in entry.valid], [p.evidence for _, p in entry.valid]
        return choose(scores.values, kinds, evidence, scores.support) if kinds else None
    valid = tuple(entry.valid[i] for i in places)
    support = [scores.support[i] for i in places] if scores.support else None
    at = best_of(replace(entry, valid=valid), Scores([scores.values[i] for i in places], support=support))
    return None if at is None else places[at]


def _draft(entry: Examined, scores: Scores, config: CurationConfig, apart: frozenset[Group]) -> Draft:
    if not entry.valid:
        return Draft(entry, scores, None)
    if config.select == "random":
        return Draft(entry, scores, choose_randomly([c.kind for c, _ in entry.valid], entry.item.id))
    best = best_of(entry, scores)
    if best is None or not apart or entry.item.group not in apart:
        return Draft(entry, scores, best)
    chains = [i for i, (c, _) in enumerate(entry.valid) if c.kind in STEPS]
    return Draft(entry, scores, best, best if best in chains else best_of(entry, scores, chains))


# Thresholds.


def threshold_of(config: CurationConfig, group: Group) -> float:
    return config.caption_threshold if group == "caption" else config.reasoning_threshold


def row_thresholds(config: CurationConfig, group: Group) -> dict[str, float]:
    """Row kind -> its threshold where a group's kinds of rows are decided separately; empty where they are not."""
    own = {"cod": config.cod_threshold, "dd": config.dd_threshold,
           "cot": config.cot_threshold, "direct": config.direct_threshold}  # fmt: skip
    given = {kind: own[kind] for kind in ROW_KINDS[group]}
    if all(value is None for value in given.values()):
        return {}
    return {kind: threshold_of(config, group) if value is None else value for kind, value in given.items()}


def _thresholds(config: CurationConfig) -> dict[str, float]:
    """Group -> threshold, or of a group whose kinds are decided separately, row kind -> threshold."""
    by_group = (row_thresholds(config, group) or {group: threshold_of(config, group)} for group in GROUPS)
    return {unit: value for thresholds in by_group for unit, value in thresholds.items()}


def _absolute_cuts(config: CurationConfig) -> dict[str, Cut]:
    return {unit: Cut(threshold) for unit, threshold in _thresholds(config).items()}


def _quantile_cuts(drafts: Iterable[Draft], config: CurationConfig) -> dict[str, Cut]:
    """Each threshold as a rank among the items' scores: 0.4 lets the best 60% pass, to the item."""
    thresholds = _thresholds(config)
    ranks: dict[str, _Ranks] = defaultdict(_Ranks)
    for draft in drafts:
        group, values = draft.entry.item.group, draft.scores.values
        chain, plain = ROW_KINDS[group]
        units = (chain, plain) if chain in thresholds else (group, group)
        if draft.chain is not None:
            ranks[units[0]].add(values[draft.chain], draft.entry.item.id)
        if draft.best is not None:
            ranks[units[1]].add(values[draft.best], draft.entry.item.id)
    return {unit: found.cut(len(found) - math.floor(round(thresholds[unit] * len(found), 9)))
            for unit, found in ranks.items()}  # fmt: skip


class _Ranks:
    """Scores with their tie-breaks, 16 bytes an item."""

    def __init__(self) -> None:
        self._scores, self._ties = array("d"), array("q")

    def __len__(self) -> int:
        return len(self._scores)

    def add(self, score: float, id: str) -> None:
        self._scores.append(score)
        self._ties.append(_tie(id))

    def cut(self, count: int) -> Cut:
        """The cut that exactly the `count` best reach."""
        if count <= 0:
            return Cut(math.inf)
        scores, ties = np.frombuffer(self._scores), np.frombuffer(self._ties, dtype=np.int64)
        last = np.lexsort((ties, scores))[-count]
        return Cut(float(scores[last]), int(ties[last]))


# Decisions.


def _decide(draft: Draft, rules: _Rules) -> Decision:
    entry, scores, table = draft.entry, draft.scores.values, _table(draft.entry, draft.scores)
    if draft.best is None:
        return Decision(entry.item, None, None, False, missing_reason(entry), None, table)
    at, reason, rows = _choice(draft, draft.best, rules)
    chosen, rejected = entry.valid[at][0], _rejected(entry, scores, at)
    weight, most = None, rules.config.disagreement_weight
    if most > 1 and rules.config.select == "best":
        weight = _weight(entry, at, scores[at], most)
    return Decision(entry.item, chosen, scores[at], reason is None, reason, rejected, table, rows, weight)


def _choice(draft: Draft, best: int, rules: _Rules) -> tuple[int, str | None, tuple[KeptRow, ...] | None]:
    """(place of the chosen candidate, why nothing is kept, the kept rows where they are decided separately)."""
    if rules.config.select == "random":
        return best, None, None
    group = draft.entry.item.group
    if group in rules.apart:
        return _by_row(draft, best, rules.cuts, rules.config)
    return best, _why_not(draft.entry, best, draft.scores.values[best], rules.cuts[group], rules.config), None


def _by_row(draft: Draft, best: int, cuts: Mapping[str, Cut],
            config: CurationConfig) -> tuple[int, str | None, tuple[KeptRow, ...]]:  # fmt: skip
    """As `_choice`: the best chain, and the best final text.

    Answers that contradict each other are never both kept: the better score wins.
    """
    entry, scores, chain = draft.entry, draft.scores.values, draft.chain
    in_steps, plain = ROW_KINDS[entry.item.group]
    final = final_text(entry.valid[best][0].kind, entry.valid[best][0].text)  # none of broken steps that were let pass
    reason = _why_not(entry, best, scores[best], cuts[plain], config) or (None if final else BROKEN_FORMAT)
    rows = [KeptRow(plain, final, scores[best])] if final and not reason else []
    if chain is None or _why_not(entry, chain, scores[chain], cuts[in_steps], config):
        return best, reason, tuple(rows)
    said, of_chain = entry.valid[best][1].compared, entry.valid[chain]
    if rows and entry.item.group == "reasoning" and of_chain[1].compared != said:
        return best, None, tuple(rows)
    return chain, None, (KeptRow(in_steps, of_chain[0].text, scores[chain]), *rows)


def _why_not(entry: Examined, index: int, score: float, cut: Cut, config: CurationConfig) -> str | None:
    """The rule that the candidate does not meet, or None."""
    if not cut.admits(score, entry.item.id):
        return BELOW_THRESHOLD
    if entry.item.group == "caption" or not config.require_direct_agreement:
        return None
    votes = Counter(p.compared for c, p in entry.valid if c.kind == "direct")
    if not votes:
        return NO_DIRECT_ANSWER
    return None if votes[entry.valid[index][1].compared] == max(votes.values()) else DIRECT_DISAGREEMENT


def _weight(entry: Examined, index: int, score: float, most: float) -> float:
    """Between 1 and `most`: high where the vote is sure and the direct answers disagree with it."""
    direct = [p.compared for c, p in entry.valid if c.kind == "direct"]
    if entry.item.group == "caption" or not direct:
        return 1.0
    against = 1 - direct.count(entry.valid[index][1].compared) / len(direct)
    return round(1 + (most - 1) * min(max(score, 0.0), 1.0) * against, 6)


def _table(entry: Examined, scores: Scores) -> tuple[CandidateScore, ...]:
    """Every candidate by position, those set aside and those that could not be read included."""
    score_at = {c.position: score for (c, _), score in zip(entry.valid, scores.values, strict=True)}
    kinds: dict[int, str | None] = {c.position: c.kind for c in entry.item.candidates}
    kinds.update(dict.fromkeys(entry.item.invalid))
    parts = _parts(entry, scores.parts) if scores.parts else {}
    return tuple([CandidateScore(at, kinds[at], score_at.get(at), entry.reasons.get(at), parts.get(at))
                  for at in sorted(kinds)])  # fmt: skip


def _parts(entry: Examined, parts: Mapping[str, Sequence[float]]) -> dict[int, dict[str, float]]:
    """Position -> the single scores of its blend."""
    return {c.position: {name: values[i] for name, values in parts.items()} for i, (c, _) in enumerate(entry.valid)}


def _rejected(entry: Examined, scores: Sequence[float], index: int) -> Response | None:
    """A whole response of the lower half that says something else than the chosen one, drawn by the sample id."""
    said = entry.valid[index][1].compared
    lower = lower_half(scores, [c.text for c, _ in entry.valid])
    pool = [entry.valid[i][0] for i in lower if entry.valid[i][1].compared != said]
    return pool[seeded_index("rejected", entry.item.id, len(pool))] if pool else None


# Quotas.


def family_of(item: Item) -> str:
    """A question's family: the one that its source names, else its form, the first words. "" for a caption."""
    if item.group == "caption":
        return ""
    return item.family or " ".join(item.prompt.lower().split()[:TEMPLATE_WORDS])


def _quotas(decisions: Iterable[Decision], share: float) -> dict[str, Cut]:
    """Family -> the score from which its kept items fit into `share` of all its items, rounded up."""
    items: Counter[str] = Counter()
    kept: dict[str, _Ranks] = defaultdict(_Ranks)
    for decision in decisions:
        if decision.item.group == "reasoning" and decision.score is not None:
            family = family_of(decision.item)
            items[family] += 1
            if decision.kept:
                kept[family].add(decision.score, decision.item.id)
    allowed = {family: math.ceil(round(share * count, 9)) for family, count in items.items()}
    return {family: found.cut(allowed[family]) for family, found in kept.items() if len(found) > allowed[family]}


def _within_quota(decision: Decision, quotas: Mapping[str, Cut]) -> Decision:
    quota = quotas.get(family_of(decision.item))
    if not decision.kept or decision.score is None or not quota or quota.admits(decision.score, decision.item.id):
        return decision
    return dropped(decision, OVER_QUOTA)


def dropped(decision: Decision, reason: str) -> Decision:
    """A kept item that a later rule leaves out."""
    return replace(decision, kept=False, reason=reason, rows=None if decision.rows is None else ())
