"""What a search found: its trials ranked, the Pareto front, which keys mattered, and pictures of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from optuna.study import Study
    from optuna.trial import FrozenTrial

BEST = 10
"""Trials in the terminal's table."""
WINNER, OTHERS = "#c0392b", "#9aa5b1"


def finished(search: Study) -> list[FrozenTrial]:
    """Trials that count: complete or pruned. Failed ones are shown, and tried again."""
    from optuna.trial import TrialState

    return search.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def complete(search: Study) -> list[FrozenTrial]:
    """Trials that went through all rungs."""
    return [trial for trial in finished(search) if trial.state.name == "COMPLETE"]


def values_of(trial: FrozenTrial) -> Sequence[float]:
    """A complete trial's objectives; the first one ranks and explains trials, the others draw the Pareto front."""
    return cast(Sequence[float], trial.values)


def ranked(search: Study) -> list[FrozenTrial]:
    """Complete trials, the best by the first objective first."""
    return sorted(complete(search), key=lambda t: values_of(t)[0], reverse=search.directions[0].name == "MAXIMIZE")


def front(search: Study) -> set[int]:
    """Numbers of the trials that no other one beats in every objective; empty where there is one objective."""
    return {trial.number for trial in search.best_trials} if len(search.directions) > 1 else set()


def importances(search: Study) -> dict[str, float]:
    """What makes trials good by the first objective: each key's share, by PED-ANOVA (Optuna's default); empty with too
    few trials or one value."""
    from optuna.importance import get_param_importances

    values = [values_of(trial)[0] for trial in complete(search)]
    if len(values) < 4 or max(values) == min(values):
        return {}
    sign = -1 if search.directions[0].name == "MAXIMIZE" else 1  # the evaluator asks what makes a target low
    found = get_param_importances(search, target=lambda trial: sign * values_of(trial)[0])
    return {key: float(share) for key, share in found.items()}


def names(search: Study) -> list[str]:
    return search.metric_names or [f"objective {i}" for i in range(len(search.directions))]


def shown(values: Mapping[str, Any]) -> str:
    texts = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in values.items()}
    return " ".join(f"{key}={text}" for key, text in texts.items())


def show(name: str, search: Study, console: Console) -> None:
    """The best trials on the development split, and which keys mattered; with several objectives the whole front."""
    on_front, rows = front(search), ranked(search)
    best = f"Pareto front ({len(on_front)})" if on_front else f"best {min(BEST, len(rows))}"
    table = Table(title=f"{name}: the {best} of {len(finished(search))} trials (development split)")
    for column in ("trial", *names(search), "values"):
        table.add_column(column)
    for trial in [t for t in rows if t.number in on_front] or rows[:BEST]:
        table.add_row(str(trial.number), *(f"{value:.4g}" for value in values_of(trial)), shown(trial.params))
    console.print(table)
    for key, share in importances(search).items():
        console.print(f"  {share:4.0%} importance: {key}", highlight=False)


# Pictures.


def draw(name: str, search: Study, keys: Sequence[str], logarithmic: Sequence[str], folder: Path) -> list[Path]:
    """PNG files in `folder`: each key against the first objective with its importance; with several
    objectives the front too."""
    from matplotlib.figure import Figure

    columns = min(4, len(keys))
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(3.3 * columns, 3.1 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    shares = importances(search)
    for axes, key in zip(grid.flat, keys):
        _slice(axes, search, key, shares.get(key))
        if key in logarithmic:
            axes.set_xscale("log")
    for axes in grid.flat[len(keys) :]:
        axes.axis("off")
    for axes in grid[:, 0]:
        axes.set_ylabel(names(search)[0])
    figure.suptitle(f"{name}: {len(complete(search))} whole trials, development split; red: the best", fontsize=10)
    paths = [folder / f"{name}-slices.png"]
    figure.savefig(paths[0], dpi=110)
    return paths + ([_draw_front(name, search, folder)] if len(search.directions) > 1 else [])


def _slice(axes: Axes, search: Study, key: str, share: float | None) -> None:
    trials = [trial for trial in ranked(search) if key in trial.params][::-1]  # the best is drawn last, on top
    values = [trial.params[key] for trial in trials]
    places = [str(value) if isinstance(value, bool | str) else value for value in values]
    colors = [OTHERS] * (len(trials) - 1) + [WINNER] * bool(trials)
    axes.scatter(places, [values_of(trial)[0] for trial in trials], c=colors, s=20)
    axes.set_xlabel(key)
    axes.set_title("" if share is None else f"importance {share:.0%}", fontsize=9)


def _draw_front(name: str, search: Study, folder: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes, on_front = figure.subplots(), front(search)
    trials = sorted(complete(search), key=lambda trial: values_of(trial)[1])
    for color, chosen, size in ((OTHERS, False, 16), (WINNER, True, 26)):
        drawn = [values_of(t) for t in trials if (t.number in on_front) == chosen]
        axes.plot([v[1] for v in drawn], [v[0] for v in drawn], "o-" if chosen else "o", color=color,
                  markersize=size**0.5, linewidth=1)  # fmt: skip
    axes.set_xlabel(names(search)[1])
    axes.set_ylabel(names(search)[0])
    axes.set_title(f"{name}: Pareto front (red), development split", fontsize=10)
    path = folder / f"{name}-front.png"
    figure.savefig(path, dpi=110)
    return path
