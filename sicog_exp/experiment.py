"""One command's worth of work: check, run the loop watched, compare, report, register; or find it all done."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from sicog_exp import cleandata, loop, origins, smoke
from sicog_exp.ahead import check_ahead, left_out
from sicog_exp.interruption import INTERRUPTIONS
from sicog_exp.planning.plan import expected_work
from sicog_exp.progress import Display
from sicog_exp.recipe import PlanConfig, Recipe, RecipeError
from sicog_exp.runner import Runner
from sicog_exp.store import Artifact, Step, Store, Workplace
from sicog_exp.tracking import Tracker, mark_no_op, table_link

if TYPE_CHECKING:
    from sicog_exp.evaluation.compare import ScoreTable

SUMMARY, REPORT = "summary.json", "report.html"
MEAN_ACCURACY = "accuracy/mean"
REVISION = 2
REPRODUCE = "sicog iterate recipe.yaml   # the resolved recipe, logged with the run"
WEIGHTS_IN_TRAINING = 4
"""Copies of the weights that full training holds: weights, gradients, two AdamW moments."""


@dataclass(frozen=True)
class Part:
    """A run's place in a study: under the study's run in MLflow, by a name and tags that tell it from the others."""

    study_run: str
    name: str
    tags: Mapping[str, str]


def run_experiment(recipe: Recipe, console: Console, part: Part | None = None) -> Artifact:
    """Run the recipe, or continue it, or say that nothing is to be done. The artifact holds summary and report."""
    recipe = smoke.sized(recipe)
    check_memory(recipe)
    store = Store(recipe.store)
    step = experiment_step(recipe, store, console, part)
    finished = whole(store, step, recipe.name, console)
    if finished is None:
        check_ahead(recipe)
        if recipe.scale == "smoke":
            console.print(smoke.swapped(recipe), highlight=False)
        if unasked := left_out(recipe):
            console.print(unasked)
        finished = store.run(step)
    elif part is None:
        mark_no_op(recipe.tracking, json.loads((finished / SUMMARY).read_text())["run_id"])
    show(finished, console)
    return finished


def whole(store: Store, step: Step, name: str, console: Console) -> Artifact | None:
    """What finished before, which is said; None for what is to be run, its damaged artifact moved aside."""
    finished = store.find(step)
    if finished and intact(store, finished):
        console.print(f"{name}: finished before, nothing to do. Delete {finished.path} to report again.")
        return finished
    if finished:
        store.set_aside(finished.path, "a step it was made of is damaged")
    return None


def experiment_step(recipe: Recipe, store: Store, console: Console, part: Part | None = None) -> Step:
    """The whole run as one step: it is finished when its report is."""
    steps_of = replace(recipe, plan=PlanConfig())  # which no step reads
    data, base = origins.data_step(recipe), origins.base_step(recipe)
    identity = {"recipe": steps_of, "data": data.identity, "base": base.identity, **_beside(recipe)}

    def run(config: Any, inputs: Mapping[str, Artifact], workplace: Workplace) -> None:
        _run(recipe, store, workplace, console, part)

    return Step("iterate", run, identity, seed=recipe.seed, revision=REVISION)


def _beside(recipe: Recipe) -> dict[str, Any]:
    """What files that the recipe only names hold now: an edited suite or encoder is a new run."""
    from sicog_exp.curation.embeddings import encoder_state
    from sicog_exp.evaluation.suites import suite_state

    encoder = recipe.curation.encoder
    encoded = {"encoder": encoder_state(encoder)} if recipe.self_data and encoder != "lexical" else {}
    return {"benchmarks": suite_state(recipe.evaluation.suite, recipe.evaluation.judge), **encoded}


def _run(recipe: Recipe, store: Store, workplace: Workplace, console: Console, part: Part | None) -> None:
    started = time.time()
    tracker = Tracker(recipe, part.study_run, part.name, part.tags) if part else Tracker(recipe)
    try:
        with Display(expected_work(recipe), console) as display:
            runner = Runner(store, tracker, display)
            lineage = loop.iterate(recipe, runner)
        _conclude(recipe, lineage, runner, workplace, time.time() - started)
    except BaseException as error:
        tracker.finish("KILLED" if isinstance(error, INTERRUPTIONS) else "FAILED")
        raise
    tracker.finish()


def _conclude(recipe: Recipe, lineage: loop.Lineage, runner: Runner, workplace: Workplace, wall: float) -> None:
    """Compare the generations, log and register them under the same names, report."""
    from sicog_exp.evaluation import compare
    from sicog_exp.reporting import collect, report

    tracker, folder, resamples = runner.tracker, workplace.directory, recipe.evaluation.bootstrap
    tables = [compare.score_table(generation.scores.path, resamples) for generation in lineage.generations]
    _log_generations(recipe, lineage, runner, tables)
    summary = summarized(recipe, lineage, runner, tables) | {
        "wall_seconds": wall,
        "orchestration_share": orchestration_share(runner, wall),
    }
    tracker.promote(summary["champion"])
    tracker.log_metrics(tracker.run_id, cleandata.contamination_metrics(runner.done))
    for name, words in (("alarm", " ".join(summary["alarms"])), ("stopped", lineage.stopped)):
        if words:
            tracker.client.set_tag(tracker.run_id, f"sicog.{name}", words[:5000])
    log_datasets(recipe, lineage, tracker)
    page = collect.collect(
        recipe, lineage, runner.done, run_id=tracker.run_id, run_uri=str(tracker.client.tracking_uri),
        date=date.today().isoformat(), reproduce=REPRODUCE,
        orchestration_share=summary["orchestration_share"],
        watched=[*filter(None, [lineage.stopped]), *summary["alarms"], *summary["contamination"]])  # fmt: skip
    report.write_report(page, folder / REPORT)
    (folder / report.DATA).write_bytes(report.to_json(page))
    (folder / SUMMARY).write_text(json.dumps(summary, indent=1, default=float))
    for name in (REPORT, report.DATA, SUMMARY):
        tracker.log_file(folder / name)


def _log_generations(recipe: Recipe, lineage: loop.Lineage, runner: Runner, tables: Sequence[ScoreTable]) -> None:
    """Each generation's metrics, origin, model and answers on its own run."""
    from sicog_exp.evaluation import compare
    from sicog_exp.reporting import collect, costs

    tracker = runner.tracker
    scores = {g.index: compare.metrics(table) for g, table in zip(lineage.generations, tables, strict=True)}
    means = {index: headline(found)[MEAN_ACCURACY] for index, found in scores.items()}
    spent = costs.metrics(collect.cost_rows(runner.done), means)
    for generation in lineage.generations:
        index, found = generation.index, scores[generation.index]
        curated = lineage.curated[index - 1] if index and lineage.curated else None
        known = collect.curation_metrics(curated, lineage.data, recipe.evaluation.bootstrap) if curated else {}
        tracker.log_generation(index, headline(found) | found | known | spent.get(index, {}))
        tracker.log_origin(index, origin(lineage, runner, index))
        tracker.register(index, generation.model)
        tracker.log_file(generation.scores / "samples.jsonl", "eval", index)


def summarized(recipe: Recipe, lineage: loop.Lineage, runner: Runner, tables: Sequence[ScoreTable]) -> dict[str, Any]:
    """What `summary.json` holds, its times apart."""
    from sicog_exp.evaluation import compare
    from sicog_exp.reporting import collect

    resamples, scored = recipe.evaluation.bootstrap, [generation.scores.path for generation in lineage.generations]
    return trust(recipe, lineage, runner) | {
        "stopped": lineage.stopped,
        "upper_bound": collect.upper_bound_note(recipe),
        "smoke": collect.smoke_note(recipe),
        "run_id": runner.tracker.run_id,
        "experiment_id": runner.tracker.experiment_id,
        "champion": compare.champion(scored, resamples),
        "generations": [{task: vars(score.overall) for task, score in table.items()} for table in tables],
        "deltas": [vars(delta) for delta in compare.deltas(scored, resamples)],
        "artifacts": sorted({artifact.path.name for _, artifact in runner.done}),
        "evaluations": [path.name for path in scored],
        "models": [generation.model.path.name for generation in lineage.generations],
    }


def trust(recipe: Recipe, lineage: loop.Lineage, runner: Runner) -> dict[str, Any]:
    """What was watched: overlaps of training rows with benchmarks, and alarms of collapsing self-data."""
    from sicog_exp.curation.diversity import collapse_alarms

    curated = [artifact.path for artifact in lineage.curated]
    return {"contamination": cleandata.contamination_notes(runner.done, recipe.data.exclude_contaminated),
            "alarms": collapse_alarms(curated, lineage.data.path, recipe.tracking.collapse_alarm)}  # fmt: skip


def headline(scores: Mapping[str, float]) -> dict[str, float]:
    """`accuracy/<task>` and their mean: the group of charts that the UI, which sorts by name, shows first."""
    parts = [(name.split("/"), value) for name, value in scores.items()]
    means = {f"accuracy/{part[1]}": value for part, value in parts if len(part) == 3 and part[2] == "accuracy"}
    return {MEAN_ACCURACY: sum(means.values()) / len(means), **means}


def origin(lineage: loop.Lineage, runner: Runner, index: int) -> dict[str, str]:
    """What a generation was made of: folders of the store, and digests of what curated rows and weights hold."""
    folders = {artifact.fingerprint: artifact.path.name for _, artifact in runner.done}
    base = next(artifact for _, artifact in runner.done if artifact.name == "base")
    model = lineage.generations[index].model
    known = {"base": base.path.name, "data": lineage.data.path.name, "model": model.path.name, "weights": model.content}
    if index and lineage.curated:
        curated = lineage.curated[index - 1]
        inputs = curated.manifest["inputs"]
        pools = [folders[inputs[name]] for name in sorted(inputs) if name.startswith("pool")]
        known |= {"pools": " ".join(pools), "curated": curated.path.name, "curated_digest": curated.content}
    return known


def log_datasets(recipe: Recipe, lineage: loop.Lineage, tracker: Tracker) -> None:
    """The split that each generation was scored on and, from G1 on, the self-generated rows it was pre-trained on."""
    from sicog_exp.curation.calibration import DRAWN
    from sicog_exp.records import RecordFile
    from sicog_exp.reporting.curation_page import SELF_DATA, drawn_lines

    split = recipe.evaluation.split
    scored_rows = len(RecordFile(lineage.data / f"{split}.parquet"))
    tracker.log_dataset(tracker.run_id, split, lineage.data, "evaluation", scored_rows)
    for generation in lineage.generations:
        run_id = tracker.generation(generation.index)
        tracker.log_dataset(run_id, split, lineage.data, "evaluation", scored_rows)
        if generation.index and lineage.curated:
            curated = lineage.curated[generation.index - 1]
            tracker.log_dataset(run_id, "self-data", curated, "training", len(RecordFile(curated / "self.parquet")))
            for name in ("self.parquet", SUMMARY):  # the texts outlive the store
                tracker.log_file(curated / name, SELF_DATA, generation.index)
            tracker.client.log_text(run_id, drawn_lines(curated.path), f"{SELF_DATA}/{DRAWN}")


def orchestration_share(runner: Runner, wall: float) -> float:
    """Share of the wall time in which no model computed: storing, tracking, curating, rendering, importing."""
    made = [artifact.facts for _, artifact in runner.done if not artifact.cached]
    computed = sum(facts.get("model_seconds", 0.0) for facts in made)
    wall += sum(facts.get("earlier_seconds", 0.0) for facts in made)  # of killed runs that this one continued
    return max(0.0, 1 - computed / wall) if wall > 0 else 0.0


def intact(store: Store, finished: Artifact) -> bool:
    """Whether every artifact behind a finished run still is what it was; damaged ones are moved aside."""
    names = json.loads((finished / SUMMARY).read_text())["artifacts"]
    whole = [store.check(name) for name in names]  # every one is looked at
    return all(whole)


def check_memory(recipe: Recipe) -> None:
    """Raises RecipeError for a model whose training cannot fit this machine's memory."""
    import psutil

    files: list[Path] = []
    for folder in origins.base_folders(recipe):
        weights = [path for path in origins.model_files(folder) if path.suffix in (".safetensors", ".gguf")]
        if not weights:
            raise RecipeError(f"model.base={recipe.model.base}: no safetensors weights in {folder}")
        files += weights
    stages = [stage for stage in (recipe.develop, recipe.preference, recipe.align, recipe.pretrain, recipe.instruct)
              if stage.steps]  # fmt: skip
    # The language model is nearly all of a large model; by adapters alone it needs no more than its weights.
    in_full = any(stage.language_lr and not (stage.lora_rank and "language" in stage.lora_parts) for stage in stages)
    need = (WEIGHTS_IN_TRAINING if in_full else 1) * sum(path.stat().st_size for path in files)
    if recipe.model.torch_device == "cpu" and need > psutil.virtual_memory().total:
        has = psutil.virtual_memory().total / 1e9
        name = recipe.model.language or recipe.model.base
        raise RecipeError(f"model.base={name}: training needs about {need / 1e9:.0f} GB for weights, "
                          f"gradients and optimizer; this machine has {has:.0f} GB. Use a smaller model, a larger "
                          "machine or adapters (lora_rank of every stage)")  # fmt: skip


def show(finished: Artifact, console: Console) -> None:
    """The table of generations, where the report is, how to open the UI."""
    summary = json.loads((finished / SUMMARY).read_text())
    table = Table(title="Accuracy, % [95% interval, images resampled]")
    table.add_column("task", no_wrap=True)
    for index in range(len(summary["generations"])):
        title = " (champion)" if index == summary["champion"] else ""
        table.add_column(f"G{index}{title}", justify="right", no_wrap=True)
    for task in summary["generations"][0]:
        table.add_row(task, *(_cell(generation[task]) for generation in summary["generations"]))
    console.print(table)
    for delta in summary["deltas"]:
        if delta["before"] == "G0" and delta["after"] == f"G{len(summary['generations']) - 1}":
            low, high = 100 * delta["low"], 100 * delta["high"]
            names = f"{delta['after']} - {delta['before']}  {delta['task']}"
            points = f"{100 * delta['difference']:+.1f} points [{low:+.1f}, {high:+.1f}]"
            console.print(f"{names}: {points}", highlight=False)
    if summary.get("stopped"):
        console.print(summary["stopped"], highlight=False)
    if summary.get("upper_bound"):
        console.print(f"[bold red]UPPER BOUND[/] {summary['upper_bound']}", highlight=False)
    if summary.get("smoke"):
        console.print(f"[bold red]SMOKE TEST[/] {summary['smoke']}", highlight=False)
    for text in summary["alarms"]:
        console.print(f"[bold red]ALARM[/] {text}", highlight=False)
    for text in summary["contamination"]:
        console.print(text, highlight=False)
    share, wall = summary["orchestration_share"], summary["wall_seconds"]
    console.print(f"orchestration: {share:.0%} of {wall:.0f} s", highlight=False)
    console.print(f"report: {finished / REPORT}", highlight=False)
    console.print(f"MLflow run {summary['run_id']}; open the UI with `make ui` (127.0.0.1:5000)", highlight=False)
    if "experiment_id" in summary:
        table_of = table_link(summary["experiment_id"], MEAN_ACCURACY)
        console.print(f"all generations, best first: http://127.0.0.1:5000/{table_of}", highlight=False)


def _cell(score: Mapping[str, float]) -> str:
    return f"{100 * score['mean']:.1f} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"
