"""Should the loop go on? The recipe's stop rules, from finished artifacts alone: a killed run that is continued stops
where an unbroken one does.

Nothing here looks at the benchmark: a run that chose its last generation by it would have no result left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sicog_exp.curation.diversity import collapse_alarms
from sicog_exp.recipe import Recipe
from sicog_exp.store import Artifact


class Generation(Protocol):
    """A model of the lineage (`loop.Generation`)."""

    @property
    def index(self) -> int: ...
    @property
    def development(self) -> Artifact | None: ...


class Lineage(Protocol):
    """What a run made so far (`loop.Lineage`, which stands above this room)."""

    @property
    def data(self) -> Artifact: ...
    @property
    def generations(self) -> Sequence[Generation]: ...
    @property
    def curated(self) -> Sequence[Artifact]: ...


def decides_by_scores(recipe: Recipe, index: int) -> bool:
    """Whether generation `index` must be scored on the development split; the last one possible decides nothing."""
    return recipe.stop.no_gain and index < recipe.iterations and recipe.iterations > 1


def reason_to_stop(recipe: Recipe, lineage: Lineage, done: Sequence[tuple[int, Artifact]]) -> str:
    """Why no generation should follow the last one, in a sentence; "" to go on, or where none would follow anyway.

    `done` lists (generation, artifact) of every step of the run.
    """
    last = lineage.generations[-1].index
    if last >= recipe.iterations:
        return ""
    rules = (_no_gain(recipe, lineage), _collapse(recipe, lineage), _budget(recipe, done))
    reasons = " ".join(rule for rule in rules if rule)
    return f"Stopped at G{last} of at most G{recipe.iterations}: {reasons}" if reasons else ""


def _no_gain(recipe: Recipe, lineage: Lineage) -> str:
    from sicog_exp.evaluation.compare import mean_gain

    before, after = lineage.generations[-2:]
    if not recipe.stop.no_gain or before.development is None or after.development is None:
        return ""
    gain = mean_gain(before.development.path, after.development.path, recipe.evaluation.bootstrap)
    if gain.low > 0:
        return ""
    low, high = 100 * gain.low, 100 * gain.high
    return (f"no gain beyond noise on the development split (G{after.index} - G{before.index}: "
            f"{100 * gain.difference:+.1f} points [{low:+.1f}, {high:+.1f}]).")  # fmt: skip


def _collapse(recipe: Recipe, lineage: Lineage) -> str:
    if not recipe.stop.collapse:
        return ""
    curated = [artifact.path for artifact in lineage.curated]
    return " ".join(collapse_alarms(curated, lineage.data.path, recipe.tracking.collapse_alarm))


def _budget(recipe: Recipe, done: Sequence[tuple[int, Artifact]]) -> str:
    """Work that several generations share, or that an earlier run did, was spent once."""
    budget = recipe.stop.budget_flops
    spent = sum({artifact.fingerprint: artifact.facts.get("flops", 0.0) for _, artifact in done}.values())
    if budget is None or spent < budget:
        return ""
    return f"{spent:.3g} FLOPs are spent, of a budget of {budget:.3g}."
