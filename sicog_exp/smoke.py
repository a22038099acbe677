"""`scale=smoke`: a recipe as it is written, on a miniature of its model and a handful of pictures.

Swapped are the model (the same architecture, a few ten thousand random weights), the files (made, in the recipe's
formats), the benchmarks (the recipe's own data) and all counts. A random model says nothing that curation would keep,
so every candidate is kept. All other lines stay: stages, rates, adapters, mixture, kinds, scorers, precision, engine.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path
from typing import Any

from sicog_exp.data.images import IMAGES
from sicog_exp.recipe import (
    CurationConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    PlanConfig,
    Recipe,
    RecipeError,
    SamplingConfig,
    StageConfig,
)
from sicog_exp.records import Record, read_records
from sicog_exp.reporting.export import chat_row, llava_row

PREFIX = "smoke-"
COUNTS = {"annotated_images": 8, "unlabeled_images": 4, "instruction_images": 4, "development_images": 3,
          "benchmark_images": 3, "questions_per_image": 2}  # fmt: skip
STEPS, BATCH, MICRO_BATCH, NEW_TOKENS, BOOTSTRAP = 2, 4, 2, 16, 100
STAGES = ("develop", "preference", "align", "pretrain", "instruct")
FILES = ("annotated", "unlabeled", "instruction", "alignment", "development", "benchmark")
EPOCH = (0, 0)
"""Times of the files: a data set is known by them, and the same smoke test is to be the same."""


def sized(recipe: Recipe) -> Recipe:
    """The recipe as its `scale` wants it: itself, or its smoke test, whose model and files now lie under its store.

    Raises RecipeError for an architecture that has no miniature, ModelError where none is named.
    """
    if recipe.scale == "full":
        return recipe
    made = _make(recipe)
    stages: dict[str, Any] = {name: _stage(getattr(recipe, name), recipe.model.ranks) for name in STAGES}
    own = recipe.data.source == "own"
    return replace(
        recipe, name=PREFIX + recipe.name.removeprefix(PREFIX), data=_data(recipe.data, made), plan=PlanConfig(),
        model=_model(recipe.model, made), sampling=_sampling(recipe.sampling), curation=_curation(recipe.curation),
        evaluation=_evaluation(recipe.evaluation, own), closing_steps=_least(recipe.closing_steps, STEPS), **stages,
    )  # fmt: skip


def refuse(recipe: Recipe, command: str) -> None:
    """Raises RecipeError for a smoke test that `command` would take for a run."""
    if recipe.scale == "smoke":
        raise RecipeError(f"scale=smoke: `sicog {command}` has no use for it; run it with `sicog iterate`")


def swapped(recipe: Recipe) -> str:
    """What a smoke test is, in a sentence for people."""
    return (f"{recipe.name}, scale=smoke: a miniature with random weights, made pictures, {STEPS} steps a stage, every "
            "candidate kept; whether the recipe runs, never a result")  # fmt: skip


def _least(value: int | None, most: int) -> int | None:
    return None if value is None else min(value, most)


def _stage(stage: StageConfig, ranks: int) -> StageConfig:
    """As many rows for each rank, at least one."""
    batch = min(stage.batch_size, ranks * max(1, BATCH // ranks))
    return replace(stage, steps=min(stage.steps, STEPS), batch_size=batch,
                   micro_batch_size=gcd(batch, min(stage.micro_batch_size, MICRO_BATCH)))  # fmt: skip


def _sampling(sampling: SamplingConfig) -> SamplingConfig:
    return replace(sampling, batch_size=min(sampling.batch_size, BATCH),
                   max_new_tokens=min(sampling.max_new_tokens, NEW_TOKENS))  # fmt: skip


def _curation(curation: CurationConfig) -> CurationConfig:
    """Every candidate is kept; an encoder that is not packaged becomes one that is."""
    given = [kind for kind in ("cod", "dd", "cot", "direct") if getattr(curation, f"{kind}_threshold") is not None]
    own: dict[str, Any] = {f"{kind}_threshold": 0.0 for kind in given}
    encoder = curation.encoder if curation.encoder in ("lexical", "minilm") else "minilm"
    return replace(curation, encoder=encoder, caption_threshold=0.0, reasoning_threshold=0.0, require_format=False,
                   require_direct_agreement=False, min_words=0, **own)  # fmt: skip


def _evaluation(evaluation: EvaluationConfig, own: bool) -> EvaluationConfig:
    return replace(evaluation, suite="own" if own else evaluation.suite, judge=False,
                   batch_size=min(evaluation.batch_size, BATCH), bootstrap=min(evaluation.bootstrap, BOOTSTRAP),
                   max_new_tokens=min(evaluation.max_new_tokens, NEW_TOKENS))  # fmt: skip


def _data(data: DataConfig, made: Path) -> DataConfig:
    if data.source != "own":
        return replace(data, **{name: min(getattr(data, name), count) for name, count in COUNTS.items()})
    files: dict[str, Any] = {split: str(made / _file_name(data, split)) for split in FILES if getattr(data, split)}
    return replace(data, root=None, unlabeled_images=min(data.unlabeled_images, COUNTS["unlabeled_images"]), **files)


def _model(model: ModelConfig, made: Path) -> ModelConfig:
    if not model.language:
        return model if model.base == "embedded" else replace(model, base=str(made / "base"))
    vision = model.vision if model.vision == "embedded" else str(made / "vision")
    return replace(model, language=str(made / "language"), vision=vision)


# What is made.


def _make(recipe: Recipe) -> Path:
    """The folder of the recipe's miniature and files, as a whole or not at all."""
    makers = _makers(recipe)
    named = json.dumps([*makers, *(_file_name(recipe.data, split) for split in FILES)])
    folder = Path(recipe.store) / "smoke" / f"{recipe.name.removeprefix(PREFIX)}-{_digest(named)}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as name:
        place = Path(name) / folder.name
        place.mkdir()
        for part, save in makers.items():
            save(place / part.partition(" ")[0])
        if recipe.data.source == "own":
            _write_files(recipe.data, place)
        try:
            place.rename(folder)
        except OSError:  # another run made it meanwhile
            if not folder.is_dir():
                raise
    return folder


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _makers(recipe: Recipe) -> dict[str, Callable[[Path], Any]]:
    """Part and architecture -> what saves its miniature in a folder; the shipped base is small enough as it is."""
    model = recipe.model
    if model.base == "embedded" and not model.language:
        return {}
    from sicog_exp.models import miniatures
    from sicog_exp.models.loading import resolve_base
    from sicog_exp.models.shapes import composed_config, read_config

    shape = recipe.plan.shape
    if not model.language:
        config: Any = read_config(shape or model.base, model.trust_remote_code)
        return {f"base {config.model_type}": _maker(miniatures.FAMILIES, config.model_type)}
    config = read_config(shape) if shape else composed_config(model.language, resolve_base(str(model.vision)))
    text, vision = config.text_config.model_type, config.vision_config.model_type
    made = {f"language {text}": _maker(miniatures.LANGUAGES, text)}
    return made if model.vision == "embedded" else made | {f"vision {vision}": _maker(miniatures.TOWERS, vision)}


def _maker(known: Mapping[str, Callable[[], Any]], architecture: str) -> Callable[[Path], Any]:
    from sicog_exp.models.miniatures import save

    if architecture not in known:
        raise RecipeError(f"scale=smoke: no miniature of the architecture {architecture}; there are {', '.join(known)}")
    return lambda folder: save(known[architecture], folder)


@dataclass(frozen=True)
class _World:
    """A small data set of the built-in world: its pictures, and its records by split."""

    directory: Path
    records: Mapping[str, Sequence[Record]]


def _write_files(data: DataConfig, folder: Path) -> None:
    """The files that the recipe names, in the formats that it names them in; pictures lie beside them."""
    from sicog_exp.data.sources import SPLITS, build_dataset

    with tempfile.TemporaryDirectory(dir=folder) as name:
        directory = Path(name)
        build_dataset(DataConfig(source="world", **COUNTS), directory)  # type: ignore[arg-type]
        world = _World(directory, {split: read_records(directory / f"{split}.parquet") for split in SPLITS})
        shutil.copytree(directory / IMAGES, folder / IMAGES)
    for split in (split for split in FILES if getattr(data, split)):
        _write_split(split, folder / _file_name(data, split), world, folder)
    for path in (path for path in folder.rglob("*") if path.is_file()):
        os.utime(path, EPOCH)


def _file_name(data: DataConfig, split: str) -> str:
    """A list (.json), rows (.jsonl), or, of unlabeled pictures, a folder."""
    named = str(getattr(data, split) or "")
    if split == "unlabeled" and not Path(named).suffix and not named.startswith("hub:"):
        return split
    return f"{split}.json" if named.endswith(".json") else f"{split}.jsonl"


def _write_split(split: str, path: Path, world: _World, folder: Path) -> None:
    if split == "unlabeled":
        records = world.records["unlabeled"]
        if path.suffix:
            _write_rows(path, ({"image": r.images[0], "question": _question(r)} for r in records if r.kind == "cot"))
            return
        path.mkdir()
        for image in dict.fromkeys(image for record in records for image in record.images):
            shutil.copyfile(folder / image, path / Path(image).name)
        return
    records = world.records["annotated" if split == "alignment" else split]
    row = llava_row if path.suffix == ".json" else chat_row
    _write_rows(path, (row(record) for record in records if split != "alignment" or record.kind == "dd"))


def _question(record: Record) -> str:
    from sicog_exp.data.readers import words_of
    from sicog_exp.prompts import question_of

    return question_of(record.kind, words_of(record.prompt[-1]))


def _write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "[" + ",\n".join(lines) + "]" if path.suffix == ".json" else "\n".join(lines)
    path.write_text(text + "\n", encoding="utf-8")
