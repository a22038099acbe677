"""Costs: sums by stage and generation, what a generation took to make, the gain by compute, its chart."""

from __future__ import annotations

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_report import cost, demo

from sicog_exp.reporting import charts
from sicog_exp.reporting.costs import CostRow, cumulative, metrics
from sicog_exp.reporting.report import _compute_curve, render

ROWS = [
    CostRow(0, "data", 9.0),
    CostRow(0, "instruct", 10.0, 64, 1000, 6e12),
    CostRow(0, "evaluate", 5.0, 100, 500, 1e12),
    CostRow(1, "generate-caption", 3.0, 30, 300, 2e12),
    CostRow(1, "generate-reasoning", 4.0, 40, 400, 3e12),
    CostRow(1, "curate", 1.0, 70),
    CostRow(1, "pretrain", 20.0, 64, 900, 5e12),
    CostRow(1, "evaluate", 5.0, 100, 500, 1e12),
]


def test_what_it_took_to_make_a_generation() -> None:
    assert [(c.generation, c.flops, c.trained) for c in cumulative(ROWS)] == [(0, 6e12, 6e12), (1, 16e12, 11e12)]
    preference = [CostRow(1, "preference-generate-caption", 1.0, flops=7e12), CostRow(1, "preference", 1.0, flops=1e12)]
    assert [(c.flops, c.trained) for c in cumulative([*ROWS, *preference])][1] == (24e12, 12e12)


def test_metrics_have_the_same_names_in_every_generation() -> None:
    found = metrics(ROWS, {0: 0.4, 1: 0.45})
    assert found[0]["cost/added/flops"] == 7e12
    assert found[1]["cost/added/flops"] == 11e12
    assert found[1]["cost/added/seconds"] == 33.0
    assert found[1]["cost/generate-reasoning/tokens"] == 400
    assert found[1]["cost/flops"] == 16e12
    assert (found[1]["cost/training_flops"], found[1]["cost/generation_flops"]) == (11e12, 5e12)
    assert found[1]["gain/per_petaflop"] == pytest.approx(5 / 0.01)
    assert "gain/per_petaflop" not in found[0]
    assert "gain/per_petaflop" not in metrics(ROWS, {})[1]
    assert "cost/curate/flops" not in found[1]
    assert found[0].keys() >= {"cost/flops", "cost/training_flops", "cost/generation_flops", "cost/added/flops"}


@given(st.lists(st.builds(CostRow, st.integers(0, 3), st.sampled_from(["instruct", "generate-caption", "evaluate"]),
                          st.floats(0, 1e3), flops=st.none() | st.floats(0, 1e18)), min_size=1))  # fmt: skip
def test_sums_hold(rows: list[CostRow]) -> None:
    found = metrics(rows, {})
    total = sum(values.get("cost/added/flops", 0.0) for values in found.values())
    assert total == pytest.approx(sum(row.flops or 0.0 for row in rows))
    made = cumulative(rows)
    assert [step.flops for step in made] == sorted(step.flops for step in made)
    assert all(0 <= step.trained <= step.flops * (1 + 1e-9) for step in made)


def test_the_chart_shows_both_sums() -> None:
    lines = [charts.ComputeLine("direct", ((0, 2e12, 2e12, charts.Mark(0.4, 0.38, 0.42)),
                                           (1, 9e12, 6e12, charts.Mark(0.5, 0.48, 0.52)))),
             charts.ComputeLine("CoT", ((0, 2e12, 2e12, charts.Mark(0.6, 0.58, 0.62)),))]  # fmt: skip
    svg = charts.compute_curve(lines, "compute")
    titles = [element.text for element in ElementTree.fromstring(svg).iter("title")]
    assert "G1 direct, training alone: 50.0% [48.0, 52.0]" in titles
    assert "G1 direct: 50.0% [48.0, 52.0]" in titles
    assert "TFLOP spent" in svg
    places = {title: float(re.search(r'cx="([\d.]+)"', svg[: svg.index(title)].rpartition("<circle")[2])[1])  # type: ignore[index]
              for title in ("G0 direct: ", "G1 direct: ")}  # fmt: skip
    assert places["G0 direct: "] < places["G1 direct: "]


def test_the_page_shows_gain_against_compute() -> None:
    page = render(demo())
    assert "world: score against compute" in page
    assert "Prompt tokens" in page
    bare = replace(cost(), rows=(CostRow(0, "evaluate", 1.0), CostRow(1, "evaluate", 1.0)))
    assert _compute_curve(replace(demo(), cost=bare), "world") == ""
    assert _compute_curve(replace(demo(), cost=None), "world") == ""
