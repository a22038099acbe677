"""Preference pairs as training rows: two responses to one prompt, side by side in a micro-batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sicog_exp.data.chat import ChatEncoder, ChatError, Example
from sicog_exp.data.mixture import ImageTensors, Row, collate, fill_bins, pack
from sicog_exp.records import Record

SOURCE = "preference"


@dataclass(frozen=True)
class Pair:
    """A chosen and a rejected response to the same prompt, tokenized."""

    chosen: Row
    rejected: Row


class PairSource:
    """Pairs by index; one whose prompt is too long for the model, or that is alike after the cut to `max_length`, is
    set aside and counted in `too_long`. To a mixture it is the source of the chosen rows."""

    name = SOURCE

    def __init__(self, records: Iterable[tuple[Record, Record]], images: ImageTensors, encoder: ChatEncoder,
                 max_length: int) -> None:  # fmt: skip
        self._images, self._encoder, self._max_length = images, encoder, max_length
        self.too_long: list[str] = []
        self._pairs = [pair for both in records if (pair := self._encode(*both))]
        self.rows: int | None = len(self._pairs)

    def _encode(self, chosen: Record, rejected: Record) -> tuple[tuple[str, ...], Example, Example, str] | None:
        inputs, length = self._images.of(chosen.images), self._max_length
        try:
            one, other = (self._encoder.example(r.messages, inputs, length) for r in (chosen, rejected))
        except ChatError:
            one = other = Example([], [])
        if one.input_ids == other.input_ids:
            self.too_long.append(chosen.id)
            return None
        return chosen.images, one, other, chosen.id

    def pair(self, index: int) -> Pair:
        images, chosen, rejected, id = self._pairs[index]
        inputs = self._images.of(images)
        return Pair(Row(chosen, inputs, SOURCE, id), Row(rejected, inputs, SOURCE, id))

    def examples(self, index: int) -> tuple[Example, Example]:
        """The tokens alone, chosen first."""
        return self._pairs[index][1:3]

    def row(self, index: int) -> Row:
        return self.pair(index).chosen


def collate_pairs(pairs: Sequence[Pair], pad_id: int, packed_length: int | None = None) -> dict[str, Any]:
    """A batch of `collate`, or of `pack` in bins of `packed_length` tokens, with `chosen` and `rejected` (pairs,): the
    sample numbers of each pair's two responses."""
    rows = [row for pair in pairs for row in (pair.chosen, pair.rejected)]
    bins = fill_bins(rows, packed_length) if packed_length else [[row] for row in rows]
    batch = pack(bins, pad_id) if packed_length else collate(rows, pad_id)
    number = {id(row): i for i, row in enumerate(row for rows in bins for row in rows)}
    return batch | {"chosen": _numbers(number, [pair.chosen for pair in pairs]),
                    "rejected": _numbers(number, [pair.rejected for pair in pairs])}  # fmt: skip


def _numbers(number: dict[int, int], rows: Sequence[Row]) -> Any:
    import torch

    return torch.tensor([number[id(row)] for row in rows])
