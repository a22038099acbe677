"""What a report shows, gathered from a finished run's artifacts. Nothing is sampled, trained or scored here."""

from __future__ import annotations

import io
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from sicog_exp.curation import calibration, diversity
from sicog_exp.curation.calibration import Calibration
from sicog_exp.curation.curate import Group
from sicog_exp.curation.diagnosis import Diagnosis, Truth, diagnose, final_of, quality, read_truth
from sicog_exp.data.images import open_image
from sicog_exp.evaluation import compare
from sicog_exp.evaluation.benchmarks import Sample as Answered
from sicog_exp.evaluation.benchmarks import read_samples
from sicog_exp.evaluation.statistics import RESAMPLES
from sicog_exp.prompts import KINDS, Kind, normalize_answer, question_of
from sicog_exp.recipe import Recipe, to_yaml
from sicog_exp.records import RecordFile, read_jsonl
from sicog_exp.reporting.costs import Cost, CostRow
from sicog_exp.reporting.curation_page import calibrated
from sicog_exp.reporting.report import (
    Answer,
    BestScore,
    Curation,
    CurationGroup,
    Delta,
    FamilyScore,
    GenerationScores,
    Node,
    Question,
    ReportData,
    Sample,
    SampleCandidate,
    TaskScore,
)
from sicog_exp.row_index import RowIndex
from sicog_exp.store import Artifact

T = TypeVar("T")

GALLERY_SIZE = 24
SMALL, LARGE, ENLARGED = 128, 256, 3
"""Pictures up to SMALL pixels a side are shown ENLARGED times, others at most LARGE pixels."""
SETTINGS = {"select": "choice", "threshold_by": "threshold by", "near_duplicate": "near-duplicate limit",
            "require_direct_agreement": "direct agreement required", "require_format": "format required"}  # fmt: skip
"""Keys of the curation config that the report names."""


class Generation(Protocol):
    """A model of the lineage (`loop.Generation`)."""

    @property
    def index(self) -> int: ...
    @property
    def scores(self) -> Artifact: ...


class Lineage(Protocol):
    """What a run made (`loop.Lineage`, which stands above this room)."""

    @property
    def data(self) -> Artifact: ...
    @property
    def generations(self) -> Sequence[Generation]: ...
    @property
    def curated(self) -> Sequence[Artifact]: ...


def collect(recipe: Recipe, lineage: Lineage, done: Sequence[tuple[int, Artifact]], *, run_id: str, run_uri: str,
            date: str, reproduce: str, orchestration_share: float | None,
            watched: Sequence[str] = ()) -> ReportData:  # fmt: skip
    """Everything that the report of a finished run shows. `done` lists (generation, artifact) of every step, `watched`
    what the run's alarms and checks say."""
    resamples = recipe.evaluation.bootstrap
    generations = _generations(lineage, resamples)
    return ReportData(
        name=recipe.name,
        recipe_yaml=to_yaml(recipe),
        date=date,
        generations=generations,
        run_id=run_id,
        run_uri=run_uri,
        reproduce=reproduce,
        libraries=_libraries(lineage.generations[-1].scores),
        deltas=_deltas(lineage, resamples),
        curation=tuple(_curation(i, curated, lineage.data) for i, curated in enumerate(lineage.curated)),
        cost=Cost(cost_rows(done), orchestration_share, _device(recipe, lineage.generations[-1].scores)),
        gallery=_gallery(recipe, lineage) if lineage.curated else (),
        calibration=tuple(_calibrated(one.path, lineage.data.path, resamples) for one in lineage.curated),
        diversity=tuple(diversity.read_diversity(one.path, lineage.data.path) for one in lineage.curated),
        questions=_questions(recipe, lineage),
        lineage=_nodes(done),
        notes=(*watched, *_notes(recipe, lineage, generations[-1])),
        upper_bound=upper_bound_note(recipe),
        smoke=smoke_note(recipe),
    )


def curation_metrics(curated: Artifact, data: Artifact, resamples: int = RESAMPLES) -> dict[str, float]:
    """One iteration's curation under the names that every generation uses; what is unknown is left out.

    `precision_*` needs the truth: the share of right answers, or of true statements in captions; `ceiling_share` is
    how far the choice goes from a random candidate (0) to the best one (1).
    """
    named = diversity.metrics(diversity.read_diversity(curated.path, data.path))
    named |= calibration.metrics(_calibrated(curated.path, data.path, resamples))
    for group, found in _diagnosed(curated.path, data.path).items():
        values = {
            "keep_rate": found.keep_rate,
            "kept": found.kept,
            "mean_score": found.mean_score,
            "precision_kept": found.precision_kept,
            "precision_chosen": found.precision_chosen,
            "precision_random": found.precision_random,
            "precision_oracle": found.precision_oracle,
            "ceiling_share": found.ceiling_share,
            "unanimous_share": found.unanimous_share,
            "unanimous_precision": found.unanimous_precision,
        }
        named |= {f"curation/{group}/{name}": float(value) for name, value in values.items() if value is not None}
    return named


@lru_cache(maxsize=16)
def _diagnosed(curated: Path, data: Path) -> dict[Group, Diagnosis]:
    """Metrics and report ask for the same diagnosis; a finished artifact's path names what it holds."""
    return diagnose(curated, data)


@lru_cache(maxsize=16)
def _calibrated(curated: Path, data: Path, resamples: int) -> dict[Group, Calibration]:
    return calibrated(curated, read_truth(data), resamples, curated / "pool.jsonl")


# Scores.


def _generations(lineage: Lineage, resamples: int) -> tuple[GenerationScores, ...]:
    priors = _priors(lineage)
    tables = [(g.index, compare.score_table(g.scores.path, resamples)) for g in lineage.generations]
    return tuple(GenerationScores(index, tuple(_task(score, priors[name]) for name, score in table.items()))
                 for index, table in tables)  # fmt: skip


def _task(score: compare.TaskTable, priors: Mapping[str, float]) -> TaskScore:
    families = tuple(FamilyScore(name, family.mean, family.low, family.high, family.n, priors.get(name))
                     for name, family in score.families.items())  # fmt: skip
    overall = score.overall
    name, kind = _name(score.task, score.format), _format(score.format)
    return TaskScore(name, kind, overall.mean, overall.low, overall.high, overall.n, families)


def _deltas(lineage: Lineage, resamples: int) -> tuple[Delta, ...]:
    found = compare.deltas([generation.scores.path for generation in lineage.generations], resamples)
    return tuple(Delta(d.before, d.after, _name(d.task, d.format), _format(d.format), d.difference, d.low, d.high, d.n,
                       d.mcnemar_p, d.holm_p) for d in found)  # fmt: skip


def _name(task: str, answer_format: str) -> str:
    """A task without its format, so that `sicog_world_direct` and `sicog_world_cot` share their charts."""
    return re.sub(rf"_{answer_format}(?=_|$)", "", task) if answer_format else task


def _format(answer_format: str) -> str:
    return answer_format or "as asked"  # lmms-eval's own tasks word their prompts themselves


def _priors(lineage: Lineage) -> dict[str, dict[str, float]]:
    """Blind priors by task and family: the data set's own for its own questions (families of other sets may have the
    same names), for other tasks those of their own targets."""
    known = json.loads((lineage.data / "summary.json").read_text(encoding="utf-8"))["blind_prior"]
    ids = {r.id for split in ("benchmark", "development") for r in RecordFile(lineage.data / f"{split}.parquet")}
    tasks: dict[str, list[Answered]] = defaultdict(list)
    for sample in read_samples(lineage.generations[0].scores.path):
        tasks[sample.task].append(sample)
    shares = {family: prior["share"] for family, prior in known.items()}
    return {task: shares if all(sample.id in ids for sample in samples) else _most_common_shares(samples)
            for task, samples in tasks.items()}  # fmt: skip


def _most_common_shares(samples: Sequence[Answered]) -> dict[str, float]:
    targets: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        targets[sample.family][normalize_answer(sample.target)] += 1
    return {family: max(counts.values()) / counts.total() for family, counts in targets.items()}


# Curation.


def _curation(iteration: int, curated: Artifact, data: Artifact) -> Curation:
    summary = _summary(curated)
    config, thresholds = summary["config"], summary["thresholds"]
    groups = tuple(_group(found, thresholds[group] if config["select"] == "best" else 0.0)
                   for group, found in _diagnosed(curated.path, data.path).items())  # fmt: skip
    scorers = [(f"{group} scored by", _scorer(config, group)) for group in ("caption", "reasoning")]
    settings = (*scorers, *((name, _setting(config[key])) for key, name in SETTINGS.items()))
    return Curation(iteration, summary["encoder"], config["include_self"], groups, _set_aside(summary), settings)


def _group(found: Diagnosis, threshold: float) -> CurationGroup:
    """A random choice keeps every item whatever its score: its threshold is 0."""
    best = tuple(BestScore(c.score, c.quality.precision if c.quality else None) for c in found.choices)
    return CurationGroup(found.group, threshold, found.kept, best, found.precision_random, found.quality_name,
                         found.precision_oracle, found.ceiling_share)  # fmt: skip


def _scorer(config: Mapping[str, Any], group: str) -> str:
    """A group's scorer with what is blended into it: agreement + 0.5 likelihood."""
    others = (f"{weight:g} {name}" for name, weight in config[f"{group}_blend"].items())
    return _words(" + ".join((config[f"{group}_scorer"], *others)))


def _setting(value: Any) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _set_aside(summary: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
    """Candidates that took no part, and items not kept, by reason."""
    candidates = [(f"candidates {_words(reason)}", count) for reason, count in summary["set_aside"].items()]
    items = [(f"items {_words(reason)}", count) for reason, count in summary["not_kept"].items()]
    return (*candidates, *items)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _summary(artifact: Artifact) -> dict[str, Any]:
    return json.loads((artifact / "summary.json").read_text(encoding="utf-8"))


# Cost and origin.


def cost_rows(done: Sequence[tuple[int, Artifact]]) -> tuple[CostRow, ...]:
    """One row per artifact: a step that several generations share was paid once, by the first."""
    first: dict[str, tuple[int, Artifact]] = {}
    for generation, artifact in done:
        first.setdefault(artifact.fingerprint, (generation, artifact))
    return tuple(_cost_row(generation, artifact) for generation, artifact in first.values())


def _cost_row(generation: int, artifact: Artifact) -> CostRow:
    facts = artifact.facts
    counts = {name: int(facts[name]) if name in facts else None
              for name in ("samples", "tokens", "prompt_tokens", "image_tokens", "new_tokens")}  # fmt: skip
    return CostRow(generation, artifact.name, facts["seconds"], flops=facts.get("flops"), peak_mb=facts.get("peak_mb"),
                   peak_gpu_mb=facts.get("peak_gpu_mb"), cached=artifact.cached, device=artifact.device,
                   **counts)  # fmt: skip


def _nodes(done: Sequence[tuple[int, Artifact]]) -> tuple[Node, ...]:
    """The steps in the order of work; one that several generations read belongs to the first."""
    first: dict[str, Node] = {}
    for generation, artifact in done:
        inputs = tuple(artifact.manifest["inputs"].values())
        first.setdefault(artifact.fingerprint, Node(generation, artifact.name, artifact.fingerprint, inputs))
    return tuple(first.values())


def _device(recipe: Recipe, artifact: Artifact) -> str:
    machine = f" ({artifact.manifest['machine']})" if recipe.model.torch_device == "cpu" else ""
    return f"{recipe.model.device_name}{machine}"


def _libraries(artifact: Artifact) -> dict[str, str]:
    return {**artifact.manifest["libraries"], "python": artifact.manifest["python"]}


# The gallery.


def _gallery(recipe: Recipe, lineage: Lineage) -> tuple[Sample, ...]:
    """Items of the last iteration, drawn by the recipe's seed, groups and outcomes in turn."""
    curated, iteration = lineage.curated[-1], len(lineage.curated) - 1
    pool, scored = RowIndex([curated / "pool.jsonl"]), RowIndex([curated / "scores.jsonl"])
    truths, samples = read_truth(lineage.data.path), []
    for verdict in _drawn(curated / "curated.jsonl", recipe.seed):
        id, truth = verdict["id"], truths.get(verdict["id"])
        rows = pool.rows(id)[0]["candidates"]
        scores = {row["position"]: row["score"] for row in scored.rows(id)}
        candidates = _candidates(verdict, rows, [scores.get(i) for i in range(len(rows))], truth)
        image = verdict["image"]
        png = _png(lineage.data.path, image, recipe.data.max_pixels) if image else None
        question = verdict["prompt"] if verdict["kind"] == "reasoning" else ""
        samples.append(Sample(id, iteration, verdict["kind"], verdict["kept"], candidates, question,
                              truth.text if truth else None, png, truth.family if truth else ""))  # fmt: skip
    return tuple(samples)


def _questions(recipe: Recipe, lineage: Lineage) -> tuple[Question, ...]:
    """Benchmark questions with all generations' answers, drawn by the recipe's seed: changes and tasks in turn."""
    answered = [{(s.task, s.id): s for s in read_samples(g.scores.path)} for g in lineage.generations]
    asked = sorted(set.intersection(*(set(one) for one in answered)))
    made = [_question([one[key] for one in answered], lineage) for key in asked]
    drawn = _in_turn(made, lambda q: (q.change, q.task, q.format), recipe.seed)
    root, pictures = lineage.data.path, {key: answered[0][key].image for key in asked}
    return tuple(replace(q, png=_picture(root, pictures[q.task, q.id], recipe.data.max_pixels)) for q in drawn)


def _question(samples: Sequence[Answered], lineage: Lineage) -> Question:
    first = samples[0]
    answers = tuple(Answer(g.index, s.answer, s.correct == 1) for g, s in zip(lineage.generations, samples))
    asked = question_of(cast(Kind, first.format), first.prompt) if first.format in KINDS else first.prompt
    return Question(first.id, first.task, first.format, first.family, asked, first.target, answers)


def _picture(root: Path, name: str, max_pixels: int) -> bytes | None:
    """The picture of a question, where it is one of the data set's own."""
    return _png(root, name, max_pixels) if name and (root / name).is_file() else None


def _drawn(verdicts: Path, seed: int, size: int = GALLERY_SIZE) -> list[dict[str, Any]]:
    """Rows of a file, as many of every group and outcome as there are; one that runs out leaves its room to the others.

    Numbers are drawn, from a byte a row, and their rows read afterwards.
    """
    names: list[tuple[str, bool]] = []
    cells = bytearray()
    for verdict in read_jsonl(verdicts):
        cell = (verdict["kind"], not verdict["kept"])
        if cell not in names:
            names.append(cell)
        cells.append(names.index(cell))
    drawn = _in_turn(range(len(cells)), lambda number: names[cells[number]], seed, size)
    found = {number: row for number, row in enumerate(read_jsonl(verdicts)) if number in drawn}
    return [found[number] for number in drawn]


def _in_turn(items: Sequence[T], cell: Callable[[T], Any], seed: int, size: int = GALLERY_SIZE) -> list[T]:
    """`size` items in an order drawn by the seed, one of every cell in turn."""
    cells: dict[Any, list[T]] = defaultdict(list)
    for item in random.Random(seed).sample(items, len(items)):
        cells[cell(item)].append(item)
    rounds = zip_longest(*(cells[name] for name in sorted(cells)))
    return list(islice((item for turn in rounds for item in turn if item is not None), size))


def _candidates(verdict: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], scores: Sequence[float | None],
                truth: Truth | None) -> tuple[SampleCandidate, ...]:  # fmt: skip
    """All candidates, those set aside (no score) included. Of several that say the chosen text, the first is marked."""
    wanted = (verdict["chosen_kind"], verdict["chosen"])
    valid = [i for i, score in enumerate(scores) if score is not None]
    chosen = next((i for i in valid if (rows[i]["kind"], rows[i]["text"]) == wanted), None)
    return tuple(SampleCandidate(row["kind"], row["text"], score, row["finish_reason"] or "stop", i == chosen,
                                 _right(verdict["kind"], row, truth) if i in valid else None)
                 for i, (row, score) in enumerate(zip(rows, scores, strict=True)))  # fmt: skip


def _right(group: Group, row: Mapping[str, Any], truth: Truth | None) -> bool | None:
    """Is the answer right, or everything true that the caption states?"""
    return quality(group, final_of(row["kind"], row["text"]), truth.text).precision == 1 if truth else None


def _png(root: Path, name: str, max_pixels: int) -> bytes:
    from PIL.Image import Resampling

    image = open_image(root, name, max_pixels)
    if max(image.size) <= SMALL:
        image = image.resize((ENLARGED * image.width, ENLARGED * image.height), Resampling.NEAREST)
    else:
        image.thumbnail((LARGE, LARGE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


# The notes.


def _notes(recipe: Recipe, lineage: Lineage, last: GenerationScores) -> Iterator[str]:
    """What a reader must know before quoting a number."""
    if recipe.evaluation.split == "development":
        yield "Scored on the development split, which choices were made on: not a result to report."
    yield "One seed: the spread over seeds is not in the intervals."
    yield from _below_prior(last)
    yield from _sureness(recipe, lineage)
    yield from _rejected_rows(lineage.data)
    for iteration, curated in enumerate(lineage.curated):
        yield from _rejected_candidates(iteration, _summary(curated))
    if (lineage.data / "truth.jsonl").stat().st_size and lineage.curated:
        served = "chose the self-data here" if recipe.is_upper_bound else "serves this diagnosis alone"
        yield f"Qualities of candidates come from the truth of unlabeled items, which {served}."


def upper_bound_note(recipe: Recipe) -> str:
    """What to say of a run whose self-data the truth chose; "" for any other."""
    if not recipe.is_upper_bound:
        return ""
    return (f"Not a result: an upper bound. curation.select={recipe.curation.select} looked at the truth of the "
            "unlabeled items to make the self-data; what this run reaches is a limit for others.")  # fmt: skip


def smoke_note(recipe: Recipe) -> str:
    """What to say of a smoke test; "" for any other run."""
    if recipe.scale == "full":
        return ""
    return "Not a result: a smoke test (scale=smoke) of a miniature with random weights on a handful of made pictures."


def _below_prior(last: GenerationScores) -> Iterator[str]:
    for task in last.tasks:
        for family in task.families:
            if family.blind_prior is not None and family.mean < family.blind_prior:
                noise = "" if family.high < family.blind_prior else ", within the noise"
                yield (f"{task.task} ({task.format}): G{last.index} answers {_percent(family.mean)} of the "
                       f"{family.family} questions right, below the blind prior of {_percent(family.blind_prior)}"
                       f"{noise}.")  # fmt: skip


def _sureness(recipe: Recipe, lineage: Lineage) -> Iterator[str]:
    """Unanimous answers per iteration: sureness may grow faster than correctness."""
    found = [_diagnosed(curated.path, lineage.data.path).get("reasoning") for curated in lineage.curated]
    known = [(i, d.unanimous_share, d.unanimous_precision) for i, d in enumerate(found)
             if d and d.unanimous_share is not None and d.unanimous_precision is not None]  # fmt: skip
    if not known:
        return
    parts = [f"{_percent(share)} by G{i} ({_percent(right)} of them right)" for i, share, right in known]
    (_, share, right), (_, last_share, last_right) = known[0], known[-1]
    warning = " Sureness grew and correctness did not." if last_share > share and last_right < right else ""
    pooled = " Later pools hold the earlier candidates too." if recipe.sampling.pooled and len(known) > 1 else ""
    yield f"Questions answered unanimously: {', '.join(parts)}.{warning}{pooled}"


def _rejected_rows(data: Artifact) -> Iterator[str]:
    rejected = _summary(data)["rejected"]
    if rejected["rows"]:
        yield (f"{rejected['rows']:,} rows of the data were set aside ({_counts(rejected['by_problem'])}); "
               f"rejected.jsonl in {data.path.name} lists them.")  # fmt: skip
    others = _summary(data).get("passed_over")  # unknown of data sets that were built before it was counted
    if others:
        yield f"{sum(others.values()):,} files beside the unlabeled images are no pictures ({_counts(others)})."


def _rejected_candidates(iteration: int, summary: Mapping[str, Any]) -> Iterator[str]:
    if summary["set_aside"]:
        count = sum(summary["set_aside"].values())
        yield (f"{count:,} of {summary['candidates']:,} candidates of G{iteration} were set aside "
               f"({_counts(summary['set_aside'])}).")  # fmt: skip
    if summary["rejected_rows"]:
        yield f"{summary['rejected_rows']:,} rows of candidates of G{iteration} could not be read."


def _counts(by_reason: Mapping[str, int]) -> str:
    return ", ".join(f"{_words(reason)} {count:,}" for reason, count in Counter(by_reason).most_common())


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
