"""Scorers: how sure is each candidate of an item? One function each, and their weighted mean.

Every score lies between 0 and 1 (a cosine between -1 and 1), so that a threshold means the same for a single scorer and
for a blend. docs/curation.md lists them with their sources.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sicog_exp.curation import CurationError
from sicog_exp.curation.consistency import DECIMALS, agreement_scores, mean_scores
from sicog_exp.curation.filters import Parsed
from sicog_exp.curation.items import GROUPS, Examined, Group, Item
from sicog_exp.curation.similarity import Encoder, LexicalEncoder, Matrix, alike
from sicog_exp.recipe import CurationConfig


@dataclass(frozen=True, slots=True)
class Scores:
    """Of an item's valid candidates, in their order. `parts`: the single scores of a blend, by scorer; `support`: how
    well each one's listing agrees with its image's other listings, where a scorer asks for it."""

    values: list[float]
    parts: Mapping[str, list[float]] | None = None
    support: list[float] | None = None


def weights_of(config: CurationConfig, group: Group) -> dict[str, float]:
    """Scorer -> its weight; a group's own scorer weighs 1."""
    main, others = ((config.caption_scorer, config.caption_blend) if group == "caption" else
                    (config.reasoning_scorer, config.reasoning_blend))  # fmt: skip
    return {main: 1.0, **others}


def compared_by(config: CurationConfig, group: Group) -> tuple[str, ...]:
    """The similarity matrices that a group's scorers read: `similarity` is by `curation.encoder`."""
    names = set(weights_of(config, group))
    if group == "caption" and "cross_format" in names:
        names.add("similarity")
    return tuple(name for name in ("similarity", "lexical") if name in names)


def asks_for_listings(config: CurationConfig) -> bool:
    """Whether a scorer needs the listings of all items of an image."""
    return any("listing" in weights_of(config, group) for group in GROUPS)


class Scorers:
    """The scorers that a configuration names for each group. `listings` must be given where it asks for them."""

    def __init__(self, config: CurationConfig, encoder: Encoder, listings: Listings | None = None) -> None:
        self._include_self, self._listings = config.include_self, listings
        self._weights = {group: weights_of(config, group) for group in GROUPS}
        self._encoders = {"similarity": encoder, "lexical": encoder if encoder.name == "lexical" else LexicalEncoder()}
        self._compares = {group: compared_by(config, group) for group in GROUPS}

    def scores(self, batch: Sequence[Examined]) -> Iterator[Scores]:
        """Scores of each entry's valid candidates. Texts are encoded only for items that are compared by them."""
        groups = [entry.item.group for entry in batch]
        streams = {name: self._compare(name, batch, groups) for name in self._encoders}
        for entry, group in zip(batch, groups, strict=True):
            compared = {name: next(streams[name]) for name in self._compares[group]}
            support = self._listings.support(entry) if self._listings else None
            parts = {name: self._one(name, entry, group, compared, support) for name in self._weights[group]}
            if len(parts) > 1:
                yield Scores(blended(parts, self._weights[group]), parts, support)
            else:
                (values,) = parts.values()
                yield Scores(values, None, support)

    def _compare(self, name: str, batch: Sequence[Examined],
                 groups: Sequence[Group]) -> Iterator[tuple[Matrix, list[float]]]:  # fmt: skip
        """Similarities and their means, of the entries whose group is compared by this encoder."""
        texts = [[p.final for _, p in e.valid] for e, group in zip(batch, groups) if name in self._compares[group]]
        for neighbours in alike(self._encoders[name].group_similarities(texts)):
            yield from zip(neighbours, mean_scores(np.stack(neighbours), self._include_self), strict=True)

    def _one(self, name: str, entry: Examined, group: Group, compared: Mapping[str, tuple[Matrix, list[float]]],
             support: list[float] | None) -> list[float]:  # fmt: skip
        if name in self._encoders:
            return compared[name][1]
        if name == "likelihood":
            return likelihood_scores(entry)
        answers = [p.compared for _, p in entry.valid]
        if name == "agreement":
            return agreement_scores(answers, self._include_self)
        kinds = [c.kind for c, _ in entry.valid]
        if name == "cross_format":
            caption = group == "caption"
            return cross_similarities(compared["similarity"][0], kinds) if caption else cross_agreement(answers, kinds)
        assert support is not None, f"the scorer {name} needs the listings of all items"
        return support if group == "caption" else listing_votes(answers, kinds, support, self._include_self)


def blended(parts: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> list[float]:
    """The weighted mean of several scorers' scores, candidate by candidate."""
    total, given = math.fsum(weights.values()), [weights[name] for name in parts]
    return [round(math.fsum(w * s for w, s in zip(given, scores)) / total, DECIMALS) for scores in zip(*parts.values())]


def likelihood_scores(entry: Examined) -> list[float]:
    """The geometric mean probability of each candidate's tokens under the model that wrote it, in (0, 1].

    Raises CurationError for a candidate without a log-probability.
    """
    return [round(math.exp(_mean_logprob(entry.item, c.position, c.mean_logprob)), DECIMALS) for c, _ in entry.valid]


def _mean_logprob(item: Item, position: int, value: float | None) -> float:
    if value is None:
        raise CurationError(f"item {item.id!r}, candidate {position}: the scorer `likelihood` needs its log-probability"
                            ": give every candidate `logprob` (a finite number, nats, summed over its tokens) and "
                            "`tokens` (their number, above 0), or use another scorer")  # fmt: skip
    return min(value, 0.0)


def cross_agreement(answers: Sequence[str], kinds: Sequence[str]) -> list[float]:
    """The share of the candidates of the other format with the same normalised answer: a chain's among the direct
    answers, a direct answer's among the chains; 0.0 where there is none of the other format."""
    alike = Counter(zip(kinds, answers))
    everyone, of_kind, of_answer = len(answers), Counter(kinds), Counter(answers)
    return [round((of_answer[answer] - alike[kind, answer]) / max(everyone - of_kind[kind], 1), DECIMALS)
            for kind, answer in zip(kinds, answers)]  # fmt: skip


def cross_similarities(similarity: Matrix, kinds: Sequence[str]) -> list[float]:
    """Each candidate's mean similarity to those of the other format; 0.0 where there is none."""
    other = np.array([[a != b for b in kinds] for a in kinds], dtype=bool).reshape(len(kinds), len(kinds))
    return [round(math.fsum(row[mask]) / max(int(mask.sum()), 1), DECIMALS) for row, mask in zip(similarity, other)]


def listing_votes(answers: Sequence[str], kinds: Sequence[str], support: Sequence[float],
                  include_self: bool) -> list[float]:  # fmt: skip
    """The share of votes for each candidate's answer, where a chain's vote weighs its listing's support.

    A direct answer lists nothing and weighs as much as the item's chains do on average. Without any support all votes
    are equal.
    """
    chains = [support[i] for i, kind in enumerate(kinds) if kind == "cot"]
    usual = math.fsum(chains) / len(chains) if chains else 0.0
    weights = [support[i] if kind == "cot" else usual for i, kind in enumerate(kinds)]
    if not any(weights):
        weights = [1.0] * len(answers)
    votes: dict[str, list[float]] = defaultdict(list)
    for answer, weight in zip(answers, weights):
        votes[answer].append(weight)
    total, sums = math.fsum(weights), {answer: math.fsum(given) for answer, given in votes.items()}
    own = [0.0 if include_self else weight for weight in weights]
    return [round((sums[answer] - mine) / (total - mine), DECIMALS) if total > mine else 0.0
            for answer, mine in zip(answers, own)]  # fmt: skip


class Listings:
    """What the candidates of each image say is there, over all its items: a chain of thought's visual information, a
    caption's final description. Memory grows with the distinct listings, about their text each."""

    def __init__(self, entries: Iterable[Examined]) -> None:
        stated: dict[str, Counter[str]] = defaultdict(Counter)
        for entry in entries:
            stated[_place(entry.item)].update(text for _, parsed in entry.valid if (text := _listing(entry, parsed)))
        self._support = {place: _supports(texts) for place, texts in stated.items()}

    def support(self, entry: Examined) -> list[float]:
        """Of each valid candidate's listing: its mean lexical similarity to the image's other listings, in [0, 1].

        0.0 for a candidate without a listing and for the only listing of its image.
        """
        known = self._support[_place(entry.item)]
        return [known.get(_listing(entry, parsed), 0.0) for _, parsed in entry.valid]


def _place(item: Item) -> str:
    """What an item's listings are about; an item without an image stands alone."""
    return f"image {item.image}" if item.image is not None else f"item {item.id}"


def _listing(entry: Examined, parsed: Parsed) -> str:
    return parsed.final if entry.item.group == "caption" else parsed.evidence


def _supports(texts: Counter[str]) -> dict[str, float]:
    distinct, others = list(texts), texts.total() - 1
    if not others:
        return dict.fromkeys(distinct, 0.0)
    matrix = LexicalEncoder().similarities(distinct)
    counts = np.array([texts[text] for text in distinct], dtype=float)
    # `fsum` is exact, so that the order of the candidates does not matter; each listing is left out of its own mean.
    return {text: round((math.fsum(row * counts) - 1) / others, DECIMALS) for text, row in zip(distinct, matrix)}
