"""The decode loop of the transformers engine: many candidates continue shared prompts, token by token.

Shapes in comments: R rows still decoding, C all candidates of the batch, V vocabulary, T tokens in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from sicog_exp.generation.engine import Decoding

GROWTH = 64
"""Positions by which a full key/value buffer grows."""
LIKELY_TOKENS = 64
"""Nucleus sampling looks at so many tokens first, and sorts the whole vocabulary only where they are too few."""


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer in buffers with room ahead, so that a step writes one position and copies none."""

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor) -> None:
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self._length = keys.shape[2]
        self._buffers = [_with_room(keys, rows), _with_room(values, rows)]
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


def _with_room(states: Tensor, rows: Tensor) -> Tensor:
    _, heads, length, width = states.shape
    buffer = states.new_empty(len(rows), heads, length + GROWTH, width)
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


class Steps(Protocol):
    """One decoding step after another, over rows that each continue a prompt."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (R, V) behind these tokens (R,)."""
        ...


class GrowingSteps:
    """Steps over buffers that grow and shrink. The prompts' keys and values are copied to a row per candidate, not
    computed again."""

    def __init__(self, model: Callable[..., Any], prompts: Prompts, counts: Sequence[int], room: int) -> None:
        rows = prompts.rows(counts)
        layers: list[Any] = [GrowingLayer(layer.keys, layer.values, rows) for layer in prompts.cache.layers]  # type: ignore[union-attr, arg-type]
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


def joined(parts: Sequence[Drawn]) -> Drawn:
    """The candidates of several batches as one, in order."""
    return Drawn(*(torch.cat([getattr(part, name) for part in parts])
                   for name in ("tokens", "lengths", "logprobs", "stopped")))  # fmt: skip


def noise(seeds: Sequence[int], count: int) -> Tensor:
    """Uniform numbers (len(seeds), count) in [0, 1): a row depends on its seed alone, a longer row begins the same."""
    rows = [np.random.Generator(np.random.PCG64(seed)).random(count, dtype=np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(rows))


def draw(logits: Tensor, uniforms: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """One token a row and its log-probability under the untempered model; logits (R, V), uniforms (R)."""
    logits = logits.float()
    tokens = logits.argmax(-1) if decoding.temperature == 0 else _drawn(logits, uniforms, decoding)
    return tokens, logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def _drawn(logits: Tensor, uniforms: Tensor, decoding: Decoding) -> Tensor:
    probabilities = torch.softmax(logits / decoding.temperature, dim=-1)
    return nucleus(probabilities, uniforms, decoding.top_p) if decoding.top_p < 1 else _inverse(probabilities, uniforms)


def _inverse(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The column at which the running sum passes `uniforms` times the row's sum; never one of probability 0."""
    sums = probabilities.cumsum(-1)
    total = sums[:, -1]
    # rounding may lift u * total to total itself, behind which no column lies
    target = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, target[:, None], right=True)[:, 0]


def nucleus(probabilities: Tensor, uniforms: Tensor, top_p: float) -> Tensor:
    """Draw from the smallest set of most likely tokens whose probability reaches `top_p`."""
    count = probabilities.shape[-1]
    values, order = probabilities.topk(min(LIKELY_TOKENS, count), dim=-1)
    if values.shape[-1] < count and bool((values.sum(-1) < top_p).any()):
        values, order = probabilities.sort(dim=-1, descending=True)
    kept = torch.where(values.cumsum(-1) - values < top_p, values, 0.0)
    return order.gather(1, _inverse(kept, uniforms)[:, None])[:, 0]


class Decoder:
    """Decodes all candidates of one batch, leaving out rows as they finish."""

    def __init__(self, stops: Tensor, decoding: Decoding) -> None:
        self.stops, self.decoding = stops, decoding
        on_cpu = stops.device.type == "cpu"
        # each look at finished rows stalls a GPU, where a few idle rows cost little; on a CPU every row costs
        self.look_every, self.worth = (1, 1 / 8) if on_cpu else (8, 1 / 2)

    def run(self, steps: Steps, logits: Tensor, uniforms: Tensor) -> Drawn:
        """`logits` (C, V) stand behind the prompts, one row per candidate; `uniforms` (C, max_new_tokens) its noise."""
        drawn = self._empty(len(uniforms), uniforms.device)
        rows = torch.arange(len(uniforms), device=uniforms.device)
        for step in range(self.decoding.max_new_tokens):
            tokens = self._record(drawn, rows, step, *draw(logits, uniforms[rows, step], self.decoding))
            if step + 1 == self.decoding.max_new_tokens:
                break
            keep = self._survivors(drawn.stopped[rows], step)
            if keep is not None:
                if not len(keep):
                    break
                if isinstance(steps, GrowingSteps):
                    rows, tokens = rows[keep], tokens[keep]
                    steps.keep(keep)
            logits = steps(tokens)
        return drawn

    def _empty(self, count: int, device: torch.device) -> Drawn:
        tokens = torch.zeros(count, self.decoding.max_new_tokens, dtype=torch.long, device=device)
        lengths = torch.zeros(count, dtype=torch.long, device=device)
        logprobs = torch.zeros(count, dtype=torch.float64, device=device)
        return Drawn(tokens, lengths, logprobs, torch.zeros(count, dtype=torch.bool, device=device))

    def _record(self, drawn: Drawn, rows: Tensor, step: int, tokens: Tensor, logprobs: Tensor) -> Tensor:
        """Rows that stopped before keep what they have; what they draw until they are left out is not counted."""
        running = ~drawn.stopped[rows]
        drawn.tokens[rows, step] = tokens
        drawn.lengths[rows] += running
        drawn.logprobs[rows] += torch.where(running, logprobs, 0.0)
        drawn.stopped[rows] |= torch.isin(tokens, self.stops)
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
