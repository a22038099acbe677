"""Curation item by item: filter the candidates, score them, choose one, decide whether to keep it.

Everything is kept with its score or its reason, so that thresholds can be swept afterwards without sampling again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from sicog_exp.curation import CurationError
from sicog_exp.curation.consistency import (
    agreement_scores,
    choose,
    choose_randomly,
    lower_half,
    mean_similarity_scores,
    seeded_index,
)
from sicog_exp.curation.filters import DuplicateFilter, Parsed, parse
from sicog_exp.curation.similarity import Encoder, batched, build_encoder
from sicog_exp.prompts import CAPTION_KINDS, REASONING_KINDS, Kind
from sicog_exp.recipe import CurationConfig

Group = Literal["caption", "reasoning"]
GROUPS: tuple[Group, ...] = get_args(Group)
ITEM_KINDS: tuple[str, ...] = (*GROUPS, *CAPTION_KINDS, *REASONING_KINDS)

NO_CANDIDATES = "no_candidates"
NO_VALID_CANDIDATE = "no_valid_candidate"
BELOW_THRESHOLD = "below_threshold"
NO_DIRECT_ANSWER = "no_direct_answer"
DIRECT_DISAGREEMENT = "direct_disagreement"
INVALID_CANDIDATE = "invalid_candidate"
UNUSED = "unused"

ITEMS_PER_BATCH = 1024
"""Items scored together, so that an embedding model sees large batches."""


def group_of(kind: str) -> Group:
    """`caption` or `reasoning`, which share a rule. Raises CurationError for another kind."""
    if kind not in ITEM_KINDS:
        raise CurationError(f"unknown kind {kind!r}; use one of {', '.join(ITEM_KINDS)}")
    return "caption" if kind == "caption" or kind in CAPTION_KINDS else "reasoning"


@dataclass(frozen=True, slots=True)
class Response:
    """One candidate of an item. `position` names it within the item and in all that is written about it."""

    text: str
    kind: Kind
    position: int
    finish_reason: str | None = "stop"


@dataclass(frozen=True, slots=True)
class Item:
    """One image to caption or one question to answer, with any number of candidates, none included.

    `kind` is `caption` or `reasoning`, or one of cod, dd, cot, direct. `invalid` holds the positions of candidates
    that could not be read; they are counted and take no part.
    """

    id: str
    kind: str
    prompt: str
    image: str | None
    candidates: tuple[Response, ...]
    invalid: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        kinds = CAPTION_KINDS if self.group == "caption" else REASONING_KINDS
        for candidate in self.candidates:
            if candidate.kind not in kinds:
                raise CurationError(f"item {self.id!r}, candidate {candidate.position}: kind {candidate.kind!r} in a "
                                    f"{self.group} item; use {' or '.join(kinds)}")  # fmt: skip

    @property
    def group(self) -> Group:
        return group_of(self.kind)


@dataclass(frozen=True, slots=True)
class CandidateScore:
    """A candidate's score, or the reason why it has none."""

    position: int
    kind: str | None
    score: float | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class Decision:
    """What curation made of one item.

    `chosen` and `rejected` are whole responses, steps included; `score` is the chosen one's. `reason` says why an item
    is not kept. `rejected` is None where every candidate of the lower half says the same as the chosen one.
    """

    item: Item
    chosen: Response | None
    score: float | None
    kept: bool
    reason: str | None
    rejected: Response | None
    candidates: tuple[CandidateScore, ...]


@dataclass(frozen=True, slots=True)
class _Examined:
    """An item whose candidates are parsed; `valid` are those that take part, with what was parsed from them."""

    item: Item
    valid: tuple[tuple[Response, Parsed], ...]
    reasons: dict[int, str]


def curate(items: Iterable[Item], config: CurationConfig, encoder: Encoder | None = None) -> Iterator[Decision]:
    """One decision per item, in order, as a stream.

    Memory grows only with what the duplicate filter remembers and with the ids. Raises CurationError for an encoder
    that cannot be used and for an id that comes twice.
    """
    encoder = encoder or build_encoder(config.encoder)
    return _stream(items, config, encoder)


def _stream(items: Iterable[Item], config: CurationConfig, encoder: Encoder) -> Iterator[Decision]:
    duplicates = DuplicateFilter(config.near_duplicate) if config.dedup and config.select == "best" else None
    seen: set[str] = set()
    for batch in batched(items, ITEMS_PER_BATCH):
        examined = [_examine(item, config) for item in batch]
        for entry, scores in zip(examined, _scores(examined, config, encoder), strict=True):
            if entry.item.id in seen:
                raise CurationError(f"id {entry.item.id!r} comes twice; give every item an id of its own")
            seen.add(entry.item.id)
            yield _without_duplicates(_decide(entry, scores, config), duplicates)


def _examine(item: Item, config: CurationConfig) -> _Examined:
    unused = _unused(item.candidates, config.candidates)
    parsed = [(c, parse(c.kind, c.text, c.finish_reason, config)) for c in item.candidates if c.position not in unused]
    reasons = {c.position: p.reason for c, p in parsed if p.reason is not None} | dict.fromkeys(unused, UNUSED)
    reasons.update(dict.fromkeys(item.invalid, INVALID_CANDIDATE))
    return _Examined(item, tuple((c, p) for c, p in parsed if p.reason is None), reasons)


def _unused(candidates: Sequence[Response], limit: int | None) -> set[int]:
    """Positions of the candidates behind the first `limit` of their kind."""
    if limit is None:
        return set()
    seen: Counter[str] = Counter()
    behind = set()
    for candidate in candidates:
        seen[candidate.kind] += 1
        if seen[candidate.kind] > limit:
            behind.add(candidate.position)
    return behind


def _by_agreement(item: Item, config: CurationConfig) -> bool:
    return config.reasoning_scorer == "agreement" and item.group == "reasoning"


def _scores(batch: Sequence[_Examined], config: CurationConfig, encoder: Encoder) -> Iterator[list[float]]:
    """Scores of each entry's valid candidates. Texts are encoded only for items scored by similarity."""
    compared = [[p.final for _, p in e.valid] for e in batch if not _by_agreement(e.item, config)]
    matrices = encoder.group_similarities(compared)
    for entry in batch:
        if _by_agreement(entry.item, config):
            yield agreement_scores([p.compared for _, p in entry.valid], config.include_self)
        else:
            yield mean_similarity_scores(next(matrices), config.include_self)


def _decide(entry: _Examined, scores: list[float], config: CurationConfig) -> Decision:
    item, table = entry.item, _table(entry, scores)
    if not entry.valid:
        reason = NO_VALID_CANDIDATE if table else NO_CANDIDATES
        return Decision(item, None, None, False, reason, None, table)
    responses, parsed = zip(*entry.valid, strict=True)
    if config.select == "random":
        index, reason_or_none = choose_randomly([r.kind for r in responses], item.id), None
    else:
        index = choose(scores, [r.kind for r in responses], [p.evidence for p in parsed])
        reason_or_none = _why_not(entry, index, scores[index], config)
    chosen, rejected = entry.valid[index][0], _rejected(entry, scores, index)
    return Decision(item, chosen, scores[index], reason_or_none is None, reason_or_none, rejected, table)


def _table(entry: _Examined, scores: list[float]) -> tuple[CandidateScore, ...]:
    """Every candidate by position, those set aside and those that could not be read included."""
    score_at = {c.position: score for (c, _), score in zip(entry.valid, scores, strict=True)}
    kinds: dict[int, str | None] = {c.position: c.kind for c in entry.item.candidates}
    kinds.update(dict.fromkeys(entry.item.invalid))
    return tuple(CandidateScore(at, kinds[at], score_at.get(at), entry.reasons.get(at)) for at in sorted(kinds))


def _why_not(entry: _Examined, index: int, score: float, config: CurationConfig) -> str | None:
    """The rule that the chosen candidate does not meet, or None."""
    is_caption = entry.item.group == "caption"
    if score < (config.caption_threshold if is_caption else config.reasoning_threshold):
        return BELOW_THRESHOLD
    if is_caption or not config.require_direct_agreement:
        return None
    votes = Counter(p.compared for c, p in entry.valid if c.kind == "direct")
    if not votes:
        return NO_DIRECT_ANSWER
    return None if votes[entry.valid[index][1].compared] == max(votes.values()) else DIRECT_DISAGREEMENT


def _rejected(entry: _Examined, scores: list[float], index: int) -> Response | None:
    """A whole response of the lower half that says something else than the chosen one, drawn by the sample id."""
    said = entry.valid[index][1].compared
    lower = lower_half(scores, [c.text for c, _ in entry.valid])
    pool = [entry.valid[i][0] for i in lower if entry.valid[i][1].compared != said]
    return pool[seeded_index("rejected", entry.item.id, len(pool))] if pool else None


def _without_duplicates(decision: Decision, duplicates: DuplicateFilter | None) -> Decision:
    if duplicates is None or not decision.kept or decision.chosen is None:
        return decision
    item = decision.item
    reason = duplicates.reason(item.prompt, item.image, decision.chosen.text)
    return replace(decision, kept=False, reason=reason) if reason else decision


class Tally:
    """Counts over decisions, for summaries and metrics; the counts add up: items = kept + the sum of `not_kept`,
    candidates = scored + the sum of `set_aside`."""

    def __init__(self) -> None:
        self._groups = {group: _GroupTally() for group in GROUPS}

    def add(self, decision: Decision) -> None:
        self._groups[decision.item.group].add(decision)

    def summary(self) -> dict[str, object]:
        """Totals, and the same per kind of item under `by_kind`. Rates and means are None where nothing was counted."""
        total = sum(self._groups.values(), start=_GroupTally())
        return {**total.summary(), "by_kind": {g: t.summary() for g, t in self._groups.items() if t.items}}


@dataclass
class _GroupTally:
    items: int = 0
    kept: int = 0
    kept_with_one_candidate: int = 0
    candidates: int = 0
    scored: int = 0
    preferences: int = 0
    score_sum: float = 0.0
    chosen: int = 0

    def __post_init__(self) -> None:
        self.not_kept: Counter[str] = Counter()
        self.set_aside: Counter[str] = Counter()

    def add(self, decision: Decision) -> None:
        scored = sum(c.score is not None for c in decision.candidates)
        self.items += 1
        self.kept += decision.kept
        self.kept_with_one_candidate += decision.kept and scored == 1
        self.candidates += len(decision.candidates)
        self.scored += scored
        self.preferences += decision.kept and decision.rejected is not None
        self.score_sum += decision.score or 0.0
        self.chosen += decision.chosen is not None
        self.not_kept.update([decision.reason] if decision.reason else [])
        self.set_aside.update(c.reason for c in decision.candidates if c.reason)

    def __add__(self, other: _GroupTally) -> _GroupTally:
        names = self.__dataclass_fields__
        total = _GroupTally(**{name: getattr(self, name) + getattr(other, name) for name in names})
        total.not_kept, total.set_aside = self.not_kept + other.not_kept, self.set_aside + other.set_aside
        return total

    def summary(self) -> dict[str, object]:
        return {
            "items": self.items,
            "kept": self.kept,
            "keep_rate": round(self.kept / self.items, 6) if self.items else None,
            "mean_score": round(self.score_sum / self.chosen, 6) if self.chosen else None,
            "not_kept": dict(sorted(self.not_kept.items())),
            "kept_with_one_candidate": self.kept_with_one_candidate,
            "preferences": self.preferences,
            "candidates": self.candidates,
            "scored": self.scored,
            "set_aside": dict(sorted(self.set_aside.items())),
        }
