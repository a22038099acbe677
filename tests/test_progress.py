"""The display: the step under way, the share done, an estimate from what this process has measured."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from sicog_exp import progress
from sicog_exp.data.formats import Reading
from sicog_exp.progress import Display, RowsBar


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress.time, "monotonic", made)
    return made


def display(expected: dict[str, float], terminal: bool = False) -> tuple[Display, Any]:
    page = io.StringIO()
    return Display(expected, Console(file=page, width=100, force_terminal=terminal, color_system=None)), page


def read_rows(clock: Clock, terminal: bool, rows: int | None) -> str:
    page, reading = io.StringIO(), Reading()
    if rows:
        reading.expect(rows)
    with RowsBar(Console(file=page, width=100, force_terminal=terminal, color_system=None), "reading x") as bar:
        reading.watch = bar
        for row in range(1, 1001):
            reading.at(row)
            clock.now += 0.25
    return page.getvalue()


def test_rows_are_counted_with_an_estimate_where_their_number_is_known(clock: Clock) -> None:
    shown = read_rows(clock, terminal=True, rows=2000)
    assert "reading x: 1,000 rows" in shown
    assert "about 4:09 left" in shown
    unknown = read_rows(clock, terminal=True, rows=None)
    assert "reading x: 1,000 rows" in unknown
    assert "left" not in unknown


def test_rows_are_counted_on_a_terminal_alone(clock: Clock) -> None:
    assert read_rows(clock, terminal=False, rows=2000) == ""


def test_a_line_from_time_to_time_without_a_terminal(clock: Clock) -> None:
    shown, page = display({"G0 train": 100.0, "G0 test": 100.0})
    with shown:
        shown.start("G0 train")
        clock.now += 30
        shown.advance(5, 10)
        clock.now += 1
        shown.advance(6, 10)
        clock.now += 29
        shown.finish("G0 train", cached=False)
        shown.start("G0 test")
        clock.now += 30
        shown.advance(1, 2)
    lines = [line.strip() for line in page.getvalue().splitlines() if line.strip()]
    assert lines == ["25%  G0 train 5/10  about 1:30 left", "G0 train: 60 s", "75%  G0 test 1/2  about 0:30 left"]


def test_cached_steps_count_as_done_and_cost_nothing(clock: Clock) -> None:
    shown, page = display({"a": 50.0, "b": 25.0, "c": 25.0})
    shown.start("a")
    shown.finish("a", cached=True)
    shown.start("b")
    clock.now += 40
    shown.advance(1, 2)
    text = page.getvalue()
    assert "a: done before, read from the store" in text
    # half of b in 40 s: the other half and c take 120 s
    assert "about 2:00 left" in text
    assert "62%" in text


def test_steps_without_expected_work_change_no_estimate(clock: Clock) -> None:
    shown, page = display({"data": 0.0, "train": 10.0})
    shown.start("data")
    clock.now += 500
    shown.finish("data", cached=False)
    shown.start("train")
    clock.now += 50
    shown.advance(1, 2)
    assert "about 0:50 left" in page.getvalue()
    shown.start("unheard of")
    shown.advance(0, 0)
    shown.finish("unheard of", cached=False)


def test_no_estimate_before_anything_was_measured(clock: Clock) -> None:
    shown, page = display({"a": 10.0})
    shown.start("a")
    shown.advance(0, 10)
    assert "left" not in page.getvalue()
    assert display({})[0] is not None


def test_a_bar_on_a_terminal() -> None:
    shown, page = display({"a": 10.0}, terminal=True)
    with shown:
        shown.start("a")
        shown.advance(5, 10)
        shown.finish("a", cached=False)
    assert "a: 0 s" in page.getvalue()
    assert "100%" in page.getvalue()
