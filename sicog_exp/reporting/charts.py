"""Charts as SVG text: every function returns one `<svg>` that scales with its container and works light and dark.

All panels share one width and its margins, so that they align in a grid and stay legible on a phone. Colours are CSS
variables with a fallback, so that a copied chart keeps them. Scores come in as shares (0 to 1), drawn in percent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Protocol

WIDTH = 380
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 16, 40
FONT = 12.5
PREFIXES = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))
GENERATION_COLORS = ("#767b85", "#d98200", "#0072b2", "#009e73", "#cc79a7", "#d55e00")
STAGE_COLORS = ("#88ccee", "#44aa99", "#117733", "#ddcc77", "#cc6677", "#882255", "#aa4499", "#332288", "#999933")
INK, MUTED, GRID = "var(--ink,#1b1f24)", "var(--muted,#5b6470)", "var(--grid,#e3e6ea)"
PAPER, ACCENT = "var(--paper,#ffffff)", "var(--g2,#0072b2)"
ASIDE = "var(--aside,#c3c8cf)"


@dataclass(frozen=True)
class Mark:
    """An estimate with its interval, in shares."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Series:
    """One line over generations; None where a generation was not measured."""

    name: str
    marks: tuple[Mark | None, ...]
    hollow: bool = False
    color: str = ""
    """The line's own colour; without one its marks have their generations'."""


@dataclass(frozen=True)
class ForestRow:
    """One comparison; `generation` gives its colour, None for comparisons between arms."""

    label: str
    mark: Mark
    generation: int | None = None


@dataclass(frozen=True)
class DotRow:
    """One question family: a mark per generation, and what answering without the image scores."""

    label: str
    marks: tuple[Mark | None, ...]
    prior: float | None = None


class LineageNode(Protocol):
    """A step in a lineage graph: its generation, name and fingerprint, and the fingerprints of what it read."""

    @property
    def generation(self) -> int: ...
    @property
    def step(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def inputs(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Scale:
    """A linear map from data to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return self.start + share * (self.end - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        """Round numbers inside the scale."""
        span = (self.high - self.low) or 1.0
        power = 10 ** math.floor(math.log10(span / about))
        step = next(m * power for m in (1, 2, 5, 10) if span / (m * power) <= about + 0.5)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def generation_color(index: int) -> str:
    """The one colour of a generation, in every chart and in the text."""
    slot = index % len(GENERATION_COLORS)
    return f"var(--g{slot},{GENERATION_COLORS[slot]})"


def stage_color(index: int) -> str:
    """The colour of a cost stage."""
    return STAGE_COLORS[index % len(STAGE_COLORS)]


def signed(points: float, digits: int = 1) -> str:
    """+1.2 or -1.2 with a true minus sign, and 0.0 without a sign."""
    text = f"{abs(points):.{digits}f}"
    return text if float(text) == 0 else ("+" if points > 0 else "\N{MINUS SIGN}") + text


def plain(value: float) -> str:
    """A tick's number, without superfluous zeros."""
    return f"{value:,.10g}".replace("-", "\N{MINUS SIGN}") if abs(value) < 1e9 else f"{value:.1e}"


# The pen.


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _text(
    x: float, y: float, words: str, anchor: str = "start", color: str = MUTED, size: float = FONT, bold: bool = False
) -> str:
    """Words with a halo of the page's colour, so that lines may pass behind them."""
    weight = ";font-weight:600" if bold else ""
    return (f'<text x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}" font-size="{size}" stroke-width="4" '
            f'style="fill:{color};stroke:{PAPER};paint-order:stroke{weight}">{escape(words)}</text>')  # fmt: skip


def _line(x1: float, y1: float, x2: float, y2: float, color: str = GRID, width: float = 1, dash: str = "") -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (f'<line x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}" stroke-width="{width}"{dashed} '
            f'style="stroke:{color}"/>')  # fmt: skip


def _path(points: Sequence[tuple[float, float]], color: str, width: float = 2, dash: str = "") -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    route = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
    return f'<polyline points="{route}" fill="none" stroke-width="{width}"{dashed} style="stroke:{color}"/>'


def _bar(x: float, y: float, width: float, height: float, color: str, hint: str = "") -> str:
    title = f"<title>{escape(hint)}</title>" if hint else ""
    return (f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(max(width, 0))}" height="{_n(max(height, 0))}" '
            f'style="fill:{color}">{title}</rect>')  # fmt: skip


def _dot(x: float, y: float, color: str, hollow: bool = False, hint: str = "", radius: float = 4.5) -> str:
    """A filled circle, or a hollow square: the shape tells apart what the colour does not."""
    title = f"<title>{escape(hint)}</title>" if hint else ""
    if hollow:
        side = 1.8 * radius
        return (f'<rect x="{_n(x - side / 2)}" y="{_n(y - side / 2)}" width="{_n(side)}" height="{_n(side)}" '
                f'stroke-width="2" style="fill:{PAPER};stroke:{color}">{title}</rect>')  # fmt: skip
    return f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{radius}" style="fill:{color}">{title}</circle>'


def _svg(height: float, label: str, parts: Iterable[str], width: float = WIDTH) -> str:
    return (f'<svg viewBox="0 0 {_n(width)} {_n(height)}" role="img" aria-label="{escape(label)}" '
            f'font-family="system-ui,-apple-system,Segoe UI,Roboto,sans-serif">{"".join(parts)}</svg>')  # fmt: skip


def _percent(mark: Mark) -> str:
    return f"{100 * mark.mean:.1f}% [{100 * mark.low:.1f}, {100 * mark.high:.1f}]"


def _shorten(words: str, room: float, size: float = FONT) -> str:
    fits = max(3, int(room / (0.54 * size)))
    return words if len(words) <= fits else words[: fits - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _spread(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The heights moved apart to at least `gap`, in order, inside [low, high] where they fit."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    for before, i in zip([None, *order], order):
        placed[i] = max(placed[i], low if before is None else placed[before] + gap)
    limit = high
    for i in reversed(order):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - gap
    return placed


def _rows_axis(scale: Scale, height: float, title: str, about: int = 5) -> list[str]:
    """Vertical gridlines with numbers under them, for charts of rows."""
    base = height - BOTTOM
    parts = []
    for tick in scale.ticks(about):
        parts.append(_line(scale(tick), TOP, scale(tick), base))
        parts.append(_text(scale(tick), base + 16, plain(tick), "middle"))
    return [*parts, _text((scale.start + scale.end) / 2, height - 6, title, "middle")]


def _y_axis(scale: Scale, title: str, right: float, about: int = 5) -> list[str]:
    """Horizontal gridlines with numbers left of them; the title stands above the numbers."""
    parts = []
    for tick in scale.ticks(about):
        parts.append(_line(LEFT, scale(tick), right, scale(tick)))
        parts.append(_text(LEFT - 7, scale(tick) + 4, plain(tick), "end"))
    return [*parts, _text(2, 12, title)]


# The charts.


def generation_curve(series: Sequence[Series], names: Sequence[str], label: str) -> str:
    """Scores over generations with 95% intervals: a line per answer format, a colour per generation."""
    height, right = 250, WIDTH - 96
    marks = [mark for one in series for mark in one.marks if mark]
    low = max(0.0, 100 * min(m.low for m in marks) - 4)
    high = min(100.0, 100 * max(m.high for m in marks) + 4)
    y = Scale(low, high, height - BOTTOM + 10, TOP + 8)
    x = Scale(-0.35, len(names) - 0.65, LEFT, right)
    parts = _y_axis(y, "correct, %", right)
    parts += [_text(x(i), height - 10, name, "middle", INK, bold=True) for i, name in enumerate(names)]
    for number, one in enumerate(series):
        parts += _curve(one, 14 * (number - (len(series) - 1) / 2), x, y)
    return _svg(height, label, parts + _ends(series, x, y, right))


def _curve(one: Series, shift: float, x: Scale, y: Scale) -> list[str]:
    places = [(i, x(i) + shift, mark) for i, mark in enumerate(one.marks) if mark]
    line = [(px, y(100 * mark.mean)) for _, px, mark in places]
    parts = [_path(line, one.color or MUTED, 1.5, "5 4" if one.hollow else "")]
    for i, px, mark in places:
        color = one.color or generation_color(i)
        parts.append(_line(px, y(100 * mark.low), px, y(100 * mark.high), color, 2))
        hint = f"G{i} {one.name}: {_percent(mark)}"
        parts.append(_dot(px, y(100 * mark.mean), color, one.hollow, hint))
    return parts


def _ends(series: Sequence[Series], x: Scale, y: Scale, right: float) -> list[str]:
    """Each line's name and last value, beside its end."""
    last = [(one.name, next(m for m in reversed(one.marks) if m)) for one in series if any(one.marks)]
    heights = _spread([y(100 * mark.mean) + 4 for _, mark in last], 16, TOP, y.start)
    return [_text(right + 6, h, _shorten(f"{name} {100 * mark.mean:.1f}", 92), color=INK)
            for (name, mark), h in zip(last, heights)]  # fmt: skip


def forest(rows: Sequence[ForestRow], label: str) -> str:
    """Differences with 95% intervals against a line at zero."""
    row_height, edge = 42, 12
    height = TOP + row_height * len(rows) + BOTTOM
    ends = [100 * v for row in rows for v in (row.mark.low, row.mark.high)]
    pad = 0.06 * ((max(*ends, 0) - min(*ends, 0)) or 1)
    x = Scale(min(*ends, 0) - pad, max(*ends, 0) + pad, edge, WIDTH - edge)
    parts = _rows_axis(x, height, "difference, percentage points")
    for number, row in enumerate(rows):
        parts += _forest_row(row, TOP + row_height * number, x, edge)
    return _svg(height, label, parts)


def _forest_row(row: ForestRow, top: float, x: Scale, edge: float) -> list[str]:
    color = MUTED if row.generation is None else generation_color(row.generation)
    low, mean, high = (100 * v for v in (row.mark.low, row.mark.mean, row.mark.high))
    value = f"{signed(mean)} [{signed(low)}, {signed(high)}]"
    words = _text(edge, top + 14, _shorten(row.label, 210), color=INK)
    number = _text(WIDTH - edge, top + 14, value, "end", INK, bold=low > 0 or high < 0)
    zero = _line(x(0), top + 20, x(0), top + 38, MUTED, 1.5)  # beside the mark alone, where no words stand
    span = _line(x(low), top + 29, x(high), top + 29, color, 2.5)
    return [words, number, zero, span, _dot(x(mean), top + 29, color, hint=f"{row.label}: {value}")]


def family_dots(rows: Sequence[DotRow], generations: Sequence[int], label: str) -> str:
    """A row per question family: each generation's score with its interval, and the blind prior as a tick."""
    left, right, gap = 90, WIDTH - 36, 11
    row_height = gap * len(generations) + 12
    top = TOP + 12
    height = top + row_height * len(rows) + BOTTOM
    x = Scale(0, 100, left, right)
    parts = [*_family_legend(generations, any(row.prior is not None for row in rows)),
             *_rows_axis(x, height, "correct, %")]  # fmt: skip
    for number, row in enumerate(rows):
        y = top + row_height * number
        parts.append(_line(2, y, right, y))
        parts += _family_row(row, generations, y, row_height, x)
    return _svg(height, label, parts)


def _family_legend(generations: Sequence[int], priors: bool) -> list[str]:
    parts, place = [], 90.0
    for g in generations:
        parts += [_dot(place + 4, 8, generation_color(g), radius=4), _text(place + 12, 12, f"G{g}", color=INK)]
        place += 42
    if priors:
        parts += [_line(place + 4, 1, place + 4, 15, INK, 2), _text(place + 11, 12, "blind prior", color=INK)]
    return parts


def _family_row(row: DotRow, generations: Sequence[int], top: float, height: float, x: Scale) -> list[str]:
    middle = top + height / 2
    parts = [_text(2, middle + 4, _shorten(row.label, 92), color=INK)]
    if row.prior is not None:
        parts.append(_line(x(100 * row.prior), top + 4, x(100 * row.prior), top + height - 4, INK, 2))
    shown = [(g, mark) for g, mark in zip(generations, row.marks) if mark]
    for place, (g, mark) in enumerate(shown):
        y = middle + 11 * (place - (len(shown) - 1) / 2)
        parts.append(_line(x(100 * mark.low), y, x(100 * mark.high), y, generation_color(g), 2))
        parts.append(
            _dot(x(100 * mark.mean), y, generation_color(g), hint=f"G{g} {row.label}: {_percent(mark)}", radius=4)
        )
    if shown:
        parts.append(_text(WIDTH - 4, middle + 4, f"{100 * shown[-1][1].mean:.0f}", "end", INK, bold=True))
    return parts


def histogram(scores: Sequence[float], threshold: float, label: str, bins: int = 20) -> str:
    """How many items have which best score; those at or above the threshold are coloured."""
    height, right = 230, WIDTH - RIGHT
    low = _lowest(scores)
    x = Scale(low, 1.0, LEFT, right)
    counts = [[0, 0] for _ in range(bins)]
    for score in scores:
        counts[_slot(score, low, bins)][score >= threshold] += 1
    y = Scale(0, 1.08 * max(1, *(sum(pair) for pair in counts)), height - BOTTOM, TOP + 22)
    parts = _y_axis(y, "items", right, 4) + _x_numbers(x, height, "best score of an item")
    width = (x.end - x.start) / bins
    for slot, (below, above) in enumerate(counts):
        place, middle = x.start + slot * width, y(below)
        parts.append(_bar(place + 1, middle, width - 2, y(0) - middle, ASIDE, f"{below} below the threshold"))
        parts.append(_bar(place + 1, y(below + above), width - 2, middle - y(below + above), ACCENT, f"{above} kept"))
    return _svg(height, label, parts + _threshold(threshold, x, height))


def _x_numbers(x: Scale, height: float, title: str) -> list[str]:
    numbers = [_text(x(tick), height - BOTTOM + 16, plain(round(tick, 6)), "middle") for tick in x.ticks(6)]
    return [*numbers, _text((x.start + x.end) / 2, height - 6, title, "middle")]


def _threshold(threshold: float, x: Scale, height: float) -> list[str]:
    if not x.low <= threshold <= x.high:
        return []
    place = x(threshold)
    after = place < (x.start + x.end) / 2
    words = _text(place + (5 if after else -5), 26, f"threshold {threshold:.4g}", "start" if after else "end", INK)
    return [_line(place, 16, place, height - BOTTOM, INK, 1.5, "4 3"), words]


def keep_curve(
    scores: Sequence[float],
    quality: Sequence[tuple[float, float]],
    threshold: float,
    random_quality: float | None,
    quality_name: str,
    label: str,
) -> str:
    """Share of items kept, and the kept ones' mean quality, for every threshold. `quality`: (score, quality) pairs."""
    height, right = 230, WIDTH - 88
    low = _lowest(scores)
    x, y = Scale(low, 1.0, LEFT, right), Scale(0, 100, height - BOTTOM, TOP + 22)
    steps = [low + i * (1.0 - low) / 100 for i in range(101)]
    flat = None if random_quality is None else 100 * random_quality
    values = {"kept": lambda t: 100 * sum(s >= t - 1e-9 for s in scores) / max(1, len(scores)),
              quality_name: lambda t: _quality_above(quality, t), "random": lambda t: flat}  # fmt: skip
    styles = ((ACCENT, ""), (INK, ""), (MUTED, "2 3"))
    lines = [_Line(name, [(t, v) for t in steps if (v := f(t)) is not None], f(threshold), *style)
             for (name, f), style in zip(values.items(), styles)]  # fmt: skip
    lines = [line for line in lines if line.points]
    parts = _y_axis(y, "% of items", right) + _x_numbers(x, height, "threshold") + _threshold(threshold, x, height)
    parts += [_path([(x(t), y(v)) for t, v in line.points], line.color, 2, line.dash) for line in lines]
    heights = _spread([y(line.points[-1][1]) + 4 for line in lines], 15, TOP, height - BOTTOM)
    parts += [_text(right + 6, h, _shorten(line.name, 80), color=line.color) for line, h in zip(lines, heights)]
    return _svg(height, label, parts + _at_threshold(lines, threshold, x, y))


@dataclass(frozen=True)
class _Line:
    """A drawn function of the threshold, with its value at the chosen one."""

    name: str
    points: list[tuple[float, float]]
    here: float | None
    color: str
    dash: str


def _at_threshold(lines: Sequence[_Line], threshold: float, x: Scale, y: Scale) -> list[str]:
    """Dots where the lines meet the chosen threshold, with their values beside."""
    met = [(line, line.here) for line in lines if line.here is not None and not line.dash]
    if not x.low <= threshold <= x.high:
        return []
    heights = _spread([y(value) - 6 for _, value in met], 15, y.end, y.start - 4)
    parts = [_dot(x(threshold), y(value), line.color, radius=3.5) for line, value in met]
    return parts + [_text(x(threshold) - 7, h, f"{value:.0f}%", "end", line.color, bold=True)
                    for (line, value), h in zip(met, heights)]  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """A value for every threshold of a sweep, None where it is not known; `band` holds its intervals."""

    name: str
    values: tuple[float | None, ...]
    color: str = INK
    dash: str = ""
    band: tuple[tuple[float, float] | None, ...] = ()


def by_threshold(curves: Sequence[Curve], thresholds: Sequence[float], today: float | None, title: str, label: str,
                 shares: bool = True) -> str:  # fmt: skip
    """Values against the threshold, as steps: a threshold keeps what the next score that occurs does.

    `shares` are drawn in percent; the scale holds what occurs.
    """
    height, right = 230, WIDTH - 96
    scaled = [_scaled(curve, 100 if shares else 1) for curve in curves]
    low, high = _around([v for curve in scaled for v in curve.values if v is not None])
    low, high = max(low, 0.0), min(high, 100.0) if shares else high
    ends = [*thresholds, *([] if today is None else [today])]
    x, y = Scale(min(ends), max(ends), LEFT + 4, right), Scale(low, high, height - BOTTOM, TOP + 22)
    parts = _y_axis(y, title, right, 4) + _x_numbers(x, height, "threshold")
    parts += [_band(curve, thresholds, x, y) for curve in scaled if curve.band]
    for curve in scaled:
        parts += _steps(curve, thresholds, x, y)
    parts += [] if today is None else _threshold(today, x, height)
    last = [(curve, next((v for v in reversed(curve.values) if v is not None), None)) for curve in scaled]
    drawn = [(curve, value) for curve, value in last if value is not None]
    heights = _spread([y(value) + 4 for _, value in drawn], 15, TOP, height - BOTTOM)
    parts += [_text(right + 6, h, _shorten(curve.name, 90), color=curve.color)
              for (curve, _), h in zip(drawn, heights)]  # fmt: skip
    return _svg(height, label, parts)


def _scaled(curve: Curve, factor: float) -> Curve:
    values = tuple(None if v is None else factor * v for v in curve.values)
    return replace(curve, values=values, band=tuple(b and (factor * b[0], factor * b[1]) for b in curve.band))


def _around(values: Sequence[float]) -> tuple[float, float]:
    """A scale on which a change of a hundredth looks small."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    pad = max(0.1 * (high - low), 0.05 * abs(high)) or 1.0
    return low - pad, high + pad


def _steps(curve: Curve, thresholds: Sequence[float], x: Scale, y: Scale) -> list[str]:
    points: list[tuple[float, float]] = []
    for i, (threshold, value) in enumerate(zip(thresholds, curve.values, strict=True)):
        if value is not None:
            points += [(x(thresholds[i - 1]), y(value))] if points else []
            points.append((x(threshold), y(value)))
    dots = [_dot(x(t), y(v), curve.color, hint=f"{curve.name} at {t:g}: {v:.3g}", radius=2.5)
            for t, v in zip(thresholds, curve.values) if v is not None]  # fmt: skip
    return [_path(points, curve.color, 2, curve.dash), *dots]


def _band(curve: Curve, thresholds: Sequence[float], x: Scale, y: Scale) -> str:
    """The intervals as a shaded area, with the steps of their line."""
    known = [(i, band) for i, band in enumerate(curve.band) if band]
    low, high = [], []
    for place, (i, (bottom, top)) in enumerate(known):
        starts = [x(thresholds[i - 1])] if place else []
        for px in (*starts, x(thresholds[i])):
            low.append((px, y(bottom)))
            high.append((px, y(top)))
    route = " ".join(f"{_n(px)},{_n(py)}" for px, py in (*low, *reversed(high)))
    return f'<polygon points="{route}" style="fill:{curve.color};fill-opacity:0.15"/>'


def reliability(bins: Sequence[tuple[float, Mark]], quality_name: str, label: str) -> str:
    """Quality against score with 95% intervals; on the dotted line a score would be a probability."""
    height, right = 230, WIDTH - RIGHT
    low = min(0.0, _lowest(score for score, _ in bins))
    x, y = Scale(low, 1.0, LEFT, right - 8), Scale(0, 100, height - BOTTOM, TOP + 22)
    parts = _y_axis(y, f"{quality_name}, %", right) + _x_numbers(x, height, "score")
    parts.append(_line(x(0), y(0), x(1), y(100), MUTED, 1.5, "2 3"))
    for score, mark in bins:
        parts.append(_line(x(score), y(100 * mark.low), x(score), y(100 * mark.high), ACCENT, 2))
        parts.append(_dot(x(score), y(100 * mark.mean), ACCENT, hint=f"score {score:.2f}: {_percent(mark)}"))
    return _svg(height, label, parts)


def _lowest(scores: Iterable[float]) -> float:
    """Where a score axis begins: 0, or below the lowest score."""
    return min(0.0, math.floor(10 * min(scores, default=0.0)) / 10)


def _slot(score: float, low: float, bins: int) -> int:
    return min(bins - 1, max(0, int((score - low) / (1.0 - low) * bins + 1e-9)))


def _quality_above(quality: Sequence[tuple[float, float]], threshold: float, least: int = 5) -> float | None:
    """Mean quality in percent of the items that a threshold keeps; None for fewer than `least`."""
    kept = [value for score, value in quality if score >= threshold - 1e-9]
    return 100 * sum(kept) / len(kept) if len(kept) >= least else None


def quality_by_score(quality: Sequence[tuple[float, float]], label: str, bins: int = 10) -> str:
    """Is consensus correctness? Mean quality of the items in each score bin, with their number."""
    height, right = 230, WIDTH - RIGHT
    low = _lowest(score for score, _ in quality)
    x, y = Scale(low, 1.0, LEFT, right), Scale(0, 100, height - BOTTOM, TOP + 22)
    width = (x.end - x.start) / bins
    parts = _y_axis(y, "mean quality, %  (n above each bar)", right) + _x_numbers(x, height, "best score of an item")
    for slot in range(bins):
        inside = [v for s, v in quality if _slot(s, low, bins) == slot]
        if inside:
            mean, place = 100 * sum(inside) / len(inside), x.start + slot * width
            parts.append(_bar(place + 3, y(mean), width - 6, y(0) - y(mean), ACCENT, f"{mean:.1f}% of {len(inside)}"))
            parts.append(_text(place + width / 2, y(mean) - 4, f"{len(inside):,}", "middle", size=10.5))
    return _svg(height, label, parts)


def cost_bars(bars: Sequence[tuple[str, Sequence[tuple[str, float]]]], label: str) -> str:
    """Wall time of each generation, stacked by stage. `bars`: (name, ((stage, seconds), ...))."""
    fullest_first = sorted(bars, key=lambda bar: -len(bar[1]))
    stages = list(dict.fromkeys(stage for _, parts in fullest_first for stage, _ in parts))
    left, right, row = 34, WIDTH - 86, 34
    legend, legend_height = _stage_legend(stages, left)
    body = TOP + row * len(bars) + BOTTOM
    longest = max((sum(s for _, s in parts) for _, parts in bars), default=1.0) or 1.0
    divisor, unit = (3600, "hours") if longest >= 7200 else (60, "minutes") if longest >= 120 else (1, "seconds")
    x = Scale(0, longest / divisor, left, right)
    drawn = _rows_axis(x, body, f"wall time, {unit}")
    for number, (name, parts) in enumerate(bars):
        drawn += _cost_row(name, parts, stages, TOP + row * number + 5, x, divisor)
    shifted = f'<g transform="translate(0 {_n(body)})">{"".join(legend)}</g>'
    return _svg(body + legend_height, label, [*drawn, shifted])


def _cost_row(
    name: str, parts: Sequence[tuple[str, float]], stages: Sequence[str], top: float, x: Scale, divisor: float
) -> list[str]:
    drawn, place = [_text(2, top + 17, name, color=INK, bold=True)], 0.0
    for stage, seconds in parts:
        start, end = x(place / divisor), x((place + seconds) / divisor)
        drawn.append(_bar(start, top, end - start, 24, stage_color(stages.index(stage)), f"{stage}: {seconds:,.1f} s"))
        place += seconds
    return [*drawn, _text(x(place / divisor) + 6, top + 17, duration(place), color=INK)]


@dataclass(frozen=True)
class ComputeLine:
    """One answer format: (generation, FLOPs spent, those of training alone, score) of each generation."""

    name: str
    points: tuple[tuple[int, float, float, Mark], ...]


def compute_curve(lines: Sequence[ComputeLine], label: str) -> str:
    """Scores against FLOPs: circles count sampling and training, squares training alone; one line per format."""
    height, right = 250, WIDTH - 96
    marks = [mark for line in lines for *_, mark in line.points]
    most = max(flops for line in lines for _, flops, *_ in line.points)
    factor, prefix = next((pair for pair in PREFIXES if most >= pair[0]), (1.0, ""))
    low, high = max(0.0, 100 * min(m.low for m in marks) - 4), min(100.0, 100 * max(m.high for m in marks) + 4)
    x, y = Scale(0, 1.05 * most / factor, LEFT, right), Scale(low, high, height - BOTTOM, TOP + 8)
    parts = _y_axis(y, "correct, %", right) + _x_numbers(x, height, f"{prefix}FLOP spent")
    for line in lines:
        parts += _spent(line, x, y, factor)
    last = [(line.name, line.points[-1][3]) for line in lines]
    heights = _spread([y(100 * mark.mean) + 4 for _, mark in last], 16, TOP, y.start)
    return _svg(height, label, parts + [_text(right + 6, h, _shorten(f"{name} {100 * mark.mean:.1f}", 92), color=INK)
                                        for (name, mark), h in zip(last, heights)])  # fmt: skip


def _spent(line: ComputeLine, x: Scale, y: Scale, factor: float) -> list[str]:
    """Both curves of a format, and between them what sampling took."""
    found = [(g, x(flops / factor), x(trained / factor), mark) for g, flops, trained, mark in line.points]
    parts = [_path([(px, y(100 * mark.mean)) for _, px, _, mark in found], MUTED, 1.5),
             _path([(px, y(100 * mark.mean)) for _, _, px, mark in found], MUTED, 1.5, "5 4")]  # fmt: skip
    for g, all_in, trained, mark in found:
        height, color = y(100 * mark.mean), generation_color(g)
        parts.append(_line(all_in, y(100 * mark.low), all_in, y(100 * mark.high), color, 2))
        parts.append(_dot(trained, height, color, True, f"G{g} {line.name}, training alone: {_percent(mark)}", 3.5))
        parts.append(_dot(all_in, height, color, hint=f"G{g} {line.name}: {_percent(mark)}"))
    return parts


def _stage_legend(stages: Sequence[str], left: float) -> tuple[list[str], float]:
    parts: list[str] = []
    place, y = left, 14.0
    for index, stage in enumerate(stages):
        width = 24 + 0.56 * FONT * len(stage)
        if place + width > WIDTH and place > left:
            place, y = left, y + 20
        parts += [_bar(place, y - 10, 11, 11, stage_color(index)), _text(place + 16, y, stage, color=INK)]
        place += width + 8
    return parts, y + 8


BOX, BOX_HEIGHT, COLUMN, ROW = 190, 38, 262, 58
"""A lineage graph's boxes and the distances between their left and upper edges."""


def lineage(nodes: Sequence[LineageNode], label: str) -> str:
    """A column of boxes per generation, in the order of work, and lines from what each step read."""
    generations = sorted({node.generation for node in nodes})
    place: dict[str, tuple[float, float]] = {}
    filled = dict.fromkeys(generations, 0)
    boxes: list[str] = []
    for node in nodes:
        if node.fingerprint not in place:
            x = 2.0 + COLUMN * generations.index(node.generation)
            y = 2.0 + ROW * filled[node.generation]
            filled[node.generation] += 1
            place[node.fingerprint] = x, y
            boxes += _node(node, x, y)
    data = {node.fingerprint for node in nodes if node.step == "data"}
    lines = [_link(place[source], place[node.fingerprint]) for node in nodes for source in node.inputs
             if source in place and source not in data]  # fmt: skip
    width, height = COLUMN * len(generations), ROW * max(filled.values(), default=1)
    return _svg(height, label, lines + boxes, width)


def _node(node: LineageNode, x: float, y: float) -> list[str]:
    box = (f'<rect x="{_n(x)}" y="{_n(y)}" width="{BOX}" height="{BOX_HEIGHT}" rx="6" stroke-width="1.5" '
           f'style="fill:{PAPER};stroke:{generation_color(node.generation)}"/>')  # fmt: skip
    return [box, _text(x + 9, y + 16, f"G{node.generation} {node.step}", color=INK, bold=True),
            _text(x + 9, y + 31, node.fingerprint[:10], size=10.5)]  # fmt: skip


def _link(source: tuple[float, float], target: tuple[float, float]) -> str:
    """Down to the next box of a column, round the boxes between, or across to a later column."""
    (x1, y1), (x2, y2) = source, target
    if x1 == x2:
        if y2 - y1 == ROW:
            return _line(x1 + BOX / 2, y1 + BOX_HEIGHT, x2 + BOX / 2, y2, MUTED, 1.5)
        start, end, bend = (x1 + BOX, y1 + BOX_HEIGHT / 2), (x2 + BOX, y2 + BOX_HEIGHT / 2), 26 + (y2 - y1) / 24
        curve = f"M{_n(start[0])},{_n(start[1])} C{_n(start[0] + bend)},{_n(start[1])} "
        curve += f"{_n(end[0] + bend)},{_n(end[1])} {_n(end[0])},{_n(end[1])}"
    else:
        start, end = (x1 + BOX, y1 + BOX_HEIGHT / 2), (x2, y2 + BOX_HEIGHT / 2)
        middle = end[0] - (COLUMN - BOX) / 2
        curve = f"M{_n(start[0])},{_n(start[1])} C{_n(middle)},{_n(start[1])} {_n(middle)},{_n(end[1])} "
        curve += f"{_n(end[0])},{_n(end[1])}"
    return f'<path d="{curve}" fill="none" stroke-width="1.5" style="stroke:{MUTED}"/>'


def duration(seconds: float) -> str:
    """12.3 s, 4 min 05 s or 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
