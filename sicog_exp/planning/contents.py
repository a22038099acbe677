"""What a recipe's data hold: rows by kind, and how many tokens they have. Measured on a few rows of each kind, built
or read as a run would; assumed where the data are not at hand."""

from __future__ import annotations

import math
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sicog_exp.data.chat import IGNORED, ChatEncoder, ChatError
from sicog_exp.data.formats import BadRow, default_root, exists, found_rows, is_hub, pictures_in
from sicog_exp.data.images import IMAGES, ImageError, ImageFolder, open_image
from sicog_exp.data.readers import as_chat, holds_images, infer_kind, make_record, parse_row, words_of
from sicog_exp.data.sources import build_dataset
from sicog_exp.prompts import CAPTION_KINDS, KINDS, REASONING_KINDS, Kind, prompt, question_of
from sicog_exp.recipe import DataConfig, Recipe
from sicog_exp.records import IMAGE_PLACEHOLDER, Record, read_records, user

SAMPLE = 32
"""Images, or rows of a kind, that are looked at."""
ASSUMED = {"cod": 400, "dd": 200, "cot": 250, "direct": 5, "alignment": 15, "instruction": 250, "text": 250,
           "question": 40}  # fmt: skip
"""Tokens where neither the data nor the recipe's `plan` say more."""
PICTURE_BYTES = 150_000
"""A picture of data that are not at hand."""
ALIGNMENT_ROWS = 558_128
"""Of BLIP-558K, where a recipe names captions to align with that are not at hand."""
CHARACTERS_PER_TOKEN, MARKS_PER_TURN = 4, 8
"""A rough count of English text where there is no tokenizer, and of a chat template's marks."""
SIZES = ("annotated_images", "unlabeled_images", "instruction_images", "development_images", "benchmark_images")


@dataclass(frozen=True)
class Rows:
    """Rows of one kind: mean tokens of their prompts' text and images, and the tokens of each response looked at."""

    count: float
    text: float
    image: float
    responses: tuple[int, ...] = (0,)

    def new(self, limit: int | None = None) -> float:
        """Mean tokens of a response, cut at `limit`."""
        return mean(min(n, limit) if limit else n for n in self.responses)


@dataclass(frozen=True)
class Held:
    """Questions of a benchmark, and about how many pictures."""

    questions: float
    pictures: float


@dataclass(frozen=True)
class Contents:
    """A data set on paper. `asked`: the prompts of sampling and evaluation; `notes` say what was measured on what."""

    annotated: Mapping[Kind, Rows]
    instruction: Rows
    alignment: Rows
    text: Rows
    asked: Mapping[Kind, Rows]
    captions: float
    """Unlabeled images to describe."""
    questions: float
    splits: Mapping[str, Held]
    pictures: float
    picture_bytes: float
    notes: tuple[str, ...] = ()


@dataclass
class _Sample:
    """A few records of each split under `root`, and how many rows of each kind, and pictures, there are in all."""

    root: Path
    records: dict[str, list[Record]] = field(default_factory=lambda: defaultdict(list))
    counts: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    pictures: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def count(self, split: str, kinds: Iterable[str] = KINDS) -> float:
        return sum(self.counts[split, kind] for kind in kinds)


class Ruler:
    """Tokens of a record, counted by the model's own processor, or roughly where only its shape is known."""

    def __init__(self, encoder: ChatEncoder | None, image_tokens: int, max_pixels: int) -> None:
        self.encoder, self._image_tokens, self._max_pixels = encoder, image_tokens, max_pixels

    def of(self, record: Record, root: Path) -> tuple[int, int, int]:
        """(text, image, response) tokens."""
        return self._counted(record, root) if self.encoder else self._rough(record)

    def _counted(self, record: Record, root: Path) -> tuple[int, int, int]:
        assert self.encoder
        pictures = [open_image(root, name, self._max_pixels) for name in record.images]
        inputs = self.encoder.pixels(pictures) if pictures else None
        if record.response is None:
            ids, new = self.encoder.prompt(record.messages, inputs), 0
        else:
            example = self.encoder.example(record.messages, inputs, 1 << 30)
            ids, new = example.input_ids, sum(label != IGNORED for label in example.labels)
        image = ids.count(self.encoder.processor.image_token_id)
        return len(ids) - image - new, image, new

    def _rough(self, record: Record) -> tuple[int, int, int]:
        text = new = 0
        for message in record.messages:
            tokens = len(message.content.replace(IMAGE_PLACEHOLDER, "")) // CHARACTERS_PER_TOKEN + 1
            text += MARKS_PER_TURN + (0 if message.role == "assistant" else tokens)
            new += tokens if message.role == "assistant" else 0
        return text, self._image_tokens * len(record.images), new


def mean(values: Iterable[float]) -> float:
    """0.0 of nothing."""
    found = list(values)
    return sum(found) / len(found) if found else 0.0


def read_contents(recipe: Recipe, ruler: Ruler, image_tokens: int) -> Contents:
    """What `recipe.data` holds. Raises DataError where a file cannot be read as a whole."""
    config = recipe.data
    with tempfile.TemporaryDirectory(prefix="sicog-plan-") as folder:
        if config.source == "own" and not all(map(_at_hand, (config.annotated, config.unlabeled))):
            return _given(recipe, _assumed(config, image_tokens))
        sample = _own(config, Path(folder)) if config.source == "own" else _built(config, Path(folder))
        return _given(recipe, _measured(sample, ruler, image_tokens))


def _at_hand(source: str | None) -> bool:
    """Whether rows or images can be looked at; a hub is not asked."""
    return bool(source) and not is_hub(Path(str(source))) and exists(Path(str(source)).expanduser())


# What was measured.


def _measured(sample: _Sample, ruler: Ruler, image_tokens: int) -> Contents:
    annotated = {kind: _rows(sample, ruler, "annotated", (kind,)) for kind in KINDS if sample.counts["annotated", kind]}
    seen = [kind for kind in KINDS if kind != "text"]
    texts = [_rows(sample, ruler, split, ("text",)) for split in ("instruction", "annotated")]
    files = [path.stat().st_size for path in (sample.root / IMAGES).glob("*") if path.is_file()]
    how = "the model's processor" if ruler.encoder else f"{CHARACTERS_PER_TOKEN} characters a token, no processor"
    looked = sum(map(len, sample.records.values()))
    note = f"tokens are means over {looked} rows of these data, counted by {how}"
    return Contents(
        annotated, _rows(sample, ruler, "instruction", seen), _rows(sample, ruler, "alignment", seen),
        max(texts, key=lambda rows: rows.count), _asked(sample, ruler, annotated, image_tokens),
        sample.count("unlabeled", CAPTION_KINDS), sample.count("unlabeled", REASONING_KINDS),
        {split: Held(sample.count(split), sample.pictures[split]) for split in ("benchmark", "development")},
        sum(sample.pictures.values()), mean(files), (note,))  # fmt: skip


def _rows(sample: _Sample, ruler: Ruler, split: str, kinds: Sequence[str]) -> Rows:
    records = [record for record in sample.records[split] if record.kind in kinds]
    lengths = list(_lengths(records, ruler, sample.root))
    text, image = (mean(length[i] for length in lengths) for i in (0, 1))
    return Rows(sample.count(split, kinds), text, image, tuple(length[2] for length in lengths) or (0,))


def _lengths(records: Iterable[Record], ruler: Ruler, root: Path) -> Iterator[tuple[int, int, int]]:
    """Of the rows that training would take: it sets aside what the chat template or the processor refuses."""
    for record in records:
        try:
            yield ruler.of(record, root)
        except ChatError:
            continue


def _asked(sample: _Sample, ruler: Ruler, annotated: Mapping[Kind, Rows], image_tokens: int) -> dict[Kind, Rows]:
    """Prompts of every kind about the unlabeled images; responses as long as the annotated ones."""
    found: dict[Kind, Rows] = {}
    for kinds in (CAPTION_KINDS, REASONING_KINDS):
        records = [r for r in sample.records["unlabeled"] if r.kind in kinds][:SAMPLE]
        for kind in kinds:
            known = annotated.get(kind, _assumed_rows(kind, image_tokens))
            lengths = list(_lengths((_worded(record, kind) for record in records), ruler, sample.root))
            text, image = (mean(length[i] for length in lengths) for i in (0, 1))
            found[kind] = replace(known, text=text, image=image) if lengths else known
    return found


def _worded(record: Record, kind: Kind) -> Record:
    """The request of a kind about an unlabeled record, as sampling words it."""
    question = question_of(record.kind, words_of(record.prompt[-1]))
    return replace(record, kind=kind, messages=(user(prompt(kind, question), len(record.images)),))


# Data that are made: a smaller data set of the same build.


def _built(config: DataConfig, folder: Path) -> _Sample:
    sizes = {name: min(getattr(config, name), SAMPLE) for name in SIZES}
    build_dataset(replace(config, **sizes), folder)
    sample = _Sample(folder)
    for name, size in sizes.items():
        split = name.removesuffix("_images")
        factor = getattr(config, name) / size if size else 0.0
        sample.records[split] = read_records(folder / f"{split}.parquet")
        for kind, number in Counter(record.kind for record in sample.records[split]).items():
            sample.counts[split, kind] = number * factor
        sample.pictures[split] = getattr(config, name)
    return sample


# A user's own files.


def _own(config: DataConfig, folder: Path) -> _Sample:
    """Every row counts as usable; the first ones of each kind are read as a run reads them. Of a picture's name a
    hash is held, to count them."""
    sample, pictures = _Sample(folder), ImageFolder(folder, config.max_pixels)
    for split in ("annotated", "instruction", "alignment", "development", "benchmark"):
        if _at_hand(getattr(config, split)):
            _read_annotated(Path(getattr(config, split)).expanduser(), split, config, sample, pictures)
    missing = [split for split in ("development", "benchmark") if getattr(config, split) is None]
    shown = sample.count("annotated", [kind for kind in KINDS if kind != "text"])
    for split in missing:
        sample.counts[split, "direct"] = config.holdout * shown
        sample.pictures[split] = config.holdout * sample.pictures["annotated"]
    for kind in (kind for kind in KINDS if kind != "text"):
        sample.counts["annotated", kind] *= 1 - config.holdout * len(missing)
    sample.pictures["annotated"] *= 1 - config.holdout * len(missing)
    _read_unlabeled(Path(str(config.unlabeled)).expanduser(), config, sample, pictures)
    return sample


def _root(config: DataConfig, path: Path) -> Path:
    return Path(config.root).expanduser() if config.root else default_root(path)


def _read_annotated(path: Path, split: str, config: DataConfig, sample: _Sample, pictures: ImageFolder) -> None:
    named: set[int] = set()
    for number, found in enumerate(found_rows(path)):
        try:
            row = parse_row(found.raw, f"{split}-{number}")
            kind = row.kind or infer_kind(row.messages, tuple(map(str, row.images)))
            sample.counts[split, kind] += 1
            named.update(map(hash, row.images))
            if sum(record.kind == kind for record in sample.records[split]) < SAMPLE:
                sample.records[split].append(make_record(row, _root(config, path), pictures, split))
        except BadRow:
            continue
    sample.pictures[split] += len(named)


def _read_unlabeled(path: Path, config: DataConfig, sample: _Sample, pictures: ImageFolder) -> None:
    kept: set[int] = set()
    asked: dict[Kind, list[tuple[Any, str]]] = {"cod": [], "cot": []}
    questions = 0
    for name, text in _requests(path):
        if hash(name) not in kept and len(kept) < (config.unlabeled_images or math.inf):
            kept.add(hash(name))
            asked["cod"] += [(name, "")] if len(kept) <= SAMPLE else []
        if text and hash(name) in kept:
            questions += 1
            asked["cot"] += [(name, text)] if questions <= SAMPLE else []
    sample.counts["unlabeled", "cod"], sample.counts["unlabeled", "cot"] = len(kept), questions
    sample.pictures["unlabeled"] += len(kept)
    root = path if holds_images(path) else _root(config, path)
    for kind, rows in asked.items():
        for name, text in rows:
            try:
                stored = pictures.add(root, name)
            except ImageError:
                continue
            record = Record(f"{kind}-{stored}-{text}", (user(prompt(kind, text), 1),), (stored,), kind, "unlabeled")
            sample.records["unlabeled"].append(record)


def _requests(path: Path) -> Iterator[tuple[Any, str]]:
    """(image, question) of every unlabeled row or file; the question is empty where a caption is asked for."""
    if holds_images(path):
        yield from ((str(file.relative_to(path)), "") for file in pictures_in(path)[0])
        return
    for found in found_rows(path):
        try:
            row = parse_row(as_chat(found.raw), "-")
        except BadRow:
            continue
        words = next((words_of(message) for message in row.messages if message.role == "user"), "")
        for kind in REASONING_KINDS:
            words = question_of(kind, words)
        yield from ((name, "" if words in map(prompt, CAPTION_KINDS) else words) for name in row.images[:1])


# What is assumed.


def _assumed_rows(kind: str, image_tokens: int, count: float = 0.0) -> Rows:
    return Rows(count, ASSUMED["question"], 0 if kind == "text" else image_tokens, (ASSUMED[kind],))


def _assumed(config: DataConfig, image_tokens: int) -> Contents:
    """A data set of the recipe's numbers, where its files are not at hand."""
    per_image, images = config.questions_per_image, config.annotated_images
    annotated: dict[Kind, Rows] = {kind: _assumed_rows(kind, image_tokens, images) for kind in CAPTION_KINDS}
    annotated |= {kind: _assumed_rows(kind, image_tokens, images * per_image) for kind in REASONING_KINDS}
    splits = {split: Held(number * per_image, number) for split, number in
              (("benchmark", config.benchmark_images), ("development", config.development_images))}  # fmt: skip
    note = (f"the data ({config.annotated}, {config.unlabeled}) are not at hand: rows by data.annotated_images, "
            f"data.unlabeled_images, data.instruction_images and data.questions_per_image, {PICTURE_BYTES:,} bytes a "
            "picture, tokens by plan.*_tokens")  # fmt: skip
    return Contents(
        annotated, _assumed_rows("instruction", image_tokens, config.instruction_images),
        _assumed_rows("alignment", image_tokens, ALIGNMENT_ROWS if config.alignment else 0),
        _assumed_rows("text", image_tokens, config.instruction_images), dict(annotated), config.unlabeled_images,
        config.unlabeled_images * per_image, splits,
        sum(getattr(config, name) for name in SIZES) + (ALIGNMENT_ROWS if config.alignment else 0), PICTURE_BYTES,
        (note,))  # fmt: skip


def _given(recipe: Recipe, found: Contents) -> Contents:
    """The contents with what the recipe's `plan` says instead."""
    plan = recipe.plan

    def said(kind: str, rows: Rows) -> Rows:
        tokens, text = getattr(plan, f"{kind}_tokens"), plan.question_tokens
        rows = rows if text is None or kind == "instruction" else replace(rows, text=text)
        return rows if tokens is None else replace(rows, responses=(tokens,))

    annotated = {kind: said(kind, one) for kind, one in found.annotated.items()}
    instruction, alignment, text = (said(name, getattr(found, name)) for name in ("instruction", "alignment", "text"))
    named: dict[Any, Rows] = {**annotated, "instruction": instruction, "alignment": alignment, "text only": text}
    lengths = [f"{name} rows: {one.new():.0f} tokens a response, {one.text:.0f} of text and {one.image:.0f} of images "
               "a prompt" for name, one in named.items() if one.count]  # fmt: skip
    said_instead = [f"plan.{name}={value}" for name, value in vars(plan).items() if value is not None]
    lengths += [f"given, not measured: {', '.join(said_instead)}"] if said_instead else []
    return replace(
        found, annotated=annotated, instruction=instruction, alignment=alignment, text=text,
        asked={kind: said(kind, one) for kind, one in found.asked.items()},
        questions=plan.unlabeled_questions or found.questions,
        notes=(*found.notes, *lengths))  # fmt: skip
