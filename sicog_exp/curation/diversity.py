"""Is the self-data drying up? The variety of what curation kept, per group, and an alarm where it falls.

A model trained on its own output can collapse to a few phrases and answers while its agreement with itself, and so
every score of curation, goes up. Nothing here needs the truth and nothing here chooses or trains: it is read from a
finished curation artifact.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain, islice, pairwise, product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from sicog_exp.curation.consistency import seeded_index
from sicog_exp.curation.curate import GROUPS, Group, group_of
from sicog_exp.curation.diagnosis import final_of
from sicog_exp.curation.filters import BROKEN_FORMAT, DUPLICATE, EMPTY, NEAR_DUPLICATE, TRUNCATED
from sicog_exp.curation.selection import UNUSED
from sicog_exp.curation.similarity import Encoder, LexicalEncoder, build_encoder, words_of
from sicog_exp.prompts import STEPS, normalize_answer, steps_of
from sicog_exp.records import read_jsonl

WORDS = 500
"""Words, or word pairs, that distinct-n is counted on: the same number for every generation, since the ratio falls with
the length of a text however varied it is. A smaller pool has no distinct-n."""
SAMPLE = 64
"""Texts whose 2,016 pairs are compared."""
ORDER = "diversity"
ALARMED = ("distinct_2", "answer_entropy")
"""What the alarm watches: a relative fall against the first iteration."""
FORMAT_REASONS = (TRUNCATED, BROKEN_FORMAT, EMPTY)
REPEATED = (DUPLICATE, NEAR_DUPLICATE)
NOUNS: dict[Group, str] = {"caption": "captions", "reasoning": "answers"}


@dataclass(frozen=True)
class Diversity:
    """One group of one iteration; what cannot be measured is None.

    Texts are the kept responses without the headers of their steps, in an order drawn from their ids, so that the
    pool's order does not matter.
    """

    kept: int
    mean_words: float | None
    vocabulary: int
    """Distinct words of all kept texts: the one number that grows with the pool."""
    distinct_1: float | None
    """Distinct words among WORDS words, averaged over pieces of that length."""
    distinct_2: float | None
    """The same for pairs of words within a text."""
    answer_entropy: float | None
    """Reasoning only: bits of the distribution of final answers, averaged over question families."""
    pairwise_similarity: float | None
    """Mean lexical similarity (F1 of words and word pairs) of a sample's pairs."""
    embedding_spread: float | None
    """1 - mean cosine of the sample's pairs, where curation uses an embedding encoder."""
    format_valid: float | None
    """Share of candidates not set aside as cut, empty or with broken steps; 1 without `curation.require_format`. Those
    that `curation.candidates` left unused were not looked at."""
    duplicates: float | None
    """Share of the otherwise kept items that were dropped as exact or near duplicates."""


@lru_cache(maxsize=32)
def read_diversity(curated: Path, data: Path) -> dict[Group, Diversity]:
    """The groups that a curation artifact holds; question families come from the data artifact's `truth.jsonl`."""
    families = {row["id"]: row.get("family", "") for row in read_jsonl(data / "truth.jsonl")}
    verdicts, reasons = _by_group(read_jsonl(curated / "curated.jsonl")), _reasons(curated)
    encoder = json.loads((curated / "summary.json").read_text(encoding="utf-8"))["encoder"]
    return {group: measure(group, verdicts[group], reasons[group], families, encoder) for group in verdicts}


def measure(group: Group, verdicts: Sequence[Mapping[str, Any]], reasons: Sequence[str | None],
            families: Mapping[str, str] | None = None, encoder: str = "lexical") -> Diversity:  # fmt: skip
    """One group from its rows of `curated.jsonl` and, of every candidate, the reason why it was set aside (or None)."""
    kept = sorted((row for row in verdicts if row["kept"]), key=lambda row: seeded_index(ORDER, row["id"], 2**48))

    def words() -> Iterator[list[str]]:
        """Of each text, anew: all pairs of words of a large pool at once would take gigabytes."""
        return (words_of(said(row)) for row in kept)

    dropped = sum(row["reason"] in REPEATED for row in verdicts)
    sample = [said(row) for row in kept[:SAMPLE]]
    looked_at = [reason for reason in reasons if reason != UNUSED]
    return Diversity(
        kept=len(kept),
        mean_words=fmean(map(len, words())) if kept else None,
        vocabulary=len(set(chain.from_iterable(words()))),
        distinct_1=distinct_share(chain.from_iterable(words())),
        distinct_2=distinct_share(pair for text in words() for pair in pairwise(text)),
        answer_entropy=family_entropy(_answers(kept, families or {})) if group == "reasoning" else None,
        pairwise_similarity=_mean_of_pairs(LexicalEncoder(), sample),
        embedding_spread=None if encoder == "lexical" else _spread(encoder, sample),
        format_valid=1 - sum(r in FORMAT_REASONS for r in looked_at) / len(looked_at) if looked_at else None,
        duplicates=dropped / (dropped + len(kept)) if dropped + len(kept) else None,
    )


def metrics(found: Mapping[Group, Diversity]) -> dict[str, float]:
    """`curation/<group>/<name>` of all that could be measured; the same names in every generation."""
    return {f"curation/{group}/{name}": float(value) for group, one in found.items()
            for name, value in asdict(one).items() if name != "kept" and value is not None}  # fmt: skip


def alarms(history: Sequence[Mapping[Group, Diversity]], fall: float) -> list[str]:
    """A sentence for every measure that fell by `fall` (a share) or more against the first iteration; 0 says nothing.

    `history[i]` is iteration i's, sampled by G(i). A pool that became too small to be measured alarms too.
    """
    if not fall or not history:
        return []
    return [text for group, name in product(GROUPS, ALARMED) if group in history[0]
            for index, found in enumerate(history[1:], 1) if (text := _alarm(history[0][group], found.get(group),
                                                                            group, name, index, fall))]  # fmt: skip


def collapse_alarms(curated: Sequence[Path], data: Path, fall: float) -> list[str]:
    """`alarms` of a run's curation artifacts, in the order of its iterations."""
    return alarms([read_diversity(path, data) for path in curated], fall)


# The parts.


def said(row: Mapping[str, Any]) -> str:
    """The chosen response without the headers of its steps, which every response repeats."""
    kind, text = row["chosen_kind"], row["chosen"]
    return "\n".join((steps_of(kind, text) if kind in STEPS else None) or (text,))


def distinct_share(tokens: Iterable[Hashable], size: int = WORDS) -> float | None:
    """Distinct tokens as a share, averaged over pieces of `size` tokens; None where there is no whole piece."""
    rest = iter(tokens)
    pieces = iter(lambda: list(islice(rest, size)), [])
    shares = [len(set(piece)) / size for piece in pieces if len(piece) == size]
    return fmean(shares) if shares else None


def entropy(counts: Counter[str]) -> float:
    """Bits, with Miller and Madow's correction: the plain estimate is lower for a smaller sample."""
    total = counts.total()
    plain = -sum(n / total * math.log2(n / total) for n in counts.values())
    return plain + (len(counts) - 1) / (2 * total * math.log(2))


def family_entropy(answers: Iterable[tuple[str, str]]) -> float | None:
    """Bits of (question family, answer) pairs within families, averaged over these by their number of answers."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for family, answer in answers:
        found[family][answer] += 1
    total = sum(counts.total() for counts in found.values())
    return sum(entropy(counts) * counts.total() for counts in found.values()) / total if total else None


def _answers(kept: Sequence[Mapping[str, Any]], families: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Rows of no known family are one family."""
    for row in kept:
        yield families.get(row["id"], ""), normalize_answer(final_of(row["chosen_kind"], row["chosen"]))


def _mean_of_pairs(encoder: Encoder, texts: Sequence[str]) -> float | None:
    if len(texts) < 2:
        return None
    matrix = encoder.similarities(texts)
    return float(matrix[np.triu_indices(len(texts), 1)].mean())


def _spread(encoder: str, texts: Sequence[str]) -> float | None:
    """1 - the mean cosine of a sample's pairs."""
    mean = _mean_of_pairs(build_encoder(encoder), texts)
    return None if mean is None else 1 - mean


def _by_group(rows: Iterable[Mapping[str, Any]]) -> dict[Group, list[Mapping[str, Any]]]:
    found: dict[Group, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        found[group_of(row["kind"])].append(row)
    return {group: found[group] for group in GROUPS if group in found}


def _reasons(curated: Path) -> dict[Group, list[str | None]]:
    """A candidate that could not be read has no kind and counts nowhere."""
    found: dict[Group, list[str | None]] = {group: [] for group in GROUPS}
    for row in read_jsonl(curated / "scores.jsonl"):
        if row["kind"] is not None:
            found[group_of(row["kind"])].append(row["reason"])
    return found


def _alarm(first: Diversity, now: Diversity | None, group: Group, name: str, index: int, fall: float) -> str | None:
    before, after = getattr(first, name), getattr(now, name) if now else None
    if before is None or before <= 0:
        return None
    where, shown = f"Kept {NOUNS[group]} of G{index}", name.replace("_", "-" if name.startswith("distinct") else " ")
    if after is None:
        return f"{where}: too few are left to measure {shown} (G0: {before:.2f}); the self-data may be collapsing."
    lost = 1 - after / before
    if lost < fall:
        return None
    return f"{where}: {shown} fell by {lost:.0%} ({before:.2f} to {after:.2f}); the self-data may be collapsing."
