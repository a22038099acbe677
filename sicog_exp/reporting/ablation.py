"""An ablation's result: tables, a forest plot and one self-contained page, all drawn from one `AblationData`.

The caller measures and fills it; this module draws. Scores are shares (0 to 1), differences are differences of shares;
tables and plots show percent and percentage points. FLOPs stand as counted, shown as means over seeds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table

from sicog_exp.reporting import charts, report

DATA, PLOT, PAGE, TABLES = "ablation.json", "ablation.png", "ablation.html", "ablation.md"
EQUAL_WITHIN = 0.03
"""Arms whose training FLOPs differ from the reference's by a larger share are named."""
LEVEL = 0.05
"""Differences whose corrected p lies below are drawn filled."""


@dataclass(frozen=True)
class Score:
    """Accuracy of an arm's generation on a task: the mean over seeds, each seed's, and their standard deviation (None
    for one seed)."""

    arm: str
    generation: int
    task: str
    mean: float
    spread: float | None
    per_seed: tuple[float, ...]


@dataclass(frozen=True)
class Difference:
    """After minus before on a task, pooled over seeds, with its interval from resampling images.

    An end is an arm, by its last generation, or ARM:G0. `spread` is the standard deviation over seeds, None for one;
    `holm_p` is `p` corrected for all comparisons of the task.
    """

    before: str
    after: str
    task: str
    difference: float
    low: float
    high: float
    spread: float | None
    per_seed: tuple[float, ...]
    n: int
    clusters: int
    p: float
    holm_p: float

    @property
    def label(self) -> str:
        return f"{self.after} \N{MINUS SIGN} {self.before}"


@dataclass(frozen=True)
class Share:
    """How much of the gain from the study's floor to its bound an arm reaches on a task, with its interval."""

    arm: str
    task: str
    share: float
    low: float
    high: float


@dataclass(frozen=True)
class ArmRun:
    """One arm and seed: its MLflow run, and the FLOPs of the steps that it is made of, each counted once.

    `training` sums every stage that trains, a generator's included, `generation` the sampling of candidates and their
    embedding; scoring belongs to neither.
    """

    arm: str
    seed: int
    run_id: str
    stages: Mapping[str, float]
    training: float
    generation: float


@dataclass(frozen=True)
class AblationData:
    """Everything that the result of an ablation shows."""

    name: str
    recipe: str
    reference: str
    split: str
    seeds: tuple[int, ...]
    arms: Mapping[str, tuple[str, ...]]
    overrides: tuple[str, ...]
    date: str
    run_id: str
    scores: tuple[Score, ...]
    differences: tuple[Difference, ...]
    runs: tuple[ArmRun, ...]
    notes: tuple[str, ...] = ()
    shares: tuple[Share, ...] = ()

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(score.task for score in self.scores))


def to_json(data: AblationData) -> bytes:
    return TypeAdapter(AblationData).dump_json(data, indent=1) + b"\n"


def from_json(text: bytes) -> AblationData:
    """The data of `to_json`. Raises pydantic.ValidationError for JSON of another shape."""
    return TypeAdapter(AblationData).validate_json(text)


def write(data: AblationData, folder: Path) -> list[Path]:
    """The data, the plot, the page and the tables as files; their paths."""
    (folder / DATA).write_bytes(to_json(data))
    draw(data, folder / PLOT)
    report.write_page(render(data), folder / PAGE)
    (folder / TABLES).write_text(markdown(data), encoding="utf-8")
    return [folder / name for name in (DATA, PLOT, PAGE, TABLES)]


# Compute.


def compute(data: AblationData, arm: str) -> dict[str, float]:
    """Mean FLOPs over seeds: `training`, `generation`, and every stage."""
    runs = [run for run in data.runs if run.arm == arm]
    named = [{"training": run.training, "generation": run.generation, **run.stages} for run in runs]
    return {name: sum(one.get(name, 0.0) for one in named) / len(named) for name in dict.fromkeys(
        name for one in named for name in one)}  # fmt: skip


def unequal(data: AblationData) -> list[str]:
    """A sentence for every arm that trained with clearly more or fewer FLOPs than the reference."""
    whole = compute(data, data.reference)["training"]
    shares = {arm: compute(data, arm)["training"] / whole - 1 for arm in data.arms} if whole else {}
    return [f"{arm} trained with {abs(share):.1%} {'more' if share > 0 else 'fewer'} FLOPs than {data.reference}: the "
            "comparison is not at equal training compute."
            for arm, share in shares.items() if abs(share) > EQUAL_WITHIN]  # fmt: skip


# Tables.


@dataclass(frozen=True)
class Sheet:
    """One table as text, for the terminal, for Markdown and for the page; its first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def sheets(data: AblationData) -> list[Sheet]:
    made = [sheet for task in data.tasks for sheet in (_differences(data, task), _scores(data, task))]
    return [*made, *([_shares(data)] if data.shares else []), _compute(data), _stages(data)]


def _differences(data: AblationData, task: str) -> Sheet:
    found = [d for d in data.differences if d.task == task]
    rows = tuple((d.label, _interval(d), report.p_value(d.holm_p), _spread(d.spread), _each(d.per_seed, True))
                 for d in found)  # fmt: skip
    corrected = f"p corrected for {len(found)} comparisons (Holm)"
    title = f"{task}: differences, points [95% interval, images resampled]; {corrected}"
    return Sheet(title, ("after \N{MINUS SIGN} before", "difference", "p", "sd of seeds", "each seed"), rows)


def _scores(data: AblationData, task: str) -> Sheet:
    """The reference's generations, and the others' from G1 on, for all arms begin with one G0 unless they change it."""
    shared = [s.per_seed for s in data.scores if (s.arm, s.generation, s.task) == (data.reference, 0, task)]
    shown = [s for s in data.scores if s.task == task and (
        s.generation or s.arm == data.reference or s.per_seed not in shared)]  # fmt: skip
    rows = tuple((f"{s.arm} G{s.generation}", f"{100 * s.mean:.1f}", _spread(s.spread), _each(s.per_seed))
                 for s in shown)  # fmt: skip
    title = f"{task}: accuracy, %, over seeds {', '.join(map(str, data.seeds))} ({data.split} split)"
    return Sheet(title, ("arm", "mean", "sd of seeds", "each seed"), rows)


def _shares(data: AblationData) -> Sheet:
    """A task whose bound is not clearly above the floor has no shares."""
    tasks = list(dict.fromkeys(one.task for one in data.shares))
    found = {(one.arm, one.task): f"{one.share:.0%} [{one.low:.0%}, {one.high:.0%}]" for one in data.shares}
    arms = dict.fromkeys(one.arm for one in data.shares)
    rows = tuple((arm, *(found[arm, task] for task in tasks)) for arm in arms)
    return Sheet("Share of the ceiling [95% interval, images resampled]: the gain over the floor by the bound's",
                 ("arm", *tasks), rows)  # fmt: skip


def _compute(data: AblationData) -> Sheet:
    """Generation excluded and included, each beside its share of the reference's."""
    found = {arm: compute(data, arm) for arm in data.arms}
    whole = found[data.reference]
    rows = []
    for arm, one in found.items():
        both, reference = one["training"] + one["generation"], whole["training"] + whole["generation"]
        rows.append((arm, report.si(one["training"]), _share(one["training"], whole["training"]), report.si(both),
                     _share(both, reference)))  # fmt: skip
    columns = ("arm", "training alone", "of reference", "with generation", "of reference")
    return Sheet("Compute, FLOPs of one run, mean over seeds; equal work counted once", columns, tuple(rows))


def _stages(data: AblationData) -> Sheet:
    """Steps of one stage together, generate-caption and generate-reasoning in "generate", so that it fits a screen."""
    found: dict[str, dict[str, float]] = {arm: defaultdict(float) for arm in data.arms}
    for arm, sums in found.items():
        for step, flops in compute(data, arm).items():
            if step not in ("training", "generation"):
                sums[step.partition("-")[0]] += flops
    stages = list(dict.fromkeys(stage for sums in found.values() for stage in sums))
    rows = tuple((arm, *(report.si(sums.get(stage)) for stage in stages)) for arm, sums in found.items())
    return Sheet("Compute by stage, FLOPs of one run, mean over seeds", ("arm", *stages), rows)


def _share(value: float, whole: float) -> str:
    return f"{value / whole:.0%}" if whole else "\N{EN DASH}"


def _spread(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{100 * value:.1f}"


def _interval(d: Difference) -> str:
    return f"{report.points(d.difference)} [{report.points(d.low)}, {report.points(d.high)}]"


def _each(values: Sequence[float], signed: bool = False) -> str:
    return " ".join(report.points(value) if signed else f"{100 * value:.1f}" for value in values)


def show(data: AblationData, console: Console) -> None:
    """The tables, and what to know before quoting them."""
    for sheet in sheets(data):
        table = Table(title=sheet.title)
        for i, column in enumerate(sheet.columns):
            table.add_column(column, justify="right" if i else "left", overflow="fold")
        for row in sheet.rows:
            table.add_row(*row)
        console.print(table)
    for note in data.notes:
        console.print(note, highlight=False)


def markdown(data: AblationData) -> str:
    """The tables as they stand in docs/results."""
    parts = [f"# {data.name}", f"Recipe `{data.recipe}`, {data.date}.", *data.notes]
    for sheet in sheets(data):
        lines = [sheet.columns, ("---",) * len(sheet.columns), *sheet.rows]
        parts += [sheet.title, "\n".join(f"| {' | '.join(_cell(text) for text in line)} |" for line in lines)]
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# Pictures.


def render(data: AblationData) -> str:
    """The page's HTML."""
    return report.draw("ablation.html", data=data, sheets=sheets(data), forests=_forests(data))


def _forests(data: AblationData) -> list[tuple[str, Any]]:
    by_task = {task: [d for d in data.differences if d.task == task] for task in data.tasks}
    drawn = {task: [charts.ForestRow(d.label, charts.Mark(d.difference, d.low, d.high)) for d in found]
             for task, found in by_task.items()}  # fmt: skip
    return [(task, report.safe(charts.forest(rows, f"Differences on {task}"))) for task, rows in drawn.items()]


def draw(data: AblationData, path: Path) -> None:
    """The forest plot as a picture: a panel a task, a row a comparison, a small mark a seed."""
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(d.label for d in data.differences))
    size = (2.5 + 3 * len(data.tasks), 1.4 + 0.32 * len(labels))
    figure = Figure(figsize=size, layout="constrained")
    # One scale for all tasks: a tenth of a point must not look like ten.
    panels = figure.subplots(1, len(data.tasks), sharex=True, sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, data.tasks, strict=True):
        _panel(axes, [d for d in data.differences if d.task == task])
        axes.set_title(task, fontsize=9)
    panels[0].set_yticks(range(len(labels)), labels, fontsize=8)
    panels[0].invert_yaxis()
    figure.supxlabel(f"points [95% interval, images resampled], {len(data.seeds)} seed{'s'[:len(data.seeds) > 1]}; "
                     "filled: Holm's p below 0.05", fontsize=8)  # fmt: skip
    figure.savefig(path, dpi=130, metadata={"Software": None})


def _panel(axes: Any, found: Sequence[Difference]) -> None:
    axes.axvline(0, color="0.6", linewidth=1)
    for row, d in enumerate(found):
        color = charts.GENERATION_COLORS[2]
        axes.plot([100 * d.low, 100 * d.high], [row, row], color=color, linewidth=2)
        axes.plot([100 * one for one in d.per_seed], [row] * len(d.per_seed), "|", color="0.35", markersize=7)
        axes.plot(100 * d.difference, row, "o", color=color, markerfacecolor=color if d.holm_p < LEVEL else "white")
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
