"""Does a training row show or say what a benchmark asks? Pictures by content, texts by long word sequences.

Pure functions over decoded pictures and words; who reads them from where is the caller's business.

Pictures. Equal pixels are equal (sha256). A near copy (resized, recompressed, brighter, cropped by up to a tenth at
each side) is found in two steps: the three benchmark pictures that are most alike at 5 x 5 blocks, nine small crops of
either included, then the best correlation of one with a window of the other at 24 x 24. Each colour is centred, so that
brightness does not count. Perceptual hashes were measured and are not enough: a crop's 64 and 256 bits differ from its
original's by .22 and .38 of their number (median), while different pictures of the built-in world differ by as little
as .09 and .20. Measured correlations stand in docs/trust.md. Plain pictures (one shape on a ground) look like many
others: of two of them only equal pixels prove that they are the same.

Texts. A short question recurs by construction ("How many dogs are there?"): its text counts only beside a near copy of
its picture. A long text counts alone, when its sequences of 8 words are found again and its answer is there too.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sicog_exp.curation.similarity import lexical_similarity, words_of
from sicog_exp.data.images import pixel_hash

if TYPE_CHECKING:
    from PIL.Image import Image

Floats = npt.NDArray[np.float32]

SIDE, FINE, GRID, COARSE = 48, 24, 8, 5
"""Pixels a side of a thumbnail, of what decides, of the search for a window, of the first look."""
CANDIDATES, FIRST_LOOK, SAME = 3, 0.72, 0.87
"""Benchmark pictures looked at for each training picture; correlations from which they are searched, and found."""
REFINED: tuple[tuple[float, tuple[float, ...]], ...] = ((0.6, (0.025, 0.0125)), (0.74, (0.025, 0.0125, 0.006)))
"""From which correlation on a window is moved, and by which shares: twice where it may be a copy."""
LARGEST_CUT = 0.125
PLAIN = 430
"""Bytes of a compressed thumbnail in 16 levels under which a picture is too plain to be told from its likes: easy-vqa's
5,000 have up to 422, a page of text 719, the built-in world 1,387 or more, photographs mostly over 600."""
NGRAM, LONG, COVERED, TEMPLATE = 8, 12, 0.8, 3
"""Words of a sequence; words of a text that counts alone; share of it that must be found again; a sequence that this
many different pictures' questions hold is a form of words."""
PAIRS_PER_BATCH, ROWS_PER_BATCH = 128, 2048


@dataclass(frozen=True)
class Picture:
    """What comparing needs of a picture: its pixels' hash, a thumbnail (SIDE, SIDE, 3) and whether it is plain."""

    digest: str
    thumbnail: npt.NDArray[np.uint8]
    plain: bool


@dataclass(frozen=True)
class Question:
    """One question of a benchmark; `images` are keys of its pictures."""

    task: str
    id: str
    question: str
    answer: str = ""
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One training row; `response` is empty for an unlabeled one."""

    split: str
    id: str
    question: str
    response: str = ""
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Match:
    """A training picture that shows a benchmark's; `distance` is 0 for equal pixels, else 1 - correlation."""

    image: str
    benchmark_image: str
    how: str
    distance: float


@dataclass(frozen=True)
class Overlap:
    """A training row that overlaps with a benchmark: `how` is same pixels, near copy or text.

    `distance` is the pictures', or the share of a text that was not found again; `question_similarity` says how alike
    the questions are, in [0, 1].
    """

    split: str
    id: str
    image: str | None
    task: str
    benchmark_id: str
    how: str
    distance: float
    question_similarity: float


def picture_of(image: Image) -> Picture:
    """An RGB image as it is compared."""
    from PIL.Image import Resampling

    small = image.resize((SIDE, SIDE), Resampling.BOX if min(image.size) >= SIDE else Resampling.BILINEAR)
    thumbnail = np.asarray(small, np.uint8)
    size = len(zlib.compress(np.ascontiguousarray(thumbnail.transpose(2, 0, 1) // 16).tobytes(), 6))
    return Picture(pixel_hash(image), thumbnail, size < PLAIN)


def overlaps(rows: Iterable[Row], pictures: Mapping[str, Picture], questions: Sequence[Question],
             benchmark_pictures: Mapping[str, Picture]) -> Iterator[Overlap]:  # fmt: skip
    """Every training row with every benchmark picture it shows (the question most like its own stands for the
    picture's), or with the text it repeats; in the rows' order.

    Rows and pictures are walked through once, the pictures first, and not held; what a benchmark holds is.
    """
    shown: dict[str, list[Match]] = defaultdict(list)
    for match in picture_matches(pictures, benchmark_pictures):
        shown[match.image].append(match)
    asked: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        for image in question.images:
            asked[image].append(question)
    texts = TextIndex(questions)
    for row in rows:
        found = [_by_picture(row, match, asked[match.benchmark_image]) for image in row.images
                 for match in shown.get(image, ())]  # fmt: skip
        yield from found or texts.overlaps(row)


def _by_picture(row: Row, match: Match, questions: Sequence[Question]) -> Overlap:
    likeness = [lexical_similarity(row.question, q.question) for q in questions]
    best = max(range(len(likeness)), key=likeness.__getitem__)
    asked = questions[best]
    return Overlap(row.split, row.id, match.image, asked.task, asked.id, match.how, match.distance,
                   round(likeness[best], 4))  # fmt: skip


# Pictures.


def picture_matches(pictures: Mapping[str, Picture], benchmark: Mapping[str, Picture]) -> list[Match]:
    """Training pictures that show a picture of a benchmark, by name of both.

    `pictures` are walked through once, so they may be read as they are asked for: ROWS_PER_BATCH of the plain ones and
    of the others are held.
    """
    by_digest: dict[str, list[str]] = defaultdict(list)
    for name, picture in benchmark.items():
        by_digest[picture.digest].append(name)
    detailed = {name: picture for name, picture in benchmark.items() if not picture.plain}
    looked_at = {False: _Views.of(benchmark), True: _Views.of(detailed)}  # of two plain pictures nothing can be said
    found: list[Match] = []
    for plain, batch in _of_one_sort(pictures.items()):
        found += [Match(name, other, "same pixels", 0.0) for name, picture in batch
                  for other in by_digest.get(picture.digest, ())]  # fmt: skip
        found += _near_copies(batch, benchmark, looked_at[plain])
    return found


def _of_one_sort(pictures: Iterable[tuple[str, Picture]]) -> Iterator[tuple[bool, list[tuple[str, Picture]]]]:
    """(plain, named pictures), ROWS_PER_BATCH together as long as there are so many."""
    waiting: dict[bool, list[tuple[str, Picture]]] = {False: [], True: []}
    for name, picture in pictures:
        batch = waiting[picture.plain]
        batch.append((name, picture))
        if len(batch) == ROWS_PER_BATCH:
            yield picture.plain, batch
            waiting[picture.plain] = []
    yield from ((plain, batch) for plain, batch in waiting.items() if batch)


@dataclass(frozen=True)
class _Views:
    """Benchmark pictures as training pictures are compared with them: thumbnails, and crops of these at COARSE."""

    names: list[str]
    thumbnails: npt.NDArray[np.uint8]
    views: list[Floats]

    @classmethod
    def of(cls, pictures: Mapping[str, Picture]) -> _Views | None:
        """None of no pictures."""
        if not pictures:
            return None
        thumbnails = np.stack([picture.thumbnail for picture in pictures.values()])
        return cls(list(pictures), thumbnails, [_coarse(thumbnails, cut) for cut in FIRST_CUTS])


def _near_copies(batch: Sequence[tuple[str, Picture]], benchmark: Mapping[str, Picture],
                 others: _Views | None) -> Iterator[Match]:  # fmt: skip
    """Matches that are not of the same pixels."""
    if others is None:
        return
    for i, j, score in _near(np.stack([picture.thumbnail for _, picture in batch]), others):
        (name, picture), other = batch[i], others.names[j]
        if picture.digest != benchmark[other].digest:
            yield Match(name, other, "near copy", round(1 - score, 4))


def _near(part: npt.NDArray[np.uint8], others: _Views) -> Iterator[tuple[int, int, float]]:
    first, second = _alike([_coarse(part, cut) for cut in FIRST_CUTS], others.views)
    for start in range(0, len(first), PAIRS_PER_BATCH):
        i, j = first[start : start + PAIRS_PER_BATCH], second[start : start + PAIRS_PER_BATCH]
        x, y = part[i].astype(np.float32), others.thumbnails[j].astype(np.float32)
        scores = np.maximum(window_correlation(x, y), window_correlation(y, x))
        yield from ((int(i[k]), int(j[k]), float(scores[k])) for k in np.nonzero(scores >= SAME)[0])


def _alike(a: Sequence[Floats], b: Sequence[Floats]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Pairs worth a second look: for each of `a` the CANDIDATES of `b` most alike at COARSE blocks, crops included.

    One matrix product a crop: 100,000 pictures against 10,000 are 1.4e12 multiplications and no loop over pairs.
    """
    score = a[0] @ b[0].T
    for whole, cut in zip(b[1:], a[1:], strict=True):
        np.maximum(score, a[0] @ whole.T, out=score)
        np.maximum(score, cut @ b[0].T, out=score)
    count = min(CANDIDATES, score.shape[1])
    best = np.argpartition(-score, count - 1, axis=1)[:, :count].ravel()
    rows = np.repeat(np.arange(len(score)), count)
    kept = score[rows, best] >= FIRST_LOOK
    return rows[kept], best[kept]


FIRST_CUTS: tuple[tuple[float, float, float, float], ...] = (
    (0, 0, 0, 0),
    *((top, 0.1 - top, left, 0.1 - left) for top, left in product((0, 0.05, 0.1), repeat=2)),
)
"""The whole picture and nine crops, as shares cut off at the top, bottom, left and right."""
SEARCH_CUTS: Floats = np.array(list(product((0, 0.05, 0.1), repeat=2)), np.float32)
"""What is cut off at both ends of an axis in the search for a window; 81 windows."""


def _coarse(pictures: npt.NDArray[np.uint8], cut: tuple[float, float, float, float]) -> Floats:
    parts = [pictures[s : s + ROWS_PER_BATCH].astype(np.float32) for s in range(0, len(pictures), ROWS_PER_BATCH)]
    cuts = np.tile(np.array(cut, np.float32), (ROWS_PER_BATCH, 1))
    return np.concatenate([_units(_windows(part, COARSE, cuts[: len(part)])) for part in parts])


def window_correlation(whole: Floats, other: Floats) -> Floats:
    """The best correlation of each picture with a window of its partner (both (n, SIDE, SIDE, 3)), at FINE pixels."""
    cuts, score = _search(whole, other)
    for floor, steps in REFINED:
        chosen = np.nonzero(score >= floor)[0]
        if len(chosen):
            cuts[chosen], score[chosen] = _refined(whole[chosen], other[chosen], cuts[chosen], steps)
    return score


def _refined(whole: Floats, other: Floats, cuts: Floats, steps: Sequence[float]) -> tuple[Floats, Floats]:
    """Windows moved at one side at a time as long as that helps, and their correlation."""
    target, cut = _units(_windows(whole, FINE)), cuts.copy()
    best = (target * _units(_windows(other, FINE, cut))).sum(1)
    for step, side, sign in product(steps, range(4), (-1, 1)):
        moved = cut.copy()
        moved[:, side] = np.clip(moved[:, side] + sign * step, 0, LARGEST_CUT)
        value = (target * _units(_windows(other, FINE, moved))).sum(1)
        better = value > best
        best[better], cut[better] = value[better], moved[better]
    return cut, best


def _search(whole: Floats, other: Floats) -> tuple[Floats, Floats]:
    """The best of 81 windows at GRID pixels: its cuts and its correlation."""
    n, count = len(other), len(SEARCH_CUTS)
    weights = _areas(GRID, SEARCH_CUTS[:, 0], SEARCH_CUTS[:, 1]).reshape(count * GRID, SIDE)
    rows = (weights @ other.reshape(n, SIDE, SIDE * 3)).reshape(n, count * GRID, SIDE, 3)
    # picture, window y, y, colour, window x, x; the products are those of `_units`, without copies of 81 views each
    views = (rows.transpose(0, 1, 3, 2) @ weights.T).reshape(n, count, GRID, 3, count, GRID)
    target = _units(_windows(whole, GRID)).reshape(n, GRID, GRID, 3).transpose(0, 1, 3, 2)
    products = np.einsum("pwycvx,pycx->pwv", views, target, optimize=True)
    squares = np.einsum("pwycvx,pwycvx->pwv", views, views) - (views.sum((2, 5)) ** 2).sum(2) / GRID**2
    scores = (products / np.sqrt(np.maximum(squares, 1e-6))).reshape(n, count * count)
    best = scores.argmax(1)
    return np.concatenate([SEARCH_CUTS[best // count], SEARCH_CUTS[best % count]], 1), scores.max(1)


def _windows(pictures: Floats, size: int, cuts: Floats | None = None) -> Floats:
    """(n, size, size, colours): each picture's window, averaged over areas; `cuts` (n, 4): top, bottom, left, right."""
    n, side, _, colours = pictures.shape
    cuts = np.zeros((n, 4), np.float32) if cuts is None else cuts
    rows = _areas(size, cuts[:, 0], cuts[:, 1]) @ pictures.reshape(n, side, side * colours)
    rows = rows.reshape(n, size, side, colours).transpose(0, 2, 1, 3).reshape(n, side, size * colours)
    both = _areas(size, cuts[:, 2], cuts[:, 3]) @ rows
    return both.reshape(n, size, size, colours).transpose(0, 2, 1, 3)


def _areas(size: int, before: Floats, after: Floats) -> Floats:
    """(n, size, SIDE) weights: means over `size` equal pieces of what the cuts leave of SIDE pixels."""
    share = np.linspace(0, 1, size + 1, dtype=np.float32)
    edges = (before[:, None] + (1 - after - before)[:, None] * share) * SIDE
    pixel = np.arange(SIDE, dtype=np.float32)
    covered = np.minimum(edges[:, 1:, None], pixel + 1) - np.maximum(edges[:, :-1, None], pixel)
    weights = np.clip(covered, 0, None)
    return weights / weights.sum(-1, keepdims=True)


def _units(pictures: Floats) -> Floats:
    """Vectors of length 1, each colour centred: their product is the correlation."""
    centred = pictures - pictures.mean((-3, -2), keepdims=True)
    flat = centred.reshape(*centred.shape[:-3], -1)
    return flat / np.maximum(np.linalg.norm(flat, axis=-1, keepdims=True), 1e-3)


# Texts.


class TextIndex:
    """The long texts of benchmarks, found again in training rows by their sequences of NGRAM words.

    Sequences that TEMPLATE or more pictures' questions hold are forms of words: they neither find a text nor count in
    its length.
    """

    def __init__(self, questions: Sequence[Question]) -> None:
        texts = [(q, (words_of(q.question), words_of(q.answer))) for q in questions]
        pictures: dict[str, set[Any]] = defaultdict(set)
        for question, parts in texts:
            for gram in {gram for part in parts for gram in _grams(part)}:
                pictures[gram].add(question.images or question.id)
        self._own = {gram for gram, holders in pictures.items() if len(holders) < TEMPLATE}
        self._texts = [(q, parts) for q, parts in texts if sum(map(len, parts)) >= LONG
                       and sum(_covered(part, self._own).sum() for part in parts) >= LONG]  # fmt: skip
        self._holders: dict[str, list[int]] = defaultdict(list)
        for number, (_, parts) in enumerate(self._texts):
            for gram in {gram for part in parts for gram in _grams(part)} & self._own:
                self._holders[gram].append(number)

    def __len__(self) -> int:
        return len(self._texts)

    def overlaps(self, row: Row) -> Iterator[Overlap]:
        """The benchmark texts that a row repeats; one for all questions of the same words."""
        if not self._holders:
            return
        asked, response = words_of(row.question), words_of(row.response)
        grams = {gram for part in (asked, response) for gram in _grams(part)} & self._holders.keys()
        said = f" {' '.join(asked)} {' '.join(response)} "
        seen: set[tuple[str, str]] = set()
        for number in sorted({number for gram in grams for number in self._holders[gram]}):
            question, parts = self._texts[number]
            share = self._share(parts, grams, said, bool(response))
            if share >= COVERED and (question.question, question.answer) not in seen:
                seen.add((question.question, question.answer))
                alike = lexical_similarity(row.question, question.question)
                yield Overlap(row.split, row.id, None, question.task, question.id, "text", round(1 - share, 4),
                              round(alike, 4))  # fmt: skip

    def _share(self, parts: Sequence[list[str]], grams: set[str], said: str, answered: bool) -> float:
        """The share of a benchmark text's own words that were found; 0 where the row gives another answer."""
        own = [int(_covered(part, self._own).sum()) for part in parts]
        asked, answer = (int(_covered(part, grams, said).sum()) for part in parts)
        if not answered:  # an unlabeled row gives no answer; its question is what the model would be asked
            return asked / own[0] if own[0] >= NGRAM else 0.0
        return (asked + answer) / sum(own) if answer >= COVERED * own[1] else 0.0


def _covered(words: Sequence[str], grams: set[str], said: str | None = None) -> npt.NDArray[np.bool_]:
    """Which words stand in one of the sequences; a text shorter than a sequence stands or falls (in `said`) whole."""
    if len(words) < NGRAM:
        return np.full(len(words), said is None or f" {' '.join(words)} " in said)
    covered = np.zeros(len(words), bool)
    for start, gram in enumerate(_grams(words)):
        if gram in grams:
            covered[start : start + NGRAM] = True
    return covered


def _grams(words: Sequence[str]) -> list[str]:
    return [" ".join(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)]


# Counting.


def counts(found: Iterable[Overlap]) -> dict[str, dict[str, int]]:
    """Split -> rows that overlap, by how; a row counts once, by its first overlap. Those of a row stand together."""
    by_split: dict[str, Counter[str]] = defaultdict(Counter)
    for (split, _), of_row in groupby(found, key=lambda overlap: (overlap.split, overlap.id)):
        by_split[split][next(of_row).how] += 1
    return {split: dict(sorted(by_how.items())) for split, by_how in sorted(by_split.items())}
