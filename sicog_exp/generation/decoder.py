"""The decode loop of the transformers engine: many candidates continue shared prompts, token by token.

Shapes in comments: R rows still decoding, C all candidates of the batch, V vocabulary, T tokens in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from sicog_exp.generation.drawing import draw, on_gpu
from sicog_exp.generation.engine import Decoding

GROWTH = 64
"""Positions by which a full key/value buffer grows on a CPU. On a GPU it has room for all that may come from the start:
buffers of ever other sizes would leave gaps in its memory."""


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer in buffers with room ahead, so that a step writes one position and copies none."""

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor, ahead: int) -> None:
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self._length = keys.shape[2]
        self._buffers = [_with_room(keys, rows, ahead), _with_room(values, rows, ahead)]
        self._show()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the step's keys and values."""
        end = self._length + key_states.shape[2]
        if end > self._buffers[0].shape[2]:
            self._buffers = [_grown(buffer) for buffer in self._buffers]
        self._buffers[0][:, :, self._length : end] = key_states
        self._buffers[1][:, :, self._length : end] = value_states
        self._length = end
        return self._show()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        self._buffers = [buffer.index_select(0, indices) for buffer in self._buffers]
        self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        keys, values = (buffer[:, :, : self._length] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values


def _with_room(states: Tensor, rows: Tensor, ahead: int) -> Tensor:
    _, heads, length, width = states.shape
    buffer = states.new_empty(len(rows), heads, length + ahead, width)
    buffer[:, :, :length] = states.index_select(0, rows)
    return buffer


def _grown(buffer: Tensor) -> Tensor:
    rows, heads, length, width = buffer.shape
    wider = buffer.new_empty(rows, heads, length + GROWTH, width)
    wider[:, :, :length] = buffer
    return wider


@dataclass
class Prompts:
    """A prefilled batch: its cache, the logits behind each prompt, the (left padded) mask and the next positions."""

    cache: Cache
    logits: Tensor
    mask: Tensor
    positions: Tensor

    def rows(self, counts: Sequence[int]) -> Tensor:
        """The prompt of each candidate."""
        repeats = torch.tensor(counts, device=self.logits.device)
        return torch.repeat_interleave(torch.arange(len(counts), device=self.logits.device), repeats)


class GrowingSteps:
    """Steps over buffers that grow and shrink. The prompts' keys and values are copied to a row per candidate, not
    computed again."""

    def __init__(self, model: Callable[..., Any], prompts: Prompts, counts: Sequence[int], room: int) -> None:
        rows, ahead = prompts.rows(counts), room if on_gpu(prompts.logits) else GROWTH
        layers: list[Any] = [GrowingLayer(layer.keys, layer.values, rows, ahead) for layer in prompts.cache.layers]  # type: ignore[union-attr, arg-type]
        self._model, self._cache = model, Cache(layers=layers)
        self._mask, self._positions = _mask_with_room(prompts.mask[rows], room), prompts.positions[rows]
        self._width, self._step = prompts.mask.shape[1], 0
        self.logits = prompts.logits[rows]
        """Behind each prompt."""

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self._positions, self._mask = self._positions[rows], self._mask[rows]
        self._cache.batch_select_indices(rows)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (R, V) behind these tokens (R,)."""
        step, self._step = self._step, self._step + 1
        return self._model(input_ids=tokens[:, None], attention_mask=self._mask[:, : self._width + step + 1],
                           position_ids=self._positions[:, None] + step, past_key_values=self._cache,
                           use_cache=True, logits_to_keep=1).logits[:, -1]  # fmt: skip


@dataclass
class Drawn:
    """All candidates of a batch: tokens (C, steps) of which the first `lengths` count, and their log-probability."""

    tokens: Tensor
    lengths: Tensor
    logprobs: Tensor
    stopped: Tensor

    @classmethod
    def nothing(cls, count: int, steps: int, device: torch.device) -> Drawn:
        """Of so many candidates, before their first step."""
        return cls(torch.zeros(count, steps, dtype=torch.long, device=device),
                   torch.zeros(count, dtype=torch.long, device=device),
                   torch.zeros(count, dtype=torch.float64, device=device),
                   torch.zeros(count, dtype=torch.bool, device=device))  # fmt: skip

    def each(self) -> list[Tensor]:
        """Its tensors."""
        return [self.tokens, self.lengths, self.logprobs, self.stopped]

    def cpu(self) -> Drawn:
        """The same on the CPU."""
        return Drawn(*(tensor.cpu() for tensor in self.each()))


def joined(parts: Sequence[Drawn]) -> Drawn:
    """The candidates of several batches as one, in order."""
    return Drawn(*map(torch.cat, zip(*(part.each() for part in parts), strict=True)))


class Decoder:
    """Decodes all candidates of one batch, leaving out rows as they finish."""

    def __init__(self, stops: Tensor, decoding: Decoding) -> None:
        self.stops, self.decoding = stops, decoding
        on_cpu = stops.device.type == "cpu"
        # each look at finished rows stalls a GPU, where a few idle rows cost little; on a CPU every row costs
        self.look_every, self.worth = (1, 1 / 8) if on_cpu else (8, 1 / 2)

    def run(self, steps: GrowingSteps, logits: Tensor, uniforms: Tensor) -> Drawn:
        """`logits` (C, V) stand behind the prompts, one row per candidate; `uniforms` (C, max_new_tokens) its noise."""
        last = self.decoding.max_new_tokens - 1
        drawn = Drawn.nothing(len(uniforms), last + 1, uniforms.device)
        rows = torch.arange(len(uniforms), device=uniforms.device)
        for step in range(last + 1):
            tokens = self.take(drawn, rows, step, logits, uniforms)
            keep = self._survivors(drawn.stopped[rows], step) if step < last else rows[:0]
            if keep is not None:
                if not len(keep):
                    break
                rows, tokens = rows[keep], tokens[keep]
                steps.keep(keep)
            logits = steps(tokens)
        return drawn

    def draws_like(self, other: Decoder) -> bool:
        """Whether the other one draws in the same way, whatever its seed and batches."""
        ways = [(d.temperature, d.top_p, d.max_new_tokens) for d in (self.decoding, other.decoding)]
        return ways[0] == ways[1] and self.stops is other.stops

    def take(self, drawn: Drawn, rows: Tensor, step: int | Tensor, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Draw and record one token (R,) for each of `rows`, whose logits (R, V) these are. Rows that stopped before
        keep what they have; what they draw until they are left out is not counted."""
        tokens, logprobs = draw(logits, uniforms[rows, step], self.decoding)
        running = ~drawn.stopped[rows]
        drawn.tokens[rows, step] = tokens
        drawn.lengths[rows] += running
        drawn.logprobs[rows] += logprobs.masked_fill(~running, 0.0)
        drawn.stopped[rows] |= (tokens[:, None] == self.stops).any(-1)
        return tokens

    def _survivors(self, stopped: Tensor, step: int) -> Tensor | None:
        """Indices of unfinished rows where it pays to drop the others, else None."""
        if step % self.look_every:
            return None
        keep = (~stopped).nonzero()[:, 0]
        worth = len(keep) <= (1 - self.worth) * len(stopped)
        return keep if worth else None


def _mask_with_room(mask: Tensor, room: int) -> Tensor:
    return torch.cat([mask, mask.new_ones(len(mask), room)], dim=1)
