"""Reports from MLflow alone: one run's drawn again, or several runs on one page.

A run keeps what its report is drawn from (`report.json`) and its per-question results with itself, so neither the step
store nor the machine that made it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sicog_exp.evaluation import outcomes
from sicog_exp.evaluation.statistics import StatisticsError
from sicog_exp.recipe import TrackingConfig
from sicog_exp.reporting import charts, report
from sicog_exp.reporting.report import ReportData, TaskScore, safe
from sicog_exp.tracking import PARENT, connect, flat

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


class ReportError(ValueError):
    """A run that no report can be drawn of; the message says which and what to do."""


@dataclass(frozen=True)
class Compared:
    """One run on the page; `place` counts from 0 and chooses its letter and colour."""

    place: int
    data: ReportData

    @property
    def letter(self) -> str:
        return chr(ord("A") + self.place)

    @property
    def slot(self) -> int:
        """Of the colours; the first one is G0's grey."""
        return self.place + 1


def rebuild(runs: Sequence[str], out: Path) -> None:
    """Write the report of the runs to `out`. Each one is an MLflow run id, of an experiment or of one of its
    generations, or the run's or recipe's name of one experiment. Raises ReportError."""
    found = [read_run(connect(TrackingConfig()), run) for run in runs]
    page = report.render(found[0]) if len(found) == 1 else render(found)
    out.parent.mkdir(parents=True, exist_ok=True)
    report.write_page(page, out)


def read_run(client: MlflowClient, name: str) -> ReportData:
    """What the report of a run was drawn from. Raises ReportError."""
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    run = find_run(client, name)
    try:
        path = download_artifacts(run_id=run.info.run_id, artifact_path=report.DATA, tracking_uri=client.tracking_uri)
    except (MlflowException, OSError):
        raise ReportError(f"run {run.info.run_id} ({run.info.run_name}, {run.info.status.lower()}) holds no "
                          f"{report.DATA}: it is not finished, or an older version made it; run its recipe again, "
                          "finished steps are not repeated") from None  # fmt: skip
    return report.from_json(Path(path).read_bytes())


def find_run(client: MlflowClient, name: str) -> Run:
    """The experiment's run that `name` means: its id, the id of a run below it, or its or its recipe's name
    where that is one run's."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(name)
    except MlflowException:
        run = _by_name(client, name)
    while run.data.tags.get("sicog.level") != "experiment":
        if PARENT not in run.data.tags:
            raise ReportError(f"run {name} is no experiment of ours; give the id of one, `sicog ui` lists them")
        run = client.get_run(run.data.tags[PARENT])
    return run


def _by_name(client: MlflowClient, name: str) -> Run:
    places = [experiment.experiment_id for experiment in client.search_experiments()]
    quoted = name.replace("'", "")
    wanted = (f"attributes.run_name = '{quoted}'", f"tags.`sicog.recipe` = '{quoted}'")
    found = [client.search_runs(places, f"{one} and tags.`sicog.level` = 'experiment'") for one in wanted]
    runs = list({run.info.run_id: run for some in found for run in some}.values())  # a run may be named as its recipe
    if not runs:
        raise ReportError(f"{name}: neither the id nor the name of a run in {client.tracking_uri}")
    if len(runs) > 1:
        ids = ", ".join(run.info.run_id for run in runs)
        raise ReportError(f"{name}: {len(runs)} runs have this name; give one of their ids: {ids}")
    return runs[0]


def render(found: Sequence[ReportData]) -> str:
    """The page of several runs, the first being what the others are compared with."""
    runs = list(starmap(Compared, enumerate(found)))
    differences, refused = _differences(runs)
    costs = [(run, cost) for run in runs if (cost := report.cost_view(run.data.cost))]
    return report.draw(
        "side_by_side.html", runs=runs, refused=refused, forests=_forests(differences),
        differences=[(_name(other), d) for other, d in differences],
        generations=range(max(len(run.data.generations) for run in runs)), curves=_curves(runs),
        recipe_rows=_recipe_rows(runs), curation=_curation(runs), costs=costs, cost_chart=_cost_chart(costs),
        lineages=[(run, safe(charts.lineage(run.data.lineage, f"Steps of {run.letter}"))) for run in runs
                  if run.data.lineage])  # fmt: skip


Difference = tuple[Compared, outcomes.Comparison]
"""A run, and its last generation's difference to the first run's."""


def _differences(runs: Sequence[Compared]) -> tuple[list[Difference], list[str]]:
    """Last generations against the first run's, by the per-question results in MLflow; and why some cannot be."""
    first, made, refused = runs[0], [], []
    for other in runs[1:]:
        try:
            made += [(other, d) for d in outcomes.compare(first.data.run_id, other.data.run_id)]
        except StatisticsError as error:
            refused.append(f"{_name(other)} is not compared: {error}")
    return made, refused


def _name(other: Compared) -> str:
    return f"{other.letter} \N{MINUS SIGN} A"


def _forests(differences: Sequence[Difference]) -> list[tuple[str, Any]]:
    by_task: dict[str, list[charts.ForestRow]] = {}
    for other, d in differences:
        row = charts.ForestRow(_name(other), charts.Mark(d.difference, d.low, d.high), other.slot)
        by_task.setdefault(d.task, []).append(row)
    return [(task, safe(charts.forest(rows, f"Differences on {task}"))) for task, rows in by_task.items()]


def _curves(runs: Sequence[Compared]) -> list[dict[str, Any]]:
    """One curve chart per task and answer format, a line and a colour per run."""
    keys = dict.fromkeys((t.task, t.format) for run in runs for g in run.data.generations for t in g.tasks)
    length = max(len(run.data.generations) for run in runs)
    made = []
    for task, answer_format in keys:
        title = f"{task}, {report.format_name(answer_format)}"
        rows = [(run, _scores(run.data, task, answer_format, length)) for run in runs]
        series = [charts.Series(run.letter, tuple(map(report.mark_of, scores)), color=charts.generation_color(run.slot))
                  for run, scores in rows]  # fmt: skip
        svg = charts.generation_curve(series, [f"G{g}" for g in range(length)], f"{title}, of every run")
        made.append({"title": title, "svg": safe(svg), "rows": rows})
    return made


def _scores(data: ReportData, task: str, answer_format: str, length: int) -> list[TaskScore | None]:
    found = [report.score_of(generation, task, answer_format) for generation in data.generations]
    return found + [None] * (length - len(found))


def _recipe_rows(runs: Sequence[Compared]) -> list[tuple[str, list[Any]]]:
    """Recipe keys whose values differ, in the recipe's order."""
    recipes = [flat(yaml.safe_load(run.data.recipe_yaml) or {}) for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    rows = [(key, [recipe.get(key, "\N{EN DASH}") for recipe in recipes]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def _curation(runs: Sequence[Compared]) -> list[tuple[Compared, report.Curation, report.CurationGroup, float | None]]:
    return [(run, one, group, report.quality_at_threshold(group))
            for run in runs for one in run.data.curation for group in one.groups]  # fmt: skip


def _cost_chart(costs: Sequence[tuple[Compared, dict[str, Any]]]) -> Any:
    bars = []
    for run, _ in costs:
        stages: dict[str, float] = {}
        for row in run.data.cost.rows if run.data.cost else ():
            stages[row.stage] = stages.get(row.stage, 0.0) + row.seconds
        bars.append((run.letter, list(stages.items())))
    return safe(charts.cost_bars(bars, "Wall time of every run by stage")) if bars else ""
