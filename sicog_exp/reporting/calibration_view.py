"""What pages show of a calibration: charts against the threshold, and what they mean in sentences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from sicog_exp.curation.calibration import Calibration, Gain, Level, Precision, gain_of
from sicog_exp.curation.diversity import NOUNS
from sicog_exp.reporting import charts
from sicog_exp.reporting.charts import Curve, signed

PROXY = ("Agreement stands in for truth here and is no measure of it: a model can agree with itself and be wrong. The "
         "score counts the other format's candidates too, so that their agreement grows with the threshold by "
         "construction.")  # fmt: skip
CURVES = (("Distinct word pairs, of 500", "distinct_2", "%", True), ("Answer entropy", "answer_entropy", "bits", False),
          ("Length", "mean_words", "words", False))  # fmt: skip
"""What else is drawn of each level: title, field, unit, whether it is a share."""


def view(found: Calibration, name: str) -> dict[str, Any]:
    """Charts and words of one group; `name` tells it from the page's others."""
    drawn = {"sweep": _sweep_charts(found, name), "reliability": _reliability(found, name),
             "drift": _drift_charts(found, name)}  # fmt: skip
    words = {"findings": list(findings(found)), "proxies": list(proxies(found)), "proxy": PROXY}
    return {"of": found, "today": found.today, **words, **{part: _marked(made) for part, made in drawn.items()}}


def _marked(drawn: Iterable[tuple[str, str, str]]) -> list[tuple[str, str, Any]]:
    from markupsafe import Markup

    return [(title, hint, Markup(svg)) for title, hint, svg in drawn]


# The charts: (title, hint, SVG).


def _sweep_charts(found: Calibration, name: str) -> Iterator[tuple[str, str, str]]:
    levels, thresholds = found.levels, [level.threshold for level in found.levels]
    if not levels:
        return
    bands = tuple((p.low, p.high) if (p := level.precision) else None for level in levels)
    precision = Curve(found.quality_name, tuple(p.mean if (p := level.precision) else None for level in levels),
                      band=bands)  # fmt: skip
    curves = [Curve("kept", tuple(level.keep_rate for level in levels), charts.ACCENT), precision,
              Curve("formats agree", tuple(level.formats for level in levels), charts.MUTED, "4 3")]  # fmt: skip
    yield ("Kept, and how right", "The dashed line is a proxy, see below",
           charts.by_threshold([c for c in curves if any(v is not None for v in c.values)], thresholds,
                               found.threshold, "%", f"Keep rate and quality by threshold, {name}"))  # fmt: skip
    for title, field, unit, shares in CURVES:
        values = tuple(getattr(level, field) for level in levels)
        if any(value is not None for value in values):
            svg = charts.by_threshold([Curve("kept", values, charts.ACCENT)], thresholds, found.threshold, unit,
                                      f"{title} by threshold, {name}", shares)  # fmt: skip
            yield title, "Of what would be kept", svg


def _reliability(found: Calibration, name: str) -> Iterator[tuple[str, str, str]]:
    if found.bins:
        marks = [(one.score, charts.Mark(one.precision.mean, one.precision.low, one.precision.high))
                 for one in found.bins]  # fmt: skip
        yield ("Does a higher score mean better?", "On the dotted line the score would be a probability",
               charts.reliability(marks, found.quality_name, f"Quality by score, {name}"))  # fmt: skip


def _drift_charts(found: Calibration, name: str) -> Iterator[tuple[str, str, str]]:
    levels, thresholds = found.levels, [level.threshold for level in found.levels]
    if found.random is not None and found.known:
        yield ("Where the quality comes from", "Gaps, from below: easier families, easier items, choosing",
               charts.by_threshold(_sources(found), thresholds, found.threshold, f"{found.quality_name}, %",
                                   f"Sources of quality by threshold, {name}"))  # fmt: skip
    if len(found.families) > 1 and levels:
        for title, field, hint in (("Families among the kept", "shares", "Easiest family first in the table below"),
                                   (f"Families: {found.quality_name}", "precision", "Of each family's kept items")):
            yield title, hint, charts.by_threshold(_by_family(found, field), thresholds, found.threshold, "%",
                                                   f"{title}, {name}")  # fmt: skip


def _by_family(found: Calibration, field: str) -> list[Curve]:
    easiest_first = sorted(found.families, key=lambda family: -(family.easiness or 0.0))
    colors = len(charts.GENERATION_COLORS)
    curves = [Curve(family.name, getattr(family, field), charts.generation_color(i), "5 3" if i >= colors else "")
              for i, family in enumerate(easiest_first)]  # fmt: skip
    return [curve for curve in curves if any(value is not None for value in curve.values)]


def _sources(found: Calibration) -> list[Curve]:
    levels = found.levels
    return [
        Curve("chosen", tuple(p.mean if (p := level.precision) else None for level in levels)),
        Curve("random", tuple(level.random for level in levels), charts.ACCENT),
        Curve("by family", tuple(level.easiness for level in levels), charts.generation_color(1)),
        Curve("whole pool", tuple(found.random for _ in levels), charts.MUTED, "2 3"),
    ]


# The words.


def findings(found: Calibration) -> Iterator[str]:
    """What the sweep says at today's threshold; with the truth, where it is known."""
    if found.today is None:
        yield f"No {NOUNS[found.group]} had a valid candidate."
        return
    level = found.levels[found.today]
    yield _kept(found, level)
    if found.threshold is not None and found.kept != level.kept:
        yield (f"The run itself kept {found.kept:,}: rules beside threshold, duplicates and direct agreement decided "
               "there, and the sweep leaves them out.")  # fmt: skip
    gain = gain_of(found, level)
    if gain and found.random is not None:
        yield _sources_in_words(found, gain)
    yield from _drift_in_words(found, found.today)
    if found.group == "reasoning" and found.bins:
        yield _overconfidence(found)
    if found.lone_kept:
        yield _lone(found)


def _kept(found: Calibration, level: Level) -> str:
    what = ("Every item with a valid candidate is kept, whatever its score:" if found.threshold is None
            else f"Today's threshold of {found.threshold:.4g} keeps")  # fmt: skip
    text = f"{what} {level.kept:,} of {found.items:,} {NOUNS[found.group]} ({_percent(level.keep_rate)})"
    if level.precision is None:
        return f"{text}. Whether they are right is not known here."
    right = "of them are right" if found.group == "reasoning" else "of what they state is true"
    count = "" if level.precision.n == level.kept else f" (truth known for {level.precision.n:,})"
    return f"{text}; {_estimate(level.precision)} {right}{count}."


def _sources_in_words(found: Calibration, gain: Gain) -> str:
    parts = [f"{_points(gain.choosing)} come from choosing among an item's candidates"]
    if len(found.families) > 1:
        parts.append(f"{_points(gain.families)} from keeping easier question families")
        parts.append(f"{_points(gain.items)} from keeping easier items within them")
    else:
        parts.append(f"{_points(gain.families + gain.items)} from keeping easier items")
    return (f"A random candidate of any item has {_percent(found.random or 0.0)}. Of the {_points(gain.total)} points "
            f"between, {', '.join(parts[:-1])} and {parts[-1]}.")  # fmt: skip


def _drift_in_words(found: Calibration, today: int) -> Iterator[str]:
    """The families whose share changes most between the pool and what is kept."""
    moved = [(share - family.share, family, share) for family in found.families
             if (share := family.shares[today]) is not None]  # fmt: skip
    if len(moved) < 2 or found.threshold is None:
        return
    grown, shrunk = max(moved, key=lambda m: m[0]), min(moved, key=lambda m: m[0])
    said = [f"{family.name} (a random candidate has {_percent(family.easiness)}) from {_percent(family.share)} to "
            f"{_percent(share)}" for _, family, share in (grown, shrunk) if family.easiness is not None]  # fmt: skip
    if said:
        yield f"From the pool to what is kept, shares move most for {' and '.join(said)}."


def _overconfidence(found: Calibration) -> str:
    count = sum(one.precision.n for one in found.bins)
    gap = sum(one.precision.n * (one.score - one.precision.mean) for one in found.bins) / count
    return (f"Read as the probability of being right, the score is {abs(100 * gap):.1f} points too "
            f"{'high' if gap > 0 else 'low'} over all items.")  # fmt: skip


def _lone(found: Calibration) -> str:
    text = f"{found.lone_kept:,} of the kept had a single valid candidate, which nothing confirms"
    alone, others = found.lone.holds, found.lone.fails
    if alone is None:
        return f"{text}."
    against = f" against {_estimate(others)} of the others" if others else ""
    return f"{text}: {_estimate(alone)} {found.quality_name}{against}."


def proxies(found: Calibration) -> Iterator[str]:
    """What can be said without truth."""
    level = None if found.today is None else found.levels[found.today]
    if level is None or level.formats is None:
        yield "Formats: no item has valid candidates of both formats at hand."
    elif found.group == "reasoning":
        yield (f"Formats: {_percent(level.formats)} of the kept answers are also the most frequent answer of the other "
               "format (chain or direct), where there is one.")  # fmt: skip
    else:
        yield (f"Formats: the kept descriptions and those of the other format (step by step or plain) are alike to "
               f"{_percent(level.formats)} (F1 of words and word pairs).")  # fmt: skip
    agree, differ = found.formats.holds, found.formats.fails
    if agree and differ:
        more = "the formats agree" if found.group == "reasoning" else "they are more alike than in half of the items"
        yield (f"What this proxy is worth, by the truth of all items that is known: {_estimate(agree)} "
               f"{found.quality_name} where {more}, {_estimate(differ)} where not.")  # fmt: skip
    yield _encoders(found)


def _encoders(found: Calibration) -> str:
    if not found.encoder:
        return "Encoders: nothing to compare, no encoder alone gave these scores."
    one = found.encoders
    if one is None:
        return (f"Encoders: {found.encoder} alone was asked; sicog curation RUN --encoder minilm compares another "
                "one on items drawn from the pool.")  # fmt: skip
    if not one.items:
        return "Encoders: no item has the three valid candidates from which two encoders can disagree."
    same = "" if one.same is None else f", of which they choose the same text of {_percent(one.same)}"
    correlation = "" if one.correlation is None else f"; rank correlation of their best scores {one.correlation:.2f}"
    return (f"Encoders: {one.first} and {one.second} on {one.items:,} drawn items; {one.first} prefers a candidate in "
            f"{one.decided:,}{same}{correlation}.")  # fmt: skip


def _percent(share: float | None) -> str:
    return "\N{EN DASH}" if share is None else f"{100 * share:.1f}%"


def _points(share: float) -> str:
    return signed(100 * share)


def _estimate(found: Precision) -> str:
    return f"{_percent(found.mean)} [{100 * found.low:.1f}, {100 * found.high:.1f}]"
