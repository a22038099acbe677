"""Generators tuned by preference, with pairs of their own making (paper.md, Curation, preference variant).

A supervised generator samples candidates for some of the unlabeled images and curation chooses among them, as for the
pool itself: no truth and no judge is asked. A pair is a kept response with one of the same kind to reject: a candidate
of the lower half by score, or what the generator says when it sees the image corrupted. The tuned generator then
samples the pool.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sicog_exp.cleandata import without_repeated_texts
from sicog_exp.curation.consistency import lower_half, seeded_index
from sicog_exp.curation.curate import Group
from sicog_exp.curation.filters import parse
from sicog_exp.curation.spool import Spool
from sicog_exp.data.images import IMAGES, open_image
from sicog_exp.generation.pool_index import PoolIndex
from sicog_exp.prompts import KINDS, Kind, prompt
from sicog_exp.recipe import CurationConfig, Recipe, SamplingConfig
from sicog_exp.records import Record, RecordFile, RecordsById, conversation, read_jsonl, write_records
from sicog_exp.row_index import RowIndex
from sicog_exp.selfdata import GROUPS, PoolTask, curate_pools, items_of, numbered, sample_pools, training_rows
from sicog_exp.store import Artifact, Step, Workplace

UNLABELED = "unlabeled.parquet"
REVISION = 1
RunStep = Callable[[Step], Artifact]


def preference_tuned(recipe: Recipe, generators: Mapping[Group, Artifact], data: Artifact, checked: Artifact,
                     iteration: int, run: RunStep) -> Mapping[Group, Artifact]:  # fmt: skip
    """The generators after preference tuning; themselves where `preference.steps` is 0. `checked` holds the benchmarks'
    texts (`cleandata.check_step`), which pairs must not repeat."""
    if recipe.preference.steps == 0:
        return generators
    config, seed = recipe.preference, recipe.seed
    items = run(Step("preference-items", draw_items, ItemsTask(config.images), {"data": data}, revision=REVISION))
    inputs = {"data": data, "items": items}
    task = PoolTask(recipe.sampling, recipe.model, "caption", iteration, seed, recipe.data.max_pixels,
                    recipe.engine)  # fmt: skip
    pools = sample_pools(task, generators, inputs, run, "preference-generate")
    curated = curate_pools("preference-curate", recipe.curation, items, list(pools.values()), run,
                           recipe.engine)  # fmt: skip
    curated = without_repeated_texts(recipe, curated, checked, run)
    rejected = pools
    if config.rejected == "corrupted":
        corrupted = run(Step("preference-corrupt", corrupt_items, CorruptTask(recipe.data.max_pixels),
                             {**inputs, "curated": curated}, revision=REVISION))  # fmt: skip
        one_each = replace(task, sampling=_one_of_each(recipe.sampling))
        rejected = sample_pools(one_each, generators, {"data": corrupted}, run, "preference-reject")
    pairs = run(Step("preference-pairs", make_pairs, PairsTask(recipe.curation, config.rejected),
                     {"items": items, "curated": curated, **numbered(rejected.values())},
                     revision=REVISION))  # fmt: skip
    return _tuned(recipe, generators, {"data": data, "pairs": pairs}, pools.keys(), run)


def _tuned(recipe: Recipe, generators: Mapping[Group, Artifact], inputs: Mapping[str, Artifact],
           sampled: Collection[Group], run: RunStep) -> Mapping[Group, Artifact]:  # fmt: skip
    """One mixed generator learns from all pairs; each of two from its own, if it samples anything."""
    from sicog_exp.training.preference import PreferenceTask, prefer

    def tune(name: str, generator: Artifact, kinds: tuple[Kind, ...]) -> Artifact:
        task = PreferenceTask(recipe.preference, recipe.model, recipe.seed, kinds, recipe.data.max_pixels)
        return run(Step(name, prefer, task, {"model": generator, **inputs}, recipe.seed, REVISION))

    if recipe.generators == "mixed":
        return dict.fromkeys(GROUPS, tune("preference", generators["caption"], KINDS))
    names: dict[Group, str] = {"caption": "preference-perception", "reasoning": "preference-reasoning"}
    return {group: tune(names[group], generator, GROUPS[group]) if group in sampled else generator
            for group, generator in generators.items()}  # fmt: skip


def _one_of_each(sampling: SamplingConfig) -> SamplingConfig:
    """One response of each kind that is sampled at all."""
    return replace(sampling, **{kind: min(1, getattr(sampling, kind)) for kinds in GROUPS.values() for kind in kinds})


# The items.


@dataclass(frozen=True)
class ItemsTask:
    """Unlabeled images to take, 0 for all."""

    images: int


def draw_items(task: ItemsTask, inputs: Mapping[str, Artifact], workplace: Workplace) -> None:
    """All unlabeled records of some images, drawn by the images' names, which are held: a larger number adds to a
    smaller one's."""
    records = items_of(inputs)
    shown = {record.images for record in records}
    ranked = sorted(shown, key=lambda names: hashlib.sha256(repr(names).encode()).digest())
    drawn = set(ranked[: task.images or None])
    kept = write_records(workplace.directory / UNLABELED, (record for record in records if record.images in drawn))
    workplace.add(samples=kept)


@dataclass(frozen=True)
class CorruptTask:
    """What corrupted images depend on besides their originals."""

    max_pixels: int


def corrupt_items(task: CorruptTask, inputs: Mapping[str, Artifact], workplace: Workplace) -> None:
    """The kept items that show an image, each with a corrupted copy of its own. The ids of the kept are held."""
    kept = {row["id"] for row in read_jsonl(inputs["curated"] / "curated.jsonl") if row["kept"]}
    (workplace.directory / IMAGES).mkdir(exist_ok=True)
    rows = (_corrupted(record, inputs["data"].path, workplace.directory, task.max_pixels)
            for record in items_of(inputs) if record.id in kept and record.images)  # fmt: skip
    workplace.add(samples=write_records(workplace.directory / UNLABELED, rows))


def _corrupted(record: Record, root: Path, out: Path, max_pixels: int) -> Record:
    from sicog_exp.data.corruption import corrupt

    names = []
    for i, name in enumerate(record.images):
        names.append(f"{IMAGES}/{hashlib.sha256(record.id.encode()).hexdigest()[:32]}-{i}.png")
        corrupt(open_image(root, name, max_pixels), record.id).save(out / names[-1], compress_level=1)
    return replace(record, images=tuple(names))


# The pairs.


@dataclass(frozen=True)
class PairsTask:
    """What the pairs depend on besides their candidates."""

    curation: CurationConfig
    """Which responses are whole, and which say the same."""
    rejected: Literal["low_score", "corrupted"]


def make_pairs(task: PairsTask, inputs: Mapping[str, Artifact], workplace: Workplace) -> None:
    """Kept responses with one to reject, as two files of records with the same ids (`training.preference`).

    In memory are the ids of the rows that train and where the candidates stand; what they say is read item by item, and
    waits in a nameless file for the second of the two.
    """
    from sicog_exp.training.preference import CHOSEN, REJECTED

    curated, folder = inputs["curated"].path, workplace.directory
    pools = [pool / "candidates.jsonl" for name, pool in inputs.items() if name.startswith("pool")]
    options = LowScored(curated) if task.rejected == "low_score" else PoolIndex(pools)
    trained = _trained(curated, RecordFile(inputs["items"] / UNLABELED))
    looked_at = ((row, images, rejected_for(row, options.rows(row["id"]), task.curation)) for row, images in trained)
    with Spool(looked_at, folder) as kept:
        count = sum(1 for _ in kept)
        write_records(folder / CHOSEN, (_record(row, row["chosen"], images) for row, images, text in kept if text))
        found = write_records(folder / REJECTED, (_record(row, text, images) for row, images, text in kept if text))
    workplace.add(samples=count, pairs=found)


def _trained(curated: Path, items: RecordFile) -> Iterator[tuple[dict, tuple[str, ...]]]:
    """The kept rows of which every record trains, with their images."""
    trains = {record.id for record in RecordFile(curated / "self.parquet")}
    known = RecordsById(items)
    for row in read_jsonl(curated / "curated.jsonl"):
        if row["kept"]:
            images = known[row["id"]].images
            if all(record.id in trains for record in training_rows(row, images)):
                yield row, images


def _record(row: Mapping[str, Any], response: str, images: tuple[str, ...]) -> Record:
    kind = row["chosen_kind"]
    messages = conversation(prompt(kind, row["prompt"]), response, images)
    return Record(f"{row['id']}:{kind}", messages, images, kind, "preference")


class LowScored:
    """Each sample's candidates of the lower half by score, found when they are asked for."""

    def __init__(self, curated: Path) -> None:
        self._pool, self._scores = RowIndex([curated / "pool.jsonl"]), RowIndex([curated / "scores.jsonl"])

    def rows(self, id: str) -> list[dict]:
        """By sample id."""
        scored = [row for row in self._scores.rows(id) if row["score"] is not None]
        return _lower(self._pool.rows(id)[0]["candidates"], scored)


def _lower(candidates: Sequence[dict], scores: Sequence[Mapping[str, Any]]) -> list[dict]:
    scored = [candidates[row["position"]] for row in scores]
    lower = lower_half([row["score"] for row in scores], [candidate["text"] for candidate in scored])
    return [scored[i] for i in lower]


def rejected_for(row: Mapping[str, Any], options: Sequence[Mapping[str, Any]], config: CurationConfig) -> str | None:
    """A response of the chosen one's kind, so that it answers the same prompt, whose final text says something else;
    drawn by the sample id. None where there is none."""
    kind: Kind = row["chosen_kind"]
    said = parse(kind, row["chosen"], "stop", config).compared
    pool = []
    for option in (option for option in options if option["kind"] == kind):
        parsed = parse(kind, option["text"], option["finish_reason"], config)
        if parsed.reason is None and parsed.compared != said:
            pool.append(option["text"])
    return pool[seeded_index("rejected", row["id"], len(pool))] if pool else None
