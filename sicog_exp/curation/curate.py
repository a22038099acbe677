"""Curation item by item: filter the candidates, score them, choose one, decide whether to keep it.

Everything is kept with its score or its reason, so that thresholds can be swept afterwards without sampling again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from sicog_exp.curation import CurationError
from sicog_exp.curation.filters import DuplicateFilter, parse
from sicog_exp.curation.items import (
    GROUPS,
    ITEM_KINDS,
    CandidateScore,
    Decision,
    Examined,
    Group,
    Item,
    Response,
    group_of,
)
from sicog_exp.curation.scorers import Listings, Scorers, Scores, asks_for_listings
from sicog_exp.curation.selection import INVALID_CANDIDATE, UNUSED, Judge, dropped, judge, select
from sicog_exp.curation.similarity import Encoder, batched, build_encoder
from sicog_exp.curation.spool import Spool
from sicog_exp.recipe import CurationConfig

ITEMS_PER_BATCH = 1024
"""Items scored together, so that an embedding model sees large batches."""

__all__ = ["GROUPS", "ITEM_KINDS", "CandidateScore", "Decision", "Group", "Item", "Response", "Tally", "curate",
           "group_of"]  # fmt: skip


def curate(items: Iterable[Item], config: CurationConfig, encoder: Encoder | None = None,
           upper_bound: Judge | None = None, folder: Path | None = None) -> Iterator[Decision]:  # fmt: skip
    """One decision per item, in order, as a stream.

    Memory grows only with what the duplicate filter remembers and with the ids; where a rule needs all items first
    (listings of an image, ranks, quotas) they wait in a nameless file in `folder`. `upper_bound` decides where
    `config.select` is oracle or truth. Raises CurationError for an encoder that cannot be used, for an id that comes
    twice, for a selection that has no truth to look at and for a likelihood that no candidate carries.
    """
    if config.is_upper_bound != (upper_bound is not None):
        raise CurationError(f"curation.select={config.select} looks at the truth of the items, which a file of "
                            "candidates does not hold; it is an upper bound for recipes whose data source knows the "
                            "truth (sicog iterate). Use best or random here")  # fmt: skip
    encoder = encoder or build_encoder(config.encoder)
    return _stream(items, config, encoder, upper_bound, folder)


def _stream(items: Iterable[Item], config: CurationConfig, encoder: Encoder, upper_bound: Judge | None,
            folder: Path | None) -> Iterator[Decision]:  # fmt: skip
    duplicates = DuplicateFilter(config.near_duplicate) if config.dedup and config.select != "random" else None
    entries: Iterable[Examined] = _examined(items, config)
    with ExitStack() as stack:
        listings = None
        if asks_for_listings(config):
            entries = stack.enter_context(Spool(entries, folder))
            listings = Listings(entries)
        scored = _scored(entries, Scorers(config, encoder, listings))
        decisions = judge(scored, upper_bound) if upper_bound else select(scored, config, folder)
        yield from (_without_duplicates(decision, duplicates) for decision in decisions)


def _examined(items: Iterable[Item], config: CurationConfig) -> Iterator[Examined]:
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise CurationError(f"id {item.id!r} comes twice; give every item an id of its own")
        seen.add(item.id)
        yield _examine(item, config)


def _examine(item: Item, config: CurationConfig) -> Examined:
    unused = _unused(item.candidates, config.candidates)
    parsed = [(c, parse(c.kind, c.text, c.finish_reason, config)) for c in item.candidates if c.position not in unused]
    reasons = {c.position: p.reason for c, p in parsed if p.reason is not None} | dict.fromkeys(unused, UNUSED)
    reasons.update(dict.fromkeys(item.invalid, INVALID_CANDIDATE))
    return Examined(item, tuple((c, p) for c, p in parsed if p.reason is None), reasons)


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


def _scored(entries: Iterable[Examined], scorers: Scorers) -> Iterator[tuple[Examined, Scores]]:
    for batch in batched(entries, ITEMS_PER_BATCH):
        yield from zip(batch, scorers.scores(batch), strict=True)


def _without_duplicates(decision: Decision, duplicates: DuplicateFilter | None) -> Decision:
    if duplicates is None or not decision.kept or decision.chosen is None:
        return decision
    item = decision.item
    reason = duplicates.reason(item.prompt, item.image, decision.chosen.text)
    return dropped(decision, reason) if reason else decision


class Tally:
    """Counts over decisions, for summaries and metrics; the counts add up: items = kept + the sum of `not_kept`,
    candidates = scored + the sum of `set_aside`."""

    def __init__(self) -> None:
        self._groups = {group: _GroupTally() for group in GROUPS}

    def add(self, decision: Decision) -> None:
        self._groups[decision.item.group].add(decision)

    def lowest_kept(self, group: Group) -> float:
        """The lowest score of a kept item; 1.0 where nothing is kept."""
        return self._groups[group].lowest_kept

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
    """Items whose chosen candidate has a score."""

    def __post_init__(self) -> None:
        self.lowest_kept = 1.0
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
        self.chosen += decision.score is not None
        if decision.kept and decision.score is not None:
            self.lowest_kept = min(self.lowest_kept, decision.score)
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
