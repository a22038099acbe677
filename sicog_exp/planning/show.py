"""A plan for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sicog_exp.planning.plan import Plan, PlannedStep
from sicog_exp.reporting import charts
from sicog_exp.reporting.costs import SAMPLING, SCORING

COLUMNS = ("rows", "tokens read", "of images", "new tokens", "FLOP", "memory", "device time", "disk")
PREFIXES = (*charts.PREFIXES, (1e3, "k"))


def show(plan: Plan, console: Console) -> None:
    """The table of steps, what it comes to, and everything that was taken for given."""
    price = plan.pricing
    title = f"{plan.recipe}, planned for {price.devices} x {price.device}: an estimate, nothing was run"
    table = Table(title=title, box=SIMPLE)
    table.add_column("for", no_wrap=True)
    table.add_column("step", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for step in plan.steps:
        table.add_row(f"G{step.generation}", step.step, *_cells(step))
    table.add_section()
    table.add_row("all", "", *_cells(plan.total))
    console.print(table)
    for line in (*_sums(plan), "Assumptions:", *(f"- {text}" for text in plan.assumptions)):
        console.print(line, highlight=False, markup=False)


def to_json(plan: Plan) -> str:
    """All of it; tokens and rows are counts, memory and disk bytes, hours of one device."""
    steps = [{**asdict(step), "tokens": step.tokens} for step in plan.steps]
    values = {**asdict(plan), "pricing": {**asdict(plan.pricing), "peak": plan.pricing.of.peak}, "steps": steps,
              "stages": {name: _plain(step) for name, step in stages(plan).items()}, "total": _plain(plan.total),
              "sharded": plan.sharded, "wall_hours": plan.total.hours / plan.pricing.devices}  # fmt: skip
    return json.dumps(values, indent=1)


def stages(plan: Plan) -> dict[str, PlannedStep]:
    """The sums of each stage over all generations."""
    names = dict.fromkeys(step.step for step in plan.steps)
    return {name: plan.sum_of(step for step in plan.steps if step.step == name) for name in names}


def _plain(step: PlannedStep) -> dict[str, Any]:
    return {**{k: v for k, v in asdict(step).items() if k not in ("generation", "step")}, "tokens": step.tokens}


def _cells(step: PlannedStep) -> list[str]:
    counts = (step.samples, step.prompt_tokens, step.image_tokens, step.new_tokens, step.flops)
    return [*map(si, counts), size(step.memory), duration(step.hours), size(step.disk)]


def _sums(plan: Plan) -> Iterator[str]:
    price, total, made = plan.pricing, plan.total, stages(plan)
    sampled = sum(step.hours for name, step in made.items() if name.startswith(SAMPLING))
    scored = sum(step.hours for name, step in made.items() if name.startswith(SCORING))
    where = f"{price.devices} x {price.device}"
    yield (f"device time: {duration(total.hours)}; {duration(total.hours - sampled - scored)} of training, "
           f"{duration(sampled)} of sampling, {duration(scored)} of evaluation; "
           f"{duration(total.hours / price.devices)} on {where} at work all the time")  # fmt: skip
    fullest, room = max(plan.steps, key=lambda step: step.memory), price.of.memory
    fits = "which fits" if fullest.memory <= room else "which does not fit"
    yield (f"fullest step: G{fullest.generation} {fullest.step}, {size(fullest.memory)} on each device"
           f"{f' of {size(room)}, {fits}' if room else ''}")  # fmt: skip
    if price.devices > 1:
        yield (f"with weights, gradients and moments shared out over {price.devices} devices (FSDP) the fullest step "
               f"takes {size(plan.sharded)} on each")  # fmt: skip
    copies = f", {size(plan.tracked)} of models in the tracking store" if plan.tracked else ""
    yield f"disk: {size(total.disk)} in the step store{copies}"


def duration(hours: float) -> str:
    """As 12 s, 4.5 min or 1,230 h; nothing for 0."""
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} s" if hours else ""
    if hours < 2:
        return f"{60 * hours:.1f} min"
    return f"{hours:.3g} h" if hours < 1000 else f"{hours:,.0f} h"


def si(value: float) -> str:
    """1.2 M for 1,234,567; nothing for 0."""
    for factor, prefix in PREFIXES:
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.0f}" if value else ""


def size(number: float) -> str:
    """Bytes, as 1.2 GB; nothing for 0."""
    return f"{si(number)}B" if number else ""
