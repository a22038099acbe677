"""What curation sets aside, and why: every filter returns its reason, so that all of it can be counted."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Hashable
from dataclasses import dataclass

from sicog_exp.curation.similarity import gram_f1, grams_of
from sicog_exp.prompts import CAPTION_KINDS, REASONING_KINDS, STEPS, Kind, normalize_answer, steps_of
from sicog_exp.recipe import CurationConfig
from sicog_exp.records import IMAGE_PLACEHOLDER

TRUNCATED = "truncated"
BROKEN_FORMAT = "broken_format"
EMPTY = "empty"
TOO_SHORT = "too_short"
TOO_LONG = "too_long"
DUPLICATE = "duplicate"
NEAR_DUPLICATE = "near_duplicate"

_FIRST_STEP = re.compile(r"(?m)^\s*\**Step 1:")


@dataclass(frozen=True, slots=True)
class Parsed:
    """What consensus needs to know of one candidate."""

    final: str
    """The compared text: a caption's final description, an answer without its reasoning."""
    compared: str
    """`final` in the form in which two candidates count as saying the same."""
    evidence: str
    """What a tie is broken by: the visual information of a chain of thought, a whole caption; "" for direct answers."""
    reason: str | None
    """Why the candidate takes no part, or None."""


def infer_kind(text: str, group: str) -> Kind:
    """The kind of an unmarked response of a `caption` or `reasoning` item, by its first step header.

    A response that starts the steps and does not finish them is a structured one with a broken format, not a
    description: it would otherwise be compared, and kept, as a whole.
    """
    structured = _FIRST_STEP.search(text) is not None
    kinds = CAPTION_KINDS if group == "caption" else REASONING_KINDS
    return kinds[0] if structured else kinds[1]


def parse(kind: Kind, text: str, finish_reason: str | None, config: CurationConfig) -> Parsed:
    """One candidate's compared text and evidence, with the first reason to set it aside.

    Without `require_format` a response with broken steps, or cut at the token limit, is compared as a whole. One that
    spells an image placeholder could never become a training row.
    """
    steps = steps_of(kind, text) if kind in STEPS else None
    final = (steps[-1] if steps else "") or ("" if kind in STEPS and config.require_format else text.strip())
    words = final.split()
    reason = (format_reason(kind, text, final, finish_reason) if config.require_format else None) or length_reason(
        len(words), config.min_words, config.max_words
    )
    is_caption = kind in CAPTION_KINDS
    compared = " ".join(words) if is_caption else normalize_answer(final)
    evidence = text if is_caption else (steps[1] if steps else "")
    if IMAGE_PLACEHOLDER in text:
        reason = BROKEN_FORMAT
    return Parsed(final, compared, evidence, reason or (None if compared else EMPTY))


def format_reason(kind: Kind, text: str, final: str, finish_reason: str | None) -> str | None:
    """Cut at the token limit, or without the steps of its kind."""
    if not text.strip():
        return EMPTY
    if finish_reason == "length":
        return TRUNCATED
    return BROKEN_FORMAT if kind in STEPS and not final else None


def length_reason(words: int, min_words: int, max_words: int) -> str | None:
    """Empty, or outside the allowed number of words (separated by white space)."""
    if words == 0:
        return EMPTY
    if words < min_words:
        return TOO_SHORT
    return TOO_LONG if words > max_words else None


class DuplicateFilter:
    """Exact and near duplicates among the responses kept for the same prompt and image; the first one stays.

    No image counts as an image of its own: the same prompt without an image and the same response are one training row.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        # Nearly every prompt and image comes once: its response is indexed only when a second one arrives.
        self._seen: dict[tuple[str, str | None], str | _NearIndex] = {}

    def reason(self, prompt: str, image: str | None, response: str) -> str | None:
        """Why the response is a duplicate of a kept one, or None; then it is kept and remembered."""
        key = (prompt, image)
        seen = self._seen.get(key)
        if seen is None:
            self._seen[key] = response
            return None
        if isinstance(seen, str):
            first, seen = seen, _NearIndex(self._threshold)
            seen.reason(first)
            self._seen[key] = seen
        return seen.reason(response)


class _NearIndex:
    """Responses to one prompt and image, found again by lexical similarity without comparing all pairs.

    Prefix filtering (Chaudhuri et al., 2006): two gram sets with F1 >= t share at least a * t / (2 - t) of a set's a
    grams, hence one of the first a - a * t / (2 - t) + 1 in any order common to all sets. Only those are indexed.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._texts: set[str] = set()
        self._grams: list[frozenset[Hashable]] = []
        self._by_gram: dict[Hashable, list[int]] = {}

    def reason(self, response: str) -> str | None:
        if response in self._texts:
            return DUPLICATE
        grams = grams_of(response)
        prefix = self._prefix(grams)
        if any(gram_f1(grams, self._grams[i]) >= self._threshold for i in self._sharing(prefix)):
            return NEAR_DUPLICATE
        self._texts.add(response)
        for gram in prefix:
            self._by_gram.setdefault(gram, []).append(len(self._grams))
        self._grams.append(grams)
        return None

    def _sharing(self, prefix: list[Hashable]) -> set[int]:
        if self._threshold <= 0:
            return set(range(len(self._grams)))
        return {i for gram in prefix for i in self._by_gram.get(gram, ())}

    def _prefix(self, grams: frozenset[Hashable]) -> list[Hashable]:
        shared = math.ceil(len(grams) * self._threshold / (2 - self._threshold) - 1e-9)
        return sorted(grams, key=_rank)[: len(grams) - shared + 1]


def _rank(gram: Hashable) -> tuple[bool, int, str]:
    """One order for all texts: pairs before words, since they are rarer and find fewer other texts, then mixed up, so
    that texts which differ little do not all begin alike."""
    name = repr(gram)
    base = gram[0] if isinstance(gram, tuple) else gram
    return " " not in str(base), zlib.crc32(name.encode("utf-8", "replace")), name
