"""Training pools against benchmarks, as steps of the store: a check that lists overlaps, copies without what it found.

The check depends on the suite; what trains depends on the rows that were left out alone. So a run without overlaps
trains on the data set's own artifact, whatever the suite, and nothing of it changes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sicog_exp.curation.contamination import Overlap, Picture, Question, Row, TextIndex, counts, overlaps, picture_of
from sicog_exp.curation.similarity import batched
from sicog_exp.data.images import open_image
from sicog_exp.data.readers import words_of
from sicog_exp.evaluation.suites import load_suite, suite_state
from sicog_exp.prompts import CAPTION_KINDS, prompt, question_of
from sicog_exp.recipe import Recipe, RecipeError
from sicog_exp.records import Record, RecordFile, read_jsonl, write_jsonl, write_records
from sicog_exp.store import MANIFEST, Artifact, Progress, Step, Workplace

POOLS = ("annotated", "unlabeled", "instruction", "alignment")
"""Training rows of a data set; one that names no captions to align with has no file of them."""
CHECK, SELF_CHECK = "contamination", "contamination-self"
OVERLAPS, QUESTIONS, SUMMARY = "overlaps.jsonl", "questions.jsonl", "summary.json"
REVISION = 1
DECODED = 256
"""Pictures that are decoded together."""
RunStep = Callable[[Step], Artifact]


@dataclass(frozen=True)
class CheckTask:
    """What the check depends on besides the data: what the suite's benchmarks hold now."""

    benchmarks: Mapping[str, str]
    max_pixels: int


@dataclass(frozen=True)
class CleanTask:
    """Rows to leave out: Parquet file -> ids."""

    left_out: Mapping[str, Sequence[str]]


def check_step(recipe: Recipe, data: Artifact) -> Step:
    """Every training pool of the data set against every benchmark of the suite."""
    suite, judged = recipe.evaluation.suite, recipe.evaluation.judge

    def run(task: CheckTask, inputs: Mapping[str, Artifact], workplace: Workplace) -> None:
        check(suite, inputs["data"].path, workplace, task.max_pixels, judged)

    task = CheckTask(suite_state(suite, judged), recipe.data.max_pixels)
    return Step(CHECK, run, task, {"data": data}, revision=REVISION)


def check(suite: str, data: Path, workplace: Workplace, max_pixels: int, judged: bool = False) -> None:
    """Fill a step's directory: `overlaps.jsonl`, `questions.jsonl` (the benchmarks' texts), `summary.json`.

    In memory are what the benchmarks hold (10 kB a picture), the names of the training pictures, and which of these
    match; training rows and pictures are read as they are compared.
    """
    from sicog_exp.evaluation.contents import read_contents

    held = read_contents(load_suite(suite), data, judged)
    pools = {split: RecordFile(data / f"{split}.parquet") for split in POOLS if (data / f"{split}.parquet").is_file()}
    shown = Pictures(data, _images(pools.values()), max_pixels, workplace.progress)
    rows = (_row(split, record) for split, records in pools.items() for record in records)
    write_jsonl(workplace.directory / QUESTIONS, (vars(question) for question in held.questions))
    summary = {
        "rows": {split: len(records) for split, records in pools.items()},
        "pictures": len(shown),
        "questions": _per_task(held.questions),
        "benchmark_pictures": len(held.pictures),
        "long_texts": len(TextIndex(held.questions)),
        "unread": held.unread,
    }
    _write(workplace, overlaps(rows, shown, held.questions, held.pictures), summary)


def _images(pools: Iterable[RecordFile]) -> list[str]:
    """The names of all pictures, each once, by their first mention."""
    return list(dict.fromkeys(image for records in pools for record in records for image in record.images))


class Pictures(Mapping[str, Picture]):
    """A data set's pictures by name, read when they are asked for; walked through, which `progress` is told of, DECODED
    of them are held."""

    def __init__(self, root: Path, names: Sequence[str], max_pixels: int, progress: Progress | None = None) -> None:
        self._root, self._names, self._max_pixels, self.progress = root, names, max_pixels, progress

    def __getitem__(self, name: str) -> Picture:
        return picture_of(open_image(self._root, name, self._max_pixels))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def items(self) -> ItemsView[str, Picture]:
        """Decoded side by side."""
        return _Decoded(self)


class _Decoded(ItemsView[str, Picture]):
    def __init__(self, pictures: Pictures) -> None:
        super().__init__(pictures)
        self._pictures = pictures

    def __iter__(self) -> Iterator[tuple[str, Picture]]:
        with ThreadPoolExecutor() as pool:
            # a batch at a time: `map` reads all that it is given, however few results were taken
            for number, names in enumerate(batched(self._pictures, DECODED), 1):
                yield from zip(names, pool.map(self._pictures.__getitem__, names), strict=True)
                if self._pictures.progress:
                    self._pictures.progress(min(number * DECODED, len(self._pictures)), len(self._pictures))


def without_overlaps(recipe: Recipe, source: Artifact, checked: Artifact, run: RunStep) -> Artifact:
    """What trains: `source` without the rows that a check listed; itself where it listed none, or where they stay.

    Raises RecipeError where nothing would be left of a pool.
    """
    left_out: dict[str, set[str]] = defaultdict(set)
    for row in read_jsonl(checked / OVERLAPS) if recipe.data.exclude_contaminated else ():
        left_out[f"{row['split']}.parquet"].add(row["id"])
    if not left_out:
        return source
    task = CleanTask({name: sorted(ids) for name, ids in sorted(left_out.items())})
    return run(Step(f"clean-{source.name}", _copy_without, task, {"source": source}, revision=REVISION))


def without_repeated_texts(recipe: Recipe, curated: Artifact, checked: Artifact, run: RunStep) -> Artifact:
    """The self-generated rows that train: those that repeat a long text of a benchmark are left out.

    Their pictures and questions were checked with the data; the built-in world has no long text, and no step runs.
    """
    if not _summary(checked)["long_texts"]:
        return curated
    said = run(Step(SELF_CHECK, _check_self, {}, {"checked": checked, "curated": curated}, revision=REVISION))
    return without_overlaps(recipe, curated, said, run)


def _check_self(task: Any, inputs: Mapping[str, Artifact], workplace: Workplace) -> None:
    held = [Question(**{**row, "images": tuple(row["images"])}) for row in read_jsonl(inputs["checked"] / QUESTIONS)]
    records = RecordFile(inputs["curated"] / "self.parquet")
    rows = (_row("self", record) for record in records)
    _write(workplace, overlaps(rows, {}, held, {}), {"rows": {"self": len(records)}, "unread": {}})


def _copy_without(task: CleanTask, inputs: Mapping[str, Artifact], workplace: Workplace) -> None:
    source = inputs["source"].path
    for name, ids in task.left_out.items():
        gone = set(ids)
        if not write_records(workplace.directory / name, (r for r in RecordFile(source / name) if r.id not in gone)):
            raise RecipeError(f"all rows of {name.removesuffix('.parquet')} show or say what a benchmark of the suite "
                              "holds: use other data or another suite, or data.exclude_contaminated=false")  # fmt: skip
        workplace.add(left_out=len(gone))
    for path in source.rglob("*"):
        relative = path.relative_to(source)
        if path.is_file() and str(relative) != MANIFEST and str(relative) not in task.left_out:
            _link(path, workplace.directory / relative)


def _link(path: Path, place: Path) -> None:
    """The same file under another name; a copy where the file system has no links."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)  # a killed run's
    try:
        os.link(path, place)
    except OSError:
        shutil.copyfile(path, place)


def _row(split: str, record: Record) -> Row:
    """A record's questions and responses as two texts, without images and wordings of ours."""
    words = [words_of(message) for message in record.messages if message.role == "user"]
    asked = [question_of(record.kind, text) for text in words if text not in map(prompt, CAPTION_KINDS)]
    said = [message.content for message in record.messages if message.role == "assistant"]
    return Row(split, record.id, "\n".join(asked), "\n".join(said), record.images)


def _per_task(questions: Iterable[Question]) -> dict[str, int]:
    per_task: dict[str, int] = defaultdict(int)
    for question in questions:
        per_task[question.task] += 1
    return dict(per_task)


def _write(workplace: Workplace, found: Iterable[Overlap], summary: dict[str, Any]) -> None:
    """The overlaps as they come, then what they count to, which is read from their file."""
    file = workplace.directory / OVERLAPS
    write_jsonl(file, (vars(overlap) for overlap in found))
    by_split = counts(Overlap(**row) for row in read_jsonl(file))
    text = json.dumps({**summary, "found": by_split}, indent=1, ensure_ascii=False)
    (workplace.directory / SUMMARY).write_text(text + "\n", encoding="utf-8")
    overlapping = sum(sum(by_how.values()) for by_how in by_split.values())
    workplace.add(samples=sum(summary["rows"].values()), overlapping=overlapping)


# What is said about it.


def summary_of(done: Iterable[tuple[int, Artifact]]) -> dict[str, Any]:
    """A run's checks together: rows and found rows by pool (found by how), what could not be read."""
    together: dict[str, Any] = {"rows": {}, "found": {}, "unread": {}, "questions": {}, "benchmark_pictures": 0}
    for _, artifact in done:
        if artifact.name in (CHECK, SELF_CHECK):
            one = _summary(artifact)
            for name in ("rows", "found"):
                for split, value in one[name].items():
                    together[name][split] = _added(together[name].get(split), value)
            together |= {name: one[name] for name in ("unread", "questions", "benchmark_pictures") if one.get(name)}
    return together


def _added(before: Any, value: Any) -> Any:
    if not isinstance(value, dict):
        return (before or 0) + value
    before = before or {}
    return {how: before.get(how, 0) + value.get(how, 0) for how in {**before, **value}}


def contamination_metrics(done: Iterable[tuple[int, Artifact]]) -> dict[str, float]:
    """`contamination/<pool>` (rows that overlap), their sum `contamination/rows`, `contamination/unread_tasks`."""
    found = summary_of(done)
    by_pool = {split: float(sum(found["found"].get(split, {}).values())) for split in found["rows"]}
    named = {f"contamination/{split}": number for split, number in by_pool.items()}
    return {**named, "contamination/rows": sum(by_pool.values()), "contamination/unread_tasks": len(found["unread"])}


def contamination_notes(done: Iterable[tuple[int, Artifact]], excluded: bool = True) -> list[str]:
    """What a reader must know, in sentences; one that says that nothing was found, too."""
    return list(_notes(summary_of(done), excluded))


def _notes(found: Mapping[str, Any], excluded: bool) -> Iterator[str]:
    against = f"{len(found['questions'])} benchmark tasks ({found['benchmark_pictures']:,} pictures)"
    total = sum(found["rows"].values())
    parts = [f"{split} {sum(by_how.values()):,} ({', '.join(f'{how} {n:,}' for how, n in by_how.items())})"
             for split, by_how in found["found"].items()]  # fmt: skip
    if not parts:
        yield f"Contamination: none of {total:,} training rows overlaps with {against}."
    else:
        what = "were left out of training" if excluded else "were trained on (data.exclude_contaminated=false)"
        yield f"Contamination: of {total:,} training rows these overlap with {against} and {what}: {'; '.join(parts)}."
    for task, reason in found["unread"].items():
        yield f"Contamination: {task} could not be checked ({reason})."


def _summary(artifact: Artifact) -> dict[str, Any]:
    return json.loads((artifact / SUMMARY).read_text(encoding="utf-8"))
