"""What a long run shows: the step under way, the share done, an estimate of the rest."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from sicog_exp.data.formats import Reading

MEASURABLE = 0.01
"""Share of all work from which its rate says anything: a stage's first step holds its set-up."""
LINE_EVERY = 20.0
"""Seconds between progress lines where there is no terminal to draw a bar on."""

BAR_EVERY = 0.2
"""Seconds between two looks at how far a reader is."""


class Display:
    """Progress over steps whose expected work is known beforehand, in any one unit.

    The estimate extrapolates from the work done in this process; cached steps count as done and cost nothing.
    """

    def __init__(self, expected: Mapping[str, float], console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True)
        self._expected = dict(expected)
        self._total = sum(expected.values()) or 1.0
        self._done, self._measured, self._busy = 0.0, 0.0, 0.0
        self._name, self._started, self._last_line = "", 0.0, 0.0
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
                   TextColumn("{task.fields[left]}"))  # fmt: skip
        self._bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self._task = self._bar.add_task("starting", total=self._total, left="")

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start(self, name: str) -> None:
        self._name, self._started = name, time.monotonic()
        self._show(0.0, name)

    def advance(self, done: int, total: int) -> None:
        self._show(done / max(total, 1), f"{self._name} {done}/{total}")

    def finish(self, name: str, cached: bool) -> None:
        seconds = time.monotonic() - self._started
        work = self._expected.get(name, 0.0)
        self._done += work
        if cached:
            self.console.print(f"{name}: done before, read from the store")
        else:
            self._measured += work
            self._busy += seconds if work else 0.0
            self.console.print(f"{name}: {seconds:.0f} s")
        self._show(0.0, name)

    def _show(self, share: float, text: str) -> None:
        current = self._expected.get(self._name, 0.0) * share
        left = self._left(current)
        self._bar.update(self._task, completed=self._done + current, description=text, left=left)
        now = time.monotonic()
        if not self.console.is_terminal and 0 < share < 1 and now - self._last_line > LINE_EVERY:
            self._last_line = now
            self.console.print(f"  {(self._done + current) / self._total:4.0%}  {text}  {left}")

    def _left(self, current: float) -> str:
        """About how long the rest takes, from the rate so far in this process."""
        work = self._measured + current
        if work < MEASURABLE * self._total:
            return ""
        seconds = self._busy + (time.monotonic() - self._started if current else 0.0)
        rest = (self._total - self._done - current) / work * seconds
        return about_left(rest)


def about_left(seconds: float) -> str:
    """Words for the time that a rate says is left."""
    return f"about {int(seconds // 60)}:{int(seconds % 60):02d} left"


class RowsBar:
    """The rows that were read so far and, where the share of the whole is known, how long the rest takes; on a terminal
    alone, where it goes away at the end."""

    def __init__(self, console: Console, doing: str) -> None:
        left = TextColumn("{task.fields[left]}")
        self._bar = Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), left,
                             console=console, disable=not console.is_terminal, transient=True)  # fmt: skip
        self._task, self._doing = self._bar.add_task(doing, total=None, left=""), doing
        self._started, self._next = 0.0, 0.0

    def __enter__(self) -> RowsBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, reading: Reading) -> None:
        """Called for every row, of which there may be millions: most calls look at the clock and no more."""
        now = time.monotonic()
        if now < self._next:
            return
        self._started, self._next = self._started or now, now + BAR_EVERY
        share, text = reading.share, f"{self._doing}: {reading.rows:,} rows"
        left = about_left((now - self._started) * (1 / share - 1)) if share and share >= MEASURABLE else ""
        self._bar.update(self._task, completed=share or 0, total=1 if share else None, description=text, left=left)
