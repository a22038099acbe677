"""Training rows: sources mixed by share, in an order that is a pure function of (seed, position)."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

import numpy as np

from sicog_exp.data.chat import ChatEncoder, ChatError, Example, ImageInputs, join_images
from sicog_exp.prompts import Kind
from sicog_exp.recipe import CapsConfig
from sicog_exp.records import Record

if TYPE_CHECKING:
    import torch

PATTERN = 1000
"""Slots after which the shares of a mixture are exact."""
CACHE_BYTES = 1_000_000_000
"""Image tensors kept for one device's training."""
ROWS_KEPT = 4096
"""Tokenized rows of a source that such a process keeps."""
REJECTED_IN_A_ROW = 1000
"""After so many rows of a source that cannot train, one after the other, the stage stops."""


class MixtureError(ValueError):
    """A mixture without usable rows."""


@dataclass(frozen=True)
class Row:
    """One tokenized example with its image tensors; `source` names where it came from, `id` the record."""

    example: Example
    image_inputs: Mapping[str, torch.Tensor] | None
    source: str
    id: str = ""


class Source(Protocol):
    """Rows of one origin. `rows` is their number, None for an endless stream; one that cannot train is a ChatError."""

    @property
    def name(self) -> str: ...

    @property
    def rows(self) -> int | None: ...

    def row(self, index: int) -> Row: ...


Reject = Callable[[str, str, str], None]
"""Takes (source, id, reason) of a row that cannot train."""


class Rejected:
    """Rows that cannot train, in files of `folder`, one a process: several make rows, and any may be killed."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, Path()
        self._seen: set[tuple[str, str]] = set()

    def add(self, source: str, id: str, reason: str) -> None:
        """Note a row, unless this process has."""
        if (source, id) in self._seen:
            return
        if not self._seen:  # now, and not where this object was made: the process may have been forked since
            self._folder.mkdir(exist_ok=True)
            self._file = self._folder / f"{uuid4().hex}.jsonl"
        self._seen.add((source, id))
        with self._file.open("a") as file:
            file.write(json.dumps({"source": source, "id": id, "reason": reason}) + "\n")


def read_rejected(folder: Path) -> list[dict[str, str]]:
    """What all processes rejected, each row once, by source and id; a line that a kill tore is none, its row is drawn
    again."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for file in folder.glob("*.jsonl"):
        whole, _, _torn = file.read_text().rpartition("\n")
        rows |= {(row["source"], row["id"]): row for row in map(json.loads, whole.splitlines())}
    return [rows[key] for key in sorted(rows)]


class ImageTensors:
    """The processor's tensors of images under `root`, the most recently used ones kept up to `most_bytes`."""

    def __init__(self, root: Path, encoder: ChatEncoder, max_pixels: int, most_bytes: int = CACHE_BYTES) -> None:
        self._root, self._encoder, self._max_pixels, self._most_bytes = root, encoder, max_pixels, most_bytes
        self._kept: OrderedDict[tuple[str, ...], ImageInputs] = OrderedDict()
        self._bytes = 0

    def of(self, images: tuple[str, ...]) -> ImageInputs | None:
        """Tensors of one example's images; None for an example without."""
        if not images:
            return None
        if images not in self._kept:
            self._keep(images, self._open(images))
        self._kept.move_to_end(images)
        return self._kept[images]

    def _open(self, images: tuple[str, ...]) -> ImageInputs:
        from sicog_exp.data.images import open_image

        return self._encoder.pixels([open_image(self._root, name, self._max_pixels) for name in images])

    def _keep(self, images: tuple[str, ...], tensors: ImageInputs) -> None:
        self._kept[images] = tensors
        self._bytes += _size(tensors)
        while self._bytes > self._most_bytes and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= _size(oldest)


def _size(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


class RecordSource:
    """Records as rows, tokenized where they are asked for. One too long for the model, or refused by its template, is
    no row: its id and the reason go to `reject`."""

    def __init__(self, name: str, records: Sequence[Record], images: ImageTensors, encoder: ChatEncoder,
                 max_length: int, reject: Reject) -> None:  # fmt: skip
        self.name = name
        self.rows: int | None = len(records)
        self._records, self._images, self._encoder, self._max_length = records, images, encoder, max_length
        self._reject = reject
        self._encoded = lru_cache(ROWS_KEPT)(self._encode)

    def _encode(self, index: int) -> tuple[Example, tuple[str, ...], str] | ChatError:
        record = self._records[index]
        try:
            inputs = self._images.of(record.images)
            return self._encoder.example(record.messages, inputs, self._max_length), record.images, record.id
        except ChatError as error:
            self._reject(self.name, record.id, str(error))
            return error

    def row(self, index: int) -> Row:
        encoded = self._encoded(index)
        if isinstance(encoded, ChatError):
            raise encoded.with_traceback(None)  # which would grow with every draw
        example, images, id = encoded
        return Row(example, self._images.of(images), self.name, id)


def capped(ids: Sequence[str], kinds: Sequence[Kind], source: str, caps: CapsConfig, seed: int) -> list[int]:
    """Which rows of a source its caps leave, by number: of each kind, then of the whole, in the rows' own order.

    Which ones is a function of the seed and of their ids, so that a smaller cap keeps some of a larger one's.
    """
    kept = list(range(len(ids)))
    for kind in ("cod", "dd", "cot", "direct"):
        own = _drawn([ids[i] for i in kept if kinds[i] == kind], getattr(caps, kind), seed)
        kept = [i for i in kept if kinds[i] != kind or ids[i] in own]
    own = _drawn([ids[i] for i in kept], getattr(caps, source, None), seed)
    return [i for i in kept if ids[i] in own]


def _drawn(ids: Sequence[str], count: int | None, seed: int) -> set[str]:
    if count is None:
        return set(ids)
    return set(sorted(ids, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())[:count])


class Mixture:
    """Slot k of the training stream comes from a source by its share, and walks that source's rows in an order
    reshuffled each epoch. Any slot is found without replaying those before it, so a resumed stage just goes on.

    `weights`: source -> its rows' weights, where some are drawn more often than others.
    """

    def __init__(self, sources: Sequence[tuple[Source, float]], seed: int,
                 weights: Mapping[str, Sequence[float]] | None = None) -> None:  # fmt: skip
        usable = [(source, share) for source, share in sources if share > 0 and source.rows != 0]
        if not usable:
            names = ", ".join(source.name for source, _ in sources) or "none"
            raise MixtureError(f"no training rows: every source with a share above 0 is empty (sources: {names})")
        self.sources = [source for source, _ in usable]
        self._seed, self._weights = seed, weights or {}
        self._pattern = self._make_pattern(np.array([share for _, share in usable]))
        one_hot = self._pattern[:, None] == np.arange(len(usable))[None, :]
        self._ranks = np.cumsum(one_hot, axis=0)[np.arange(PATTERN), self._pattern] - 1
        self._per_pattern = one_hot.sum(0)

    def _make_pattern(self, shares: np.ndarray) -> np.ndarray:
        """Source of each of PATTERN slots: largest-remainder counts, shuffled."""
        quotas = shares / shares.sum() * PATTERN
        if quotas.min() < 0.5:
            name = self.sources[int(quotas.argmin())].name
            raise MixtureError(f"the share of {name} is below 1/{2 * PATTERN} of the mixture: raise it, or set it to 0")
        counts = np.floor(quotas).astype(int)
        short = PATTERN - counts.sum()
        counts[np.argsort(counts - quotas, kind="stable")[:short]] += 1
        return np.random.default_rng([self._seed, 0]).permutation(np.repeat(np.arange(len(shares)), counts))

    def locate(self, slot: int) -> tuple[int, int]:
        """(source number, row index) of a slot."""
        number, position = self._position(slot)
        return number, self._index(number, position)

    def _position(self, slot: int) -> tuple[int, int]:
        """(source number, position in the walk through it) of a slot."""
        turn, place = divmod(slot, PATTERN)
        number = int(self._pattern[place])
        return number, turn * int(self._per_pattern[number]) + int(self._ranks[place])

    def _index(self, number: int, position: int) -> int:
        rows = self.sources[number].rows
        if rows is None:
            return position
        epoch, offset = divmod(position, rows)
        return int(self._order(number, epoch)[offset])

    @lru_cache(maxsize=64)  # noqa: B019 - a mixture lives as long as its training stage
    def _order(self, number: int, epoch: int) -> np.ndarray:
        rng, source = np.random.default_rng([self._seed, 1, number, epoch]), self.sources[number]
        weights = self._weights.get(source.name)
        return rng.permutation(source.rows or 0) if weights is None else weighted_order(weights, rng)

    def row(self, slot: int) -> Row:
        """A slot's row; where that cannot train, the next one of its source that can.

        Raises MixtureError where none of the source can, or none of very many.
        """
        number, position = self._position(slot)
        source = self.sources[number]
        # Twice its number of rows holds each of them at least once.
        tries = REJECTED_IN_A_ROW if source.rows is None else min(REJECTED_IN_A_ROW, 2 * source.rows)
        for further in range(tries):
            try:
                return source.row(self._index(number, position + further))
            except ChatError as error:
                last = error
        looked_at = min(tries, source.rows or tries)
        raise MixtureError(f"none of {looked_at:,} rows of {source.name}, one after the other, can train; the last "
                           f"one: {last}. Raise max_length, or use rows that the chat template takes") from last

    def rows(self, first: int, count: int, rank: int = 0, ranks: int = 1) -> list[Row]:
        """The rows of `count` slots, or one rank's share of them."""
        return [self.row(slot) for slot in range(first + rank, first + count, ranks)]


def weighted_order(weights: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """As many indices as there are rows, shuffled, each as often as its share of the weights says, rounded up or down
    (systematic resampling)."""
    reached = np.cumsum(weights) / np.sum(weights)
    drawn = np.searchsorted(reached, (np.arange(len(reached)) + rng.random()) / len(reached), side="right")
    return rng.permutation(np.minimum(drawn, len(reached) - 1))


def collate(rows: Sequence[Row], pad_id: int) -> dict[str, Any]:
    """A right-padded batch of one row a sample; see `pack` for its tensors, with an attention_mask (rows, longest)."""
    batch = pack([[row] for row in rows], pad_id)
    batch["attention_mask"] = (batch["segments"] >= 0).long()
    del batch["position_ids"]
    return batch


def pack(bins: Sequence[Sequence[Row]], pad_id: int) -> dict[str, Any]:
    """A batch with one bin of samples a row, right-padded.

    input_ids, labels, position_ids and segments (bins, longest) and the samples' image tensors in reading order.
    `segments` numbers the samples over the whole batch, -1 is padding. Positions start at 0 with every sample, which is
    how transformers' attention masks keep packed samples apart.
    """
    import torch

    from sicog_exp.data.chat import IGNORED

    shape = len(bins), max(sum(len(row.example) for row in rows) for rows in bins)
    batch: dict[str, Any] = {
        "input_ids": torch.full(shape, pad_id), "labels": torch.full(shape, IGNORED),
        "position_ids": torch.zeros(shape, dtype=torch.long), "segments": torch.full(shape, -1),
    }  # fmt: skip
    samples = [(i, row) for i, rows in enumerate(bins) for row in rows]
    filled = [0] * len(bins)
    for segment, (i, row) in enumerate(samples):
        n = len(row.example)
        place = slice(filled[i], filled[i] + n)
        batch["input_ids"][i, place] = torch.tensor(row.example.input_ids)
        batch["labels"][i, place] = torch.tensor(row.example.labels)
        # A sample's first token follows nothing of its own.
        batch["labels"][i, filled[i]] = IGNORED
        batch["position_ids"][i, place] = torch.arange(n)
        batch["segments"][i, place] = segment
        filled[i] += n
    batch["sources"] = [row.source for _, row in samples]
    batch["ids"] = [row.id for _, row in samples]
    return batch | join_images([row.image_inputs for _, row in samples if row.image_inputs is not None])


def fill_bins(rows: Sequence[Row], length: int) -> list[list[Row]]:
    """Rows in bins of at most `length` tokens each, by first-fit decreasing."""
    bins: list[list[Row]] = []
    left: list[int] = []
    for row in sorted(rows, key=lambda row: -len(row.example)):
        n = len(row.example)
        place = next((i for i, free in enumerate(left) if free >= n), len(bins))
        if place == len(bins):
            bins.append([])
            left.append(length)
        bins[place].append(row)
        left[place] -= n
    return bins


def groups_of_bins(bins: Sequence[Sequence[Row]], samples: int) -> list[list[Sequence[Row]]]:
    """Neighbouring bins of at most `samples` rows together; a bin that holds more stands alone."""
    groups: list[list[Sequence[Row]]] = []
    held = 0
    for rows in bins:
        if not groups or held + len(rows) > samples:
            groups.append([])
            held = 0
        groups[-1].append(rows)
        held += len(rows)
    return groups
