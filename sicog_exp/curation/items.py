"""What curation reads, an item with its candidates, and what it says of it, a decision with its reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from sicog_exp.curation import CurationError
from sicog_exp.curation.filters import Parsed
from sicog_exp.prompts import CAPTION_KINDS, REASONING_KINDS, Kind

Group = Literal["caption", "reasoning"]
GROUPS: tuple[Group, ...] = get_args(Group)
ITEM_KINDS: tuple[str, ...] = (*GROUPS, *CAPTION_KINDS, *REASONING_KINDS)
ROW_KINDS: dict[Group, tuple[Kind, Kind]] = {"caption": ("cod", "dd"), "reasoning": ("cot", "direct")}
"""Each group's two kinds of training rows: in steps, and plain."""


_GROUP_OF: dict[str, Group] = {kind: group for group in GROUPS for kind in (group, *ROW_KINDS[group])}


def group_of(kind: str) -> Group:
    """`caption` or `reasoning`, which share a rule. Raises CurationError for another kind."""
    group = _GROUP_OF.get(kind)
    if group is None:
        raise CurationError(f"unknown kind {kind!r}; use one of {', '.join(ITEM_KINDS)}")
    return group


@dataclass(frozen=True, slots=True)
class Response:
    """One candidate of an item. `position` names it within the item and in all that is written about it.

    `mean_logprob` is its log-probability per new token in nats, None where that is unknown.
    """

    text: str
    kind: Kind
    position: int
    finish_reason: str | None = "stop"
    mean_logprob: float | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """One image to caption or one question to answer, with any number of candidates, none included.

    `kind` is `caption` or `reasoning`, or one of cod, dd, cot, direct. `invalid` holds the positions of candidates
    that could not be read; they are counted and take no part. `family` is the question's, where its source names one.
    """

    id: str
    kind: str
    prompt: str
    image: str | None
    candidates: tuple[Response, ...]
    invalid: tuple[int, ...] = ()
    family: str = ""

    def __post_init__(self) -> None:
        kinds = ROW_KINDS[self.group]
        for candidate in self.candidates:
            if candidate.kind not in kinds:
                raise CurationError(f"item {self.id!r}, candidate {candidate.position}: kind {candidate.kind!r} in a "
                                    f"{self.group} item; use {' or '.join(kinds)}")  # fmt: skip

    @property
    def group(self) -> Group:
        return group_of(self.kind)


@dataclass(frozen=True, slots=True)
class Examined:
    """An item whose candidates are parsed; `valid` are those that take part, with what was parsed from them.

    `reasons`: position -> why another candidate takes no part.
    """

    item: Item
    valid: tuple[tuple[Response, Parsed], ...]
    reasons: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class CandidateScore:
    """A candidate's score, or the reason why it has none. `parts`: the single scores of a blend."""

    position: int
    kind: str | None
    score: float | None
    reason: str | None
    parts: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class KeptRow:
    """One training row of a kept item, where its kinds of rows are decided separately."""

    kind: Kind
    text: str
    score: float


@dataclass(frozen=True, slots=True)
class Decision:
    """What curation made of one item.

    `chosen` and `rejected` are whole responses, steps included; `score` is the chosen one's. `reason` says why an item
    is not kept. `rejected` is None where every candidate of the lower half says the same as the chosen one. `rows` is
    None where the chosen response as a whole decides (it is trained on whole, and its final text as a plain row).
    `weight`: how often the item's rows are drawn in training, relative to others; None where all are drawn alike.
    """

    item: Item
    chosen: Response | None
    score: float | None
    kept: bool
    reason: str | None
    rejected: Response | None
    candidates: tuple[CandidateScore, ...]
    rows: tuple[KeptRow, ...] | None = None
    weight: float | None = None
