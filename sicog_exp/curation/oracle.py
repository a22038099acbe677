"""Upper bounds: selections that look at the truth. They tell how much selection could bring; they are never a result.

The only code that lets a truth choose. The curate step hands the truth to it for `curation.select` oracle and truth
alone; scores, thresholds and filters never see it.
"""

from __future__ import annotations

from collections.abc import Mapping

from sicog_exp.curation.diagnosis import Truth, quality
from sicog_exp.curation.items import ROW_KINDS, Examined, Response
from sicog_exp.curation.scorers import Scores
from sicog_exp.curation.selection import Judge, Verdict, best_of, missing_reason
from sicog_exp.recipe import CurationConfig

NO_TRUTH = "no_truth"
NO_CORRECT_CANDIDATE = "no_correct_candidate"
NOT_OF_THE_POOL = -1
"""The position of a ground truth, which nobody sampled."""


def upper_bound(config: CurationConfig, truths: Mapping[str, Truth]) -> Judge:
    """The judge of `config.select`, oracle or truth; `truths` by item id."""
    return _Oracle(config, truths) if config.select == "oracle" else _GroundTruth(truths)


class _Oracle:
    """The selection ceiling: the best candidate by the truth, of equally good ones the one with the best score.

    Answers: a right one, else nothing is kept. Captions: the one with the largest share of true statements, of equals
    the one that states most; kept if all of it is true, or a share of at least `caption_threshold`.
    """

    def __init__(self, config: CurationConfig, truths: Mapping[str, Truth]) -> None:
        self._truths, self._threshold = truths, config.caption_threshold

    def __call__(self, entry: Examined, scores: Scores) -> Verdict:
        usual = best_of(entry, scores)
        truth = self._truths.get(entry.item.id)
        if usual is None or truth is None:
            chosen = None if usual is None else entry.valid[usual][0]
            return Verdict(chosen, missing_reason(entry) if usual is None else NO_TRUTH)
        group = entry.item.group
        found = [quality(group, parsed.final, truth.text) for _, parsed in entry.valid]
        most = max(found, key=lambda one: (one.precision, one.recall))
        at = best_of(entry, scores, [i for i, one in enumerate(found) if one == most])
        kept = most.precision >= (1.0 if group == "reasoning" else self._threshold)
        return Verdict(entry.valid[at][0] if at is not None else None, None if kept else NO_CORRECT_CANDIDATE)


class _GroundTruth:
    """The truth itself in place of any candidate: with its steps where the source writes them, else plain."""

    def __init__(self, truths: Mapping[str, Truth]) -> None:
        self._truths = truths

    def __call__(self, entry: Examined, scores: Scores) -> Verdict:
        truth = self._truths.get(entry.item.id)
        if truth is None:
            return Verdict(None, NO_TRUTH)
        in_steps, plain = ROW_KINDS[entry.item.group]
        kind = in_steps if truth.chain else plain
        return Verdict(Response(truth.chain or truth.text, kind, NOT_OF_THE_POOL), None)
