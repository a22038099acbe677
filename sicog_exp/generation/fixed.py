"""Decoding in buffers of fixed size: each step runs the same kernels on the same memory, so that a GPU captures one
step, its draw included, and replays it, where launching its kernels one by one takes longer than they do.

Shapes in comments: R rows (candidates), S positions of the buffers, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from sicog_exp.generation.decoder import Decoder, Drawn, Prompts
from sicog_exp.generation.drawing import on_gpu
from sicog_exp.generation.memory import out_of_memory

ROUND = 64
"""Buffers have a multiple of so many positions, so that prompts of like length use one captured step."""
WARM_UP = 2
"""Steps computed as usual before one is captured: libraries make their workspaces in them."""


def fixed_problem(model: PreTrainedModel) -> str | None:
    """Why a model cannot decode in buffers of fixed size; None where it can."""
    config: Any = model.config.get_text_config()
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        return "has layers that do not attend to all that came before, whose masks are others"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"computes attention by {config._attn_implementation}, which takes no mask of positions"
    return None


class FixedLayer(DynamicLayer):
    """Keys and values of one layer, (R, heads, S, width); a step writes at `place`, a tensor (1,) that it shares."""

    keys: Tensor
    values: Tensor

    def __init__(self, like: Tensor, rows: int, length: int, place: Tensor) -> None:
        super().__init__()
        self.dtype, self.device = like.dtype, like.device
        self.is_initialized = True
        # Zeros, since what is masked must be a number all the same.
        self.keys, self.values = (like.new_zeros(rows, like.shape[1], length, like.shape[3]) for _ in range(2))
        self._place = place

    def load(self, keys: Tensor, values: Tensor, rows: Tensor) -> None:
        """Begin anew behind these states of the prompts, (prompts, heads, positions, width)."""
        for buffer, states in ((self.keys, keys), (self.values, values)):
            buffer[:, :, : states.shape[2]] = states.index_select(0, rows)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one position."""
        self.keys.index_copy_(2, self._place, key_states)
        self.values.index_copy_(2, self._place, value_states)
        return self.keys, self.values


class FixedSteps:
    """The steps of one batch after another of the same number of rows. Finished rows stay and idle."""

    def __init__(self, model: Callable[..., Any], prompts: Prompts, counts: Sequence[int], room: int) -> None:
        self._model = model
        layers: Any = prompts.cache.layers
        keys, rows = layers[0].keys, sum(counts)
        self.shape = shape_of(prompts, counts, room)
        self._place = torch.zeros(1, dtype=torch.long, device=keys.device)
        self._layers = [FixedLayer(layer.keys, *self.shape, self._place) for layer in layers]
        self._cache = Cache(layers=list(self._layers))
        self._hidden = torch.finfo(keys.dtype).min
        self._mask = keys.new_full((rows, 1, 1, self.shape[1]), self._hidden)
        self._positions = torch.zeros(rows, 1, dtype=torch.long, device=keys.device)

    def load(self, prompts: Prompts, counts: Sequence[int]) -> Tensor:
        """Begin anew behind these prompts; returns the logits behind each row's, (R, V)."""
        rows = prompts.rows(counts)
        layers: Any = prompts.cache.layers
        for own, layer in zip(self._layers, layers, strict=True):
            own.load(layer.keys, layer.values, rows)
        width = prompts.mask.shape[1]
        self._mask.fill_(self._hidden)
        self._mask[:, 0, 0, :width].masked_fill_(prompts.mask[rows] != 0, 0.0)
        self._positions.copy_(prompts.positions[rows, None])
        self._place.fill_(width)
        return prompts.logits[rows]

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (R, V) behind these tokens (R,)."""
        self._mask.index_fill_(3, self._place, 0.0)
        logits = self._model(input_ids=tokens[:, None], attention_mask=self._mask, position_ids=self._positions,
                             past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits[:, -1]  # fmt: skip
        self._place += 1
        self._positions += 1
        return logits


class FixedDecoder:
    """Decodes one batch after another of the same shape, as `Decoder.run` does, with the same candidates.

    A step reads and writes tensors that stay where they are: its number, the tokens of the step before, the noise, what
    is drawn. So all of it is captured.
    """

    def __init__(self, model: Callable[..., Any], decoder: Decoder, prompts: Prompts, counts: Sequence[int]) -> None:
        self._decoder, room, device = decoder, decoder.decoding.max_new_tokens, prompts.mask.device
        self._steps = FixedSteps(model, prompts, counts, room)
        self._rows = torch.arange(sum(counts), device=device)
        self._step, self._tokens = (torch.zeros(n, dtype=torch.long, device=device) for n in (1, len(self._rows)))
        self._uniforms = torch.zeros(len(self._rows), room, device=device)
        self._drawn = Drawn.nothing(len(self._rows), room, device)
        self._captures, self._computed = on_gpu(prompts.logits), 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def fits(self, decoder: Decoder, prompts: Prompts, counts: Sequence[int]) -> bool:
        """Whether a batch has the shape of these buffers and is drawn in the same way."""
        room = decoder.decoding.max_new_tokens
        return self._decoder.draws_like(decoder) and self._steps.shape == shape_of(prompts, counts, room)

    def run(self, prompts: Prompts, counts: Sequence[int], uniforms: Tensor) -> Drawn:
        """`uniforms` (R, max_new_tokens) is the candidates' noise. The next batch overwrites what this one drew."""
        self._uniforms.copy_(uniforms)
        for tensor in (self._step, *self._drawn.each()):
            tensor.zero_()
        self._take(self._steps.load(prompts, counts))
        for step in range(1, uniforms.shape[1]):
            if step % self._decoder.look_every == 0 and bool(self._drawn.stopped.all()):
                break
            self._advance()
        return self._drawn

    def _advance(self) -> None:
        if self._captures and not self._graph and self._computed >= WARM_UP:
            self._capture()
        if self._graph:
            self._graph.replay()
        else:
            self._compute()
            self._computed += 1

    def _compute(self) -> None:
        self._take(self._steps(self._tokens))

    def _take(self, logits: Tensor) -> None:
        self._tokens.copy_(self._decoder.take(self._drawn, self._rows, self._step, logits, self._uniforms))
        self._step += 1

    def _capture(self) -> None:
        """Nothing is computed while a step is captured, so a model that cannot be goes on as if nobody had tried."""
        try:
            graph = torch.cuda.CUDAGraph()
            # The outer context, since a failed capture leaves its own stream the current one. The thread that makes
            # candidates of the batch before waits for the GPU in the meantime, as it may.
            with torch.cuda.stream(torch.cuda.current_stream()), \
                 torch.cuda.graph(graph, capture_error_mode="thread_local"):  # fmt: skip
                self._compute()
            self._graph = graph
        except RuntimeError as error:
            if out_of_memory(error) or (error.__context__ and out_of_memory(error.__context__)):
                raise
            self._captures = False
            warnings.warn(f"model.static_cache: a decoding step cannot be captured ({error}); decoding goes on without "
                          "captured steps, slower, with the same tokens", stacklevel=2)  # fmt: skip


def shape_of(prompts: Prompts, counts: Sequence[int], room: int) -> tuple[int, int]:
    """Rows and positions of the buffers for a batch."""
    return sum(counts), -(-(prompts.mask.shape[1] + room) // ROUND) * ROUND
