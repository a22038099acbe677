"""Self-consistency: scores from a similarity matrix or from parsed answers, and the choice among candidates.

Pure functions. Scores are rounded to 9 decimals, so that neither the order of candidates nor the last bit of a sum
decides whether (1 + 0.85 + 0.85) / 3 reaches a threshold of 0.9.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from sicog_exp.curation.similarity import LexicalEncoder, Matrices, Matrix
from sicog_exp.prompts import STEPS

DECIMALS = 9


def mean_similarity_scores(similarity: Matrix, include_self: bool) -> list[float]:
    """Each candidate's mean similarity over the item's n candidates: minimum-Bayes-risk selection.

    `similarity` is (n, n) with ones on the diagonal. With `include_self` (the authors' definition) the candidate itself
    counts in its mean; without it the mean is over the n - 1 others, and a lone candidate, which nothing confirms,
    scores 0.0. Source: paper.md, Curation.
    """
    return mean_scores(similarity[None], include_self)[0]


def mean_scores(similarities: Matrices, include_self: bool) -> list[list[float]]:
    """`mean_similarity_scores` of m items with n candidates each, at once; `similarities` is (m, n, n)."""
    m, n, _ = similarities.shape
    if n <= (not include_self):
        return np.zeros((m, n)).tolist()
    others = similarities if include_self else similarities[:, ~np.eye(n, dtype=bool)].reshape(m, n, n - 1)
    # Sorted, because a floating-point sum depends on its order and a score must not depend on the candidates' order.
    ordered = np.sort(np.ascontiguousarray(others), axis=2)
    return np.round(ordered.mean(axis=2), DECIMALS).tolist()


def agreement_scores(answers: Sequence[str], include_self: bool) -> list[float]:
    """The share of candidates with the same normalised answer, in [0, 1].

    The similarity is 1 for the same answer and 0 for another one; `include_self` means the same as in
    `mean_similarity_scores`, a lone candidate without it scores 0.0.
    """
    counts, own = Counter(answers), 0 if include_self else 1
    total = max(len(answers) - own, 1)
    return [round((counts[answer] - own) / total, DECIMALS) for answer in answers]


def choose(scores: Sequence[float], kinds: Sequence[str], evidence: Sequence[str],
           support: Sequence[float] | None = None) -> int:  # fmt: skip
    """The index of the best candidate. Raises ValueError when there is none.

    Ties in score go to a structured kind (cod, cot), whose steps are worth training on; then to the candidate whose
    evidence agrees most with the other candidates' (a chain whose observations nobody shares may be right by luck), as
    `support` says where it is given; then to the lowest index.
    """
    best = max(scores)
    tied = [i for i, score in enumerate(scores) if score == best]
    tied = [i for i in tied if kinds[i] in STEPS] or tied
    if len({evidence[i] for i in tied}) == 1:
        return tied[0]
    support = evidence_agreement(evidence) if support is None else support
    return max(tied, key=lambda i: (support[i], -i))


def choose_randomly(kinds: Sequence[str], sample_id: str) -> int:
    """The index of a candidate drawn by the sample id, of a structured kind where there is one, as in `choose`: a
    control must differ in the choice alone, not in the kinds that it trains on."""
    structured = [i for i, kind in enumerate(kinds) if kind in STEPS] or list(range(len(kinds)))
    return structured[seeded_index("chosen", sample_id, len(structured))]


def evidence_agreement(evidence: Sequence[str]) -> list[float]:
    """Each evidence text's mean lexical similarity to the others', in [0, 1]; 0.0 for an empty one.

    Empty evidence (a direct answer gives none) neither supports nor weakens anybody.
    """
    stated = [i for i, text in enumerate(evidence) if text]
    similarity = LexicalEncoder().similarities([evidence[i] for i in stated])
    support = [0.0] * len(evidence)
    for i, score in zip(stated, mean_similarity_scores(similarity, include_self=False)):
        support[i] = score
    return support


def lower_half(scores: Sequence[float], texts: Sequence[str]) -> list[int]:
    """The indices of the n // 2 lowest scores; ties are ordered by text, so that candidate order does not matter."""
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], texts[i]))
    return ranked[(len(ranked) + 1) // 2 :]


def seeded_index(purpose: str, sample_id: str, n: int) -> int:
    """A number in [0, n) drawn from the sample id: the same in every process, on every machine and for any order."""
    digest = hashlib.sha256(f"{purpose}:{sample_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % n
