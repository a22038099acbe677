"""Preference pairs as training rows: two responses to one prompt, side by side in a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sicog_exp.data.chat import ChatEncoder, ChatError, Example
from sicog_exp.data.mixture import ROWS_KEPT, ImageTensors, Row, collate, fill_bins, pack
from sicog_exp.records import Record

SOURCE = "preference"


@dataclass(frozen=True)
class Pair:
    """A chosen and a rejected response to the same prompt, tokenized."""

    chosen: Row
    rejected: Row


class PairSource:
    """Pairs by index, tokenized where they are asked for; one whose prompt is too long for the model, or that is alike
    after the cut to `max_length`, is set aside and counted in `too_long`. To a mixture it is the source of the chosen
    rows."""

    name = SOURCE

    def __init__(self, records: Sequence[tuple[Record, Record]], images: ImageTensors, encoder: ChatEncoder,
                 max_length: int) -> None:  # fmt: skip
        self._records, self._images, self._encoder, self._max_length = records, images, encoder, max_length
        self.too_long: list[str] = []
        self._usable: list[int] = []
        self.lengths: list[int] = []
        """Of each pair, the tokens of its longer conversation."""
        self._encoded = lru_cache(ROWS_KEPT)(self._encode)
        for number in range(len(records)):
            self._look_at(number)
        self.rows: int | None = len(self._usable)

    def _look_at(self, number: int) -> None:
        try:
            one, other = self._encoded(number)[1:3]
        except ChatError:
            one = other = Example([], [])
        if one.input_ids == other.input_ids:
            self.too_long.append(self._records[number][0].id)
        else:
            self._usable.append(number)
            self.lengths.append(max(len(one), len(other)))

    def _encode(self, number: int) -> tuple[tuple[str, ...], Example, Example, str]:
        chosen, rejected = self._records[number]
        inputs = self._images.of(chosen.images)
        one, other = (self._encoder.example(r.messages, inputs, self._max_length) for r in (chosen, rejected))
        return chosen.images, one, other, chosen.id

    def pair(self, index: int) -> Pair:
        images, chosen, rejected, id = self._encoded(self._usable[index])
        inputs = self._images.of(images)
        return Pair(Row(chosen, inputs, SOURCE, id), Row(rejected, inputs, SOURCE, id))

    def examples(self, index: int) -> tuple[Example, Example]:
        """The tokens alone, chosen first."""
        return self._encoded(self._usable[index])[1:3]

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
