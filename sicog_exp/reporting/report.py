"""The generation report: one self-contained HTML file from one `ReportData`.

The caller measures and fills `ReportData`; this module draws. Scores and qualities are shares (0 to 1), differences
are differences of shares; the page shows percent and percentage points. Equal data give equal bytes. Nothing is
loaded from anywhere: a content security policy forbids it, and every text is escaped.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import ConfigDict, TypeAdapter, with_config

from sicog_exp.curation.calibration import Calibration
from sicog_exp.curation.curate import Group
from sicog_exp.curation.diversity import Diversity
from sicog_exp.prompts import KINDS, final_text
from sicog_exp.reporting import calibration_view, charts
from sicog_exp.reporting.costs import Cost, CostRow, cumulative

DATA = "report.json"
"""The file that keeps what a report was drawn from."""
GALLERY_BYTES, QUESTION_BYTES = 5_000_000, 2_000_000
"""Room for the pictures and texts of samples and of questions; those beyond it are counted on the page, not shown."""
TEXT_LIMIT = 6_000
"""Characters shown of one candidate."""


@dataclass(frozen=True)
class FamilyScore:
    """One question family of one task. `blind_prior`: what the best answer without the image scores, if known."""

    family: str
    mean: float
    low: float
    high: float
    n: int
    blind_prior: float | None = None


@dataclass(frozen=True)
class TaskScore:
    """One task in one answer format (`direct`, `cot`) with its image-clustered interval."""

    task: str
    format: str
    mean: float
    low: float
    high: float
    n: int
    families: tuple[FamilyScore, ...] = ()


@dataclass(frozen=True)
class GenerationScores:
    """Everything measured on generation `index`."""

    index: int
    tasks: tuple[TaskScore, ...]


@dataclass(frozen=True)
class Delta:
    """A paired comparison, `after` minus `before`: generations ("G0") or arms ("annotated only").

    `seeds` above 1: pooled over runs, with their standard deviation in `spread`.
    """

    before: str
    after: str
    task: str
    format: str
    difference: float
    low: float
    high: float
    n: int
    mcnemar_p: float | None = None
    holm_p: float | None = None
    seeds: int = 1
    spread: float | None = None

    @property
    def label(self) -> str:
        return f"{self.after} \N{MINUS SIGN} {self.before}"


@dataclass(frozen=True)
class BestScore:
    """The best candidate of one item: its score (None for a ground truth, which has none), and its quality in [0, 1]
    where the truth is known."""

    score: float | None
    quality: float | None = None


@dataclass(frozen=True)
class CurationGroup:
    """One group of items (captions, reasoning). `kept` counts after all rules, not the threshold alone.

    `random_quality`: mean quality of a random candidate of each item, the reference that curation should beat;
    `oracle_quality`: of the best candidate of each, which no choice among them can beat; `ceiling_share`: how far the
    choice goes from the first (0) to the second (1).
    """

    group: str
    threshold: float
    kept: int
    best: tuple[BestScore, ...]
    random_quality: float | None = None
    quality_name: str = "right"
    oracle_quality: float | None = None
    ceiling_share: float | None = None


@dataclass(frozen=True)
class Curation:
    """What curation did in the iteration from generation `iteration`. `set_aside`: (reason, number) pairs."""

    iteration: int
    encoder: str
    include_self: bool
    groups: tuple[CurationGroup, ...]
    set_aside: tuple[tuple[str, int], ...] = ()
    settings: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class SampleCandidate:
    """One candidate as curation saw it. `right`: whether it is right, where the truth is known."""

    kind: str
    text: str
    score: float | None
    finish_reason: str
    chosen: bool = False
    right: bool | None = None


@dataclass(frozen=True)
class Sample:
    """One item of the gallery. `png`: the image as PNG bytes."""

    id: str
    iteration: int
    group: str
    kept: bool
    candidates: tuple[SampleCandidate, ...]
    question: str = ""
    truth: str | None = None
    png: bytes | None = None
    family: str = ""


@dataclass(frozen=True)
class Answer:
    """What one generation answered to a benchmark question."""

    generation: int
    text: str
    correct: bool


@dataclass(frozen=True)
class Question:
    """One benchmark question with the answers of all generations, the first one first."""

    id: str
    task: str
    format: str
    family: str
    question: str
    target: str
    answers: tuple[Answer, ...]
    png: bytes | None = None

    @property
    def change(self) -> str:
        """From the first generation to the last: `gained`, `lost`, `right` or `wrong` throughout."""
        first, last = self.answers[0].correct, self.answers[-1].correct
        return ("right" if last else "wrong") if first == last else "gained" if last else "lost"


@dataclass(frozen=True)
class Node:
    """One step of the lineage; `inputs` are the fingerprints of the steps that it read."""

    generation: int
    step: str
    fingerprint: str
    inputs: tuple[str, ...] = ()


@with_config(ConfigDict(ser_json_bytes="base64", val_json_bytes="base64", ser_json_inf_nan="constants"))
@dataclass(frozen=True)
class ReportData:
    """Everything that a report shows. Empty parts leave their section out or say that nothing was recorded."""

    name: str
    recipe_yaml: str
    date: str
    generations: tuple[GenerationScores, ...]
    run_id: str = ""
    run_uri: str = ""
    reproduce: str = ""
    libraries: Mapping[str, str] = field(default_factory=dict)
    deltas: tuple[Delta, ...] = ()
    curation: tuple[Curation, ...] = ()
    diversity: tuple[Mapping[Group, Diversity], ...] = ()
    """Of what curation kept, iteration by iteration."""
    cost: Cost | None = None
    gallery: tuple[Sample, ...] = ()
    questions: tuple[Question, ...] = ()
    lineage: tuple[Node, ...] = ()
    notes: tuple[str, ...] = ()
    upper_bound: str = ""
    """Said above everything else of a run whose self-data the truth chose."""
    smoke: str = ""
    """The same of a smoke test."""
    calibration: tuple[Mapping[Group, Calibration], ...] = ()
    """Every pool under every threshold, iteration by iteration."""


def to_json(data: ReportData) -> bytes:
    """The data as JSON, pictures in base64: what a report is drawn from again on another machine."""
    return TypeAdapter(ReportData).dump_json(data)


def from_json(text: bytes) -> ReportData:
    """The data of `to_json`. Raises pydantic.ValidationError for JSON of another shape."""
    return TypeAdapter(ReportData).validate_json(text)


def write_report(data: ReportData, path: Path) -> None:
    """Write the report as one HTML file."""
    write_page(render(data), path)


def write_page(page: str, path: Path) -> None:
    """A character without a UTF-8 form (a lone surrogate) becomes "?"."""
    path.write_text(page, encoding="utf-8", errors="replace", newline="\n")


def render(data: ReportData) -> str:
    """The report's HTML."""
    return draw("report.html", data=data, **_view(data))


def draw(template: str, **shown: Any) -> str:
    """A page of this folder's templates."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    home = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(home), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=percent, points=points, number=number, p_value=p_value, si=si,
                               duration=charts.duration, format_name=format_name)  # fmt: skip
    style = (home / "report.css").read_text(encoding="utf-8")
    return environment.get_template(template).render(style=safe(style), **shown)


def _view(data: ReportData) -> dict[str, Any]:
    """What the template shows beside the data itself."""
    samples = _fitting(data.gallery, GALLERY_BYTES, lambda s: [c.text[:TEXT_LIMIT] for c in s.candidates])
    questions = _fitting(data.questions, QUESTION_BYTES, lambda q: [a.text for a in q.answers])
    return {
        "verdict": verdict(data),
        "headline": [(delta, *_means(data, delta)) for delta in _headline(data)],
        "curves": [_curve(data, task) for task in _tasks(data)],
        "forests": [_forest(data, task) for task in dict.fromkeys(delta.task for delta in data.deltas)],
        "families": [_families(data, *key) for key in _keys(data, with_families=True)],
        "curation": [(one, [_curation_charts(one, group) for group in one.groups]) for one in data.curation],
        "calibration": [[calibration_view.view(group, f"{group.group}, G{i}") for group in found.values()]
                        for i, found in enumerate(data.calibration)],
        "cost": cost_view(data.cost),
        "compute": [(task, safe(svg)) for task in _tasks(data) if (svg := _compute_curve(data, task))],
        "samples": [_sample(sample) for sample in samples],
        "left_out": len(data.gallery) - len(samples),
        "questions_left_out": len(data.questions) - len(questions),
        "facets": facets("sample", ("Group", [s.group for s in samples]), ("Family", [s.family for s in samples]),
                         ("Outcome", ["kept" if s.kept else "set aside" for s in samples])),
        "questions": [(one, _image(one.png)) for one in questions],
        "question_facets": facets("question", ("Change", [q.change for q in questions]),
                                  ("Task", [q.task for q in questions]),
                                  ("Format", [format_name(q.format) for q in questions]),
                                  ("Family", [q.family for q in questions])),
        "lineage": safe(charts.lineage(data.lineage, f"Steps of {data.name} and what each one read"))
                   if data.lineage else "",
    }  # fmt: skip


@dataclass(frozen=True)
class Facet:
    """One filter of a gallery: its values and, item by item, the number of the item's own (None for none)."""

    name: str
    legend: str
    values: tuple[str, ...]
    of: tuple[int | None, ...]


def facets(gallery: str, *given: tuple[str, Sequence[str]]) -> list[Facet]:
    """The filters that tell items apart; one whose items are all alike is left out."""
    made = []
    for legend, values in given:
        known = tuple(sorted({value for value in values if value}))
        if len(known) > 1:
            of = tuple(known.index(value) if value else None for value in values)
            made.append(Facet(f"{gallery}-{legend.lower()}", legend, known, of))
    return made


# The words.


def verdict(data: ReportData) -> list[str]:
    """The plain-language answer, one sentence per answer format of the first task, from the intervals alone."""
    if len(data.generations) < 2:
        return ["Only one generation was evaluated: there is nothing to compare yet."]
    headline = _headline(data)
    if not headline:
        first, last = data.generations[0].index, data.generations[-1].index
        return [f"No paired comparison of G{last} with G{first} was recorded."]
    return [_sentence(delta) for delta in headline if delta.task == headline[0].task]


def _sentence(delta: Delta) -> str:
    span = f"[{100 * delta.low:.1f}, {100 * delta.high:.1f}]".replace("-", "\N{MINUS SIGN}")
    if delta.low > 0:
        change = f"answers {100 * delta.difference:.1f} points {span} more questions right than {delta.before}"
        return f"{delta.after} {change} ({format_name(delta.format)})."
    if delta.high < 0:
        span = f"[{-100 * delta.high:.1f}, {-100 * delta.low:.1f}]"
        change = f"answers {-100 * delta.difference:.1f} points {span} fewer questions right than {delta.before}"
        return f"{delta.after} {change} ({format_name(delta.format)})."
    return (f"No clear difference between {delta.after} and {delta.before} ({format_name(delta.format)}): "
            f"{charts.signed(100 * delta.difference)} points, and the interval {span} includes zero.")  # fmt: skip


def _headline(data: ReportData) -> list[Delta]:
    """The comparisons of the last generation with the first."""
    if not data.generations:
        return []
    first, last = f"G{data.generations[0].index}", f"G{data.generations[-1].index}"
    return [delta for delta in data.deltas if (delta.before, delta.after) == (first, last)]


def _means(data: ReportData, delta: Delta) -> tuple[TaskScore | None, TaskScore | None]:
    ends = data.generations[0], data.generations[-1]
    before, after = (score_of(generation, delta.task, delta.format) for generation in ends)
    return before, after


def format_name(answer_format: str) -> str:
    """How a page writes an answer format."""
    return {"cot": "CoT"}.get(answer_format, answer_format)


def percent(share: float | None, digits: int = 1) -> str:
    """41.2% for 0.412, a dash for None."""
    return "\N{EN DASH}" if share is None else f"{100 * share:.{digits}f}%"


def number(value: float | None) -> str:
    """Two decimals, a dash for None."""
    return "\N{EN DASH}" if value is None else f"{value:.2f}"


def points(share: float) -> str:
    """A difference of shares as signed percentage points."""
    return charts.signed(100 * share)


def p_value(value: float | None) -> str:
    """Three decimals, <0.001 below them, a dash for None."""
    return "\N{EN DASH}" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def si(value: float | None) -> str:
    """1.2 M for 1,234,567; a dash for None."""
    if value is None:
        return "\N{EN DASH}"
    for factor, prefix in charts.PREFIXES:
        if abs(value) >= factor:
            return f"{value / factor:.1f} {prefix}"
    return f"{value:,.0f}"


# The charts and tables.


def score_of(generation: GenerationScores, task: str, answer_format: str) -> TaskScore | None:
    return next((t for t in generation.tasks if (t.task, t.format) == (task, answer_format)), None)


def _keys(data: ReportData, with_families: bool = False) -> list[tuple[str, str]]:
    """(task, format) pairs in the order in which they first occur."""
    found = (t for generation in data.generations for t in generation.tasks if t.families or not with_families)
    return list(dict.fromkeys((t.task, t.format) for t in found))


def _tasks(data: ReportData) -> list[str]:
    return list(dict.fromkeys(task for task, _ in _keys(data)))


def mark_of(score: TaskScore | FamilyScore | None) -> charts.Mark | None:
    return charts.Mark(score.mean, score.low, score.high) if score else None


def _curve(data: ReportData, task: str) -> dict[str, Any]:
    formats = [answer_format for name, answer_format in _keys(data) if name == task]
    scores = {f: [score_of(generation, task, f) for generation in data.generations] for f in formats}
    series = [charts.Series(format_name(f), tuple(map(mark_of, found)), hollow=i > 0)
              for i, (f, found) in enumerate(scores.items())]  # fmt: skip
    names = [f"G{generation.index}" for generation in data.generations]
    svg = charts.generation_curve(series, names, f"Score on {task} over generations {', '.join(names)}")
    rows = [(f, found, next(score.n for score in found if score)) for f, found in scores.items()]
    return {"task": task, "svg": safe(svg), "rows": rows, "names": names}


def _generation_of(name: str) -> int | None:
    return int(name[1:]) if name[:1] == "G" and name[1:].isdecimal() else None


def _forest(data: ReportData, task: str) -> dict[str, Any]:
    deltas = [delta for delta in data.deltas if delta.task == task]
    rows = [
        charts.ForestRow(
            f"{d.label}, {format_name(d.format)}", charts.Mark(d.difference, d.low, d.high), _generation_of(d.after)
        )
        for d in deltas
    ]
    return {"task": task, "svg": safe(charts.forest(rows, f"Paired differences on {task}")), "deltas": deltas}


def _families(data: ReportData, task: str, answer_format: str) -> dict[str, Any]:
    tables = []
    for generation in data.generations:
        score = score_of(generation, task, answer_format)
        tables.append({f.family: f for f in score.families} if score else {})
    names = list(dict.fromkeys(name for table in tables for name in table))
    rows = [(name, [table.get(name) for table in tables]) for name in names]
    dots = [charts.DotRow(name, tuple(map(mark_of, found)), _prior(found)) for name, found in rows]
    indices = [generation.index for generation in data.generations]
    svg = charts.family_dots(
        dots, indices, f"{task}, {format_name(answer_format)}: score per question family and blind prior"
    )
    shown = [(name, found, _prior(found)) for name, found in rows]
    return {"task": task, "format": answer_format, "svg": safe(svg), "rows": shown, "indices": indices}


def _prior(found: Sequence[FamilyScore | None]) -> float | None:
    return next((score.blind_prior for score in found if score and score.blind_prior is not None), None)


def _curation_charts(curation: Curation, group: CurationGroup) -> dict[str, Any]:
    scores = [best.score for best in group.best if best.score is not None]
    known = [(b.score, b.quality) for b in group.best if b.score is not None and b.quality is not None]
    name = f"{group.group}, iteration from G{curation.iteration}"
    keep = charts.keep_curve(scores, known, group.threshold, group.random_quality, group.quality_name,
                             f"Keep rate and quality by threshold, {name}")  # fmt: skip
    drawn = [("Best scores", charts.histogram(scores, group.threshold, f"Histogram of best scores, {name}")),
             ("What another threshold would keep", keep)]  # fmt: skip
    if known:
        title = f"Does the score track quality ({group.quality_name})?"
        drawn.append((title, charts.quality_by_score(known, f"Quality by score, {name}")))
    shown = [(t, safe(svg)) for t, svg in drawn if scores]
    return {"group": group, "charts": shown, "quality": quality_at_threshold(group)}


def quality_at_threshold(group: CurationGroup) -> float | None:
    """Mean quality of the best candidates that reach the threshold; None where no truth is known."""
    known = [(best.score, best.quality) for best in group.best if best.quality is not None]
    reached = [quality for score, quality in known if score is None or score >= group.threshold]
    return sum(reached) / len(reached) if reached else None


def cost_view(cost: Cost | None) -> dict[str, Any] | None:
    if cost is None or not cost.rows:
        return None
    generations = list(dict.fromkeys(row.generation for row in cost.rows))
    bars = [(f"G{g}", [(row.stage, row.seconds) for row in cost.rows if row.generation == g]) for g in generations]
    total = CostRow(
        -1,
        "total",
        sum(row.seconds for row in cost.rows),
        _sum(cost, "samples"),
        _sum(cost, "tokens"),
        _sum(cost, "flops"),
        _most(cost, "peak_mb"),
        prompt_tokens=_sum(cost, "prompt_tokens"),
        image_tokens=_sum(cost, "image_tokens"),
        new_tokens=_sum(cost, "new_tokens"),
        peak_gpu_mb=_most(cost, "peak_gpu_mb"),
    )
    return {
        "svg": safe(charts.cost_bars(bars, "Wall time per generation by stage")),
        "rows": cost.rows,
        "total": total,
        "share": cost.orchestration_share,
        "device": cost.device,
    }


def _compute_curve(data: ReportData, task: str) -> str:
    """Accuracy against what each generation took to make; nothing where no FLOPs were counted."""
    spent = {step.generation: step for step in cumulative(data.cost.rows)} if data.cost else {}
    known = [generation for generation in data.generations if generation.index in spent]
    if len(known) < 2 or not spent[known[-1].index].flops:
        return ""
    lines = []
    for answer_format in [f for name, f in _keys(data) if name == task]:
        points = [(g.index, spent[g.index].flops, spent[g.index].trained, mark) for g in known
                  if (mark := mark_of(score_of(g, task, answer_format)))]  # fmt: skip
        lines += [charts.ComputeLine(format_name(answer_format), tuple(points))] if points else []
    return charts.compute_curve(lines, f"Score on {task} against compute") if lines else ""


def _sum(cost: Cost, name: str) -> Any:
    known = _known(cost, name)
    return sum(known) if known else None


def _most(cost: Cost, name: str) -> float | None:
    return max(_known(cost, name), default=None)


def _known(cost: Cost, name: str) -> list[Any]:
    return [value for row in cost.rows if (value := getattr(row, name)) is not None]


# The gallery.


class _Pictured(Protocol):
    @property
    def png(self) -> bytes | None: ...


P = TypeVar("P", bound=_Pictured)


def _fitting(items: Sequence[P], room: int, texts: Callable[[P], list[str]]) -> list[P]:
    """The items, from the first on, that fit into `room` bytes of page."""
    shown = []
    for item in items:
        room -= 2 * sum(map(len, texts(item))) + 4 * len(item.png or b"") // 3 + 2000
        if room < 0:
            break
        shown.append(item)
    return shown


def _sample(sample: Sample) -> dict[str, Any]:
    return {"sample": sample, "image": _image(sample.png), "candidates": [_candidate(c) for c in sample.candidates]}


def _image(png: bytes | None) -> str | None:
    return base64.b64encode(png).decode() if png else None


def _candidate(candidate: SampleCandidate) -> dict[str, Any]:
    text = candidate.text if len(candidate.text) <= TEXT_LIMIT else candidate.text[:TEXT_LIMIT] + " [cut]"
    kind = next((kind for kind in KINDS if kind == candidate.kind), None)
    final = final_text(kind, candidate.text) if kind else candidate.text
    brief = final if final is None or len(final) <= 240 else final[:240] + "\N{HORIZONTAL ELLIPSIS}"
    return {"of": candidate, "text": text, "final": brief, "more": brief != text.strip()}


def safe(text: str) -> Any:
    """Mark text that this package wrote (its charts escape what they are given) as ready for the page."""
    from markupsafe import Markup

    return Markup(text)
