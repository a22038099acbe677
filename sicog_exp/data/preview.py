"""What `sicog data check` says: a few lines on the terminal, and one page with pictures and masked rows."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from sicog_exp.data.check import DRAWN, Findings, Lengths, Shown, histogram, quantiles
from sicog_exp.data.readers import Rejection

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console

EXAMPLES = 3
"""Rejected rows shown of each problem."""
SHARES = {"5%": 0.05, "half": 0.5, "95%": 0.95, "99%": 0.99, "longest": 1.0}
BAR = 40
"""Characters of the longest bar."""
STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
pre, .row { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 monospace }
.row { border: 1px solid #ccc; padding: .6rem; margin: .3rem 0 1.5rem }
mark { background: #cdeac0; color: inherit }
img { max-width: 256px; margin-right: .5rem; border: 1px solid #ccc }
"""


def summary(found: Findings) -> Iterator[str]:
    """The counts, line by line."""
    yield from _counts(found)
    yield from _set_aside(found.intake.rejected)
    yield from _tokens(found.lengths, found)


def show(found: Findings, page: Path, listing: Path | None, console: Console) -> None:
    """Print the counts, a masked row, and where the rest is."""
    for line in (*summary(found), *_example(found.shown)):
        console.print(line, markup=False, highlight=False)
    if listing:
        aside = f"the {len(found.intake.rejected):,} rows set aside are in {listing}"
        console.print(aside, markup=False, highlight=False)
    console.print(f"pictures and more rows are in {page}", markup=False, highlight=False)


def _example(shown: Sequence[Shown]) -> Iterator[str]:
    first = next((one for one in shown if one.pieces), None)
    if first:
        yield f"a row as the model gets it ({_title(first)}); loss falls on what stands in [[ ]]:"
        yield "  " + marked(first).replace("\n", "\n  ")


def marked(shown: Shown) -> str:
    """A row's text with its trained pieces in double brackets."""
    return "".join(f"[[{piece.text}]]" if piece.trained else piece.text for piece in shown.pieces)


def _title(shown: Shown) -> str:
    return f"{shown.record.id}, {shown.record.kind}, {shown.tokens:,} tokens"


def _counts(found: Findings) -> Iterator[str]:
    allowed, intake = found.options.data.max_bad_share, found.intake
    share = found.bad / found.read if found.read else 0.0
    yield (f"{found.source}: {found.read:,} rows read in {found.seconds:.1f} s: {found.usable:,} usable, {found.bad:,} "
           f"unusable ({share:.1%}; data.max_bad_share allows {allowed:.0%})")  # fmt: skip
    how = "all decoded" if found.options.decode else "headers read; --images all decodes them"
    yield f"  images    {found.images:,} ({how})"
    yield f"  kinds     {_listed(found.kinds)}"
    turns = {f"{number} turn{'s' * (number > 1)}": rows for number, rows in sorted(found.turns.items())}
    yield f"  turns     {_listed(Counter(turns))}"
    if intake.passed_over:
        yield f"  left out  {intake.passed_over.total():,} files that are no pictures: {_listed(intake.passed_over)}"
    changed = (("reworded", intake.reworded, "get the wording of the prompt table"),
               ("renamed", intake.renamed, "share an id with others and get a number behind it"))  # fmt: skip
    for name, counts, what in changed:
        if counts.total():
            yield f"  {name:9} {counts.total():,} rows {what}"


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {rows:,}" for name, rows in counts.most_common()) or "none"


def _set_aside(rejected: Sequence[Rejection]) -> Iterator[str]:
    """Rows by problem, the most frequent first, each with its first examples."""
    for problem, count in Counter(row.problem for row in rejected).most_common():
        yield f"set aside, {problem}: {count:,}"
        for row in [row for row in rejected if row.problem == problem][:EXAMPLES]:
            place = f"row {row.row:,}{f' of {row.part}' if row.part else ''}{f' ({row.id})' if row.id else ''}"
            yield f"  {place}: {row.reason}; {row.fix}"


def _tokens(lengths: Lengths, found: Findings) -> Iterator[str]:
    if not lengths.of:
        return
    drawn = f"{len(lengths.of):,} rows drawn from all; --tokens all counts each"
    if found.options.every or found.usable <= DRAWN:
        drawn = "all rows"
    yield f"tokens with images, by {found.options.model} ({drawn})"
    for name, counts in (("row", lengths.of), ("response", lengths.responses)):
        if any(counts):
            shares = zip(SHARES, quantiles(counts, list(SHARES.values())), strict=True)
            yield f"  {name:9} " + ", ".join(f"{share} {count:,}" for share, count in shares)
    yield from _bars(histogram(lengths.of))
    yield f"  longer than max_length={lengths.max_length:,}: {_over(lengths)}"
    for reason, count in lengths.refused.most_common(EXAMPLES):
        yield f"  {count:,} rows are refused by the model's chat template: {reason}"


def _bars(ranges: Sequence[tuple[int, int, int]]) -> Iterator[str]:
    most = max(rows for _, _, rows in ranges)
    for first, last, rows in ranges:
        yield f"  {first:>6,}-{last:<6,} {'#' * round(BAR * rows / most):{BAR}} {rows:,}"


def _over(lengths: Lengths) -> str:
    if not lengths.cut and not lengths.too_long:
        return "none of all rows"
    parts = [f"{len(ids):,} {what}, such as {ids[0]}" for ids, what in
             ((lengths.cut, "whose response is cut at its end"), (lengths.too_long, "set aside"))
             if ids]  # fmt: skip
    return "of all rows " + "; ".join(parts)


# The page.


def write_page(found: Findings, page: Path) -> None:
    """One HTML file without a script or anything to load; what data say is escaped."""
    rows = "\n".join(_row(shown) for shown in found.shown)
    counts = escape("\n".join(summary(found)))
    title = escape(f"{found.source.name}: what a run would read")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(f"<!doctype html>\n<html lang=en><head><meta charset=utf-8><title>{title}</title><style>{STYLE}"
                    f"</style></head><body>\n<h1>{title}</h1>\n<pre>{counts}</pre>\n<h2>Rows as the model gets them"
                    f"</h2>\n<p>Loss falls on <mark>what is marked</mark>.</p>\n{rows}\n</body></html>\n",
                    encoding="utf-8", errors="replace")  # fmt: skip


def _row(shown: Shown) -> str:
    pictures = "".join(f'<img alt="{escape(name)}" src="{_inline(picture)}">'
                       for name, picture in zip(shown.record.images, shown.pictures))  # fmt: skip
    text = "".join(f"<mark>{escape(piece.text)}</mark>" if piece.trained else escape(piece.text)
                   for piece in shown.pieces)  # fmt: skip
    return f'<h3>{escape(_title(shown))}</h3>\n{pictures}\n<div class="row">{text or escape(shown.problem)}</div>'


def _inline(picture: Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
