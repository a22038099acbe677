"""Does the loop help, and does curation? Three arms over several seeds, compared at equal training steps.

Arms: the recipe as it is (curated); a random candidate of each item instead of the curated one; annotated rows alone
for the same number of steps. All share one store, so G0 and the first pool are made once per seed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sicog_exp.experiment import SUMMARY, run_experiment
from sicog_exp.recipe import Recipe, RecipeError, StopConfig
from sicog_exp.store import Artifact, Store

ARMS = ("curated", "random candidate", "annotated only")


def arm_recipe(recipe: Recipe, arm: str, seed: int) -> Recipe:
    """The recipe of one arm and seed."""
    named = replace(recipe, seed=seed, name=f"{recipe.name}-{arm.replace(' ', '-')}")
    if arm == "random candidate":
        return replace(named, curation=replace(recipe.curation, select="random"))
    return replace(named, self_data=False) if arm == "annotated only" else named


def gather(recipe: Recipe, seeds: Sequence[int], console: Console) -> dict[str, list[list[Path]]]:
    """arm -> per seed the evaluation folders of its generations; runs what is missing."""
    store = Store(recipe.store)
    found: dict[str, list[list[Path]]] = {arm: [] for arm in ARMS}
    for seed in seeds:
        for arm in ARMS:
            console.rule(f"{arm}, seed {seed}")
            finished = run_experiment(arm_recipe(recipe, arm, seed), console)
            found[arm].append(_evaluations(store, finished))
    return found


def _evaluations(store: Store, finished: Artifact) -> list[Path]:
    return [store.root / name for name in json.loads((finished / SUMMARY).read_text())["evaluations"]]


def comparisons(found: dict[str, list[list[Path]]], resamples: int) -> list[dict[str, Any]]:
    """Pooled paired differences per task: last generation against G0, and between the arms' last generations."""
    from sicog_exp.evaluation.compare import pooled

    last = {arm: [seed[-1] for seed in seeds] for arm, seeds in found.items()}
    first = [seed[0] for seed in found["curated"]]
    pairs = [("G0", "curated", first, last["curated"])]
    pairs += [(arm, "curated", last[arm], last["curated"]) for arm in ARMS[1:]]
    return [{"before": before, "after": after, "task": task, **asdict(difference)}
            for before, after, a, b in pairs for task, difference in pooled(a, b, resamples).items()]  # fmt: skip


def means(found: dict[str, list[list[Path]]], resamples: int) -> list[dict[str, Any]]:
    """Accuracy of every arm's generations per task, averaged over seeds."""
    from sicog_exp.evaluation.compare import score_table

    rows = []
    for arm, seeds in found.items():
        for index in range(len(seeds[0])):
            tables = [score_table(seed[index], resamples) for seed in seeds]
            for task in tables[0]:
                values = [table[task].overall.mean for table in tables]
                rows.append({"arm": arm, "generation": index, "task": task, "mean": sum(values) / len(values),
                             "per_seed": values})  # fmt: skip
    return rows


def _check(recipe: Recipe, out: Path) -> None:
    """What would be known only after hours. Raises RecipeError."""
    if recipe.iterations < 1:
        raise RecipeError("iterations=0: the arms differ from G1 on; use iterations=1 or more")
    if not recipe.self_data:
        raise RecipeError("self_data=false: this is the arm without self-data, which is run anyway; leave it out")
    if recipe.stop != StopConfig():
        raise RecipeError("stop: arms that end at different generations are not compared at equal steps; leave stop.* "
                          "out and set iterations")  # fmt: skip
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"--out {out}: {error.strerror}: {error.filename}; name a file that can be written") from None
    if out.is_dir():
        raise RecipeError(f"--out {out}: a folder; name a file, such as {out / 'evidence.json'}")


def run_evidence(recipe: Recipe, seeds: Sequence[int], out: Path, console: Console) -> None:
    """Run or read all arms and seeds; print the comparisons and write them to `out` as JSON."""
    _check(recipe, out)
    found = gather(recipe, seeds, console)
    resamples = recipe.evaluation.bootstrap
    result = {"recipe": recipe.name, "split": recipe.evaluation.split, "seeds": list(seeds),
              "means": means(found, resamples), "comparisons": comparisons(found, resamples)}  # fmt: skip
    out.write_text(json.dumps(result, indent=1) + "\n")
    show(result, console)
    console.print(f"written to {out}")


def show(result: dict[str, Any], console: Console) -> None:
    scores = Table(title=f"Accuracy, %, mean over seeds {result['seeds']} ({result['split']} split)")
    for column in ("arm", "generation", "task", "mean", "per seed"):
        scores.add_column(column)
    for row in result["means"]:
        each = " ".join(f"{100 * value:.1f}" for value in row["per_seed"])
        scores.add_row(row["arm"], f"G{row['generation']}", row["task"], f"{100 * row['mean']:.1f}", each)
    console.print(scores)
    table = Table(title="Paired differences, points [95% interval, images resampled]")
    for column in ("after - before", "task", "difference", "per seed"):
        table.add_column(column)
    for row in result["comparisons"]:
        interval = f"{100 * row['difference']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
        each = " ".join(f"{100 * value:+.1f}" for value in row["per_seed"])
        table.add_row(f"{row['after']} - {row['before']}", row["task"], interval, each)
    console.print(table)
