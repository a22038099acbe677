"""One token a row: from a model's logits and uniform numbers, by temperature and nucleus.

On a GPU nothing here waits for it, so that a captured step holds the draw too.

Shapes in comments: R rows, V vocabulary, N numbers of 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sicog_exp.generation.engine import Decoding

LIKELY_TOKENS = 64
"""Nucleus sampling looks at so many tokens first, and sorts the whole vocabulary only where they are too few."""
NUMBERS = 1 << 16
"""Of 16 bits."""


def noise(seeds: Sequence[int], count: int) -> Tensor:
    """Uniform numbers (len(seeds), count) in [0, 1): a row depends on its seed alone, a longer row begins the same."""
    rows = [np.random.Generator(np.random.PCG64(seed)).random(count, dtype=np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(rows))


def draw(logits: Tensor, uniforms: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """One token a row and its log-probability under the untempered model; logits (R, V), uniforms (R)."""
    if on_gpu(logits) and logits.element_size() == 2 and decoding.temperature > 0 and decoding.top_p < 1:
        counted = Counted(logits)
        tokens = counted.nucleus(uniforms, decoding.temperature, decoding.top_p)
        return tokens, logits.gather(1, tokens[:, None])[:, 0].float() - counted.logsumexp()
    logits = logits.float()
    tokens = logits.argmax(-1) if decoding.temperature == 0 else _drawn(logits, uniforms, decoding)
    return tokens, logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def on_gpu(tensor: Tensor) -> bool:
    """Whether a look at values makes the processor wait."""
    return tensor.is_cuda


def _drawn(logits: Tensor, uniforms: Tensor, decoding: Decoding) -> Tensor:
    probabilities = torch.softmax(logits / decoding.temperature, dim=-1)
    if decoding.top_p < 1:
        return nucleus(probabilities, uniforms, decoding.top_p)
    return _passed(probabilities.cumsum(-1), uniforms)[0]


def _passed(sums: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The column at which a row's running sum passes `uniforms` times its whole, never one of probability 0; and that
    product."""
    total = sums[:, -1]
    # rounding may lift u * total to total itself, behind which no column lies
    target = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, target[:, None], right=True)[:, 0], target


def nucleus(probabilities: Tensor, uniforms: Tensor, top_p: float) -> Tensor:
    """Draw from the smallest set of most likely tokens whose probability reaches `top_p`."""
    values, order = _most_likely(probabilities, top_p)
    kept = values.masked_fill(values.cumsum(-1) - values >= top_p, 0.0)
    return order.gather(1, _passed(kept.cumsum(-1), uniforms)[0][:, None])[:, 0]


def _most_likely(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Tokens in order, the most likely first, as many as `top_p` needs."""
    if not on_gpu(probabilities):
        values, order = probabilities.topk(min(LIKELY_TOKENS, probabilities.shape[-1]), dim=-1)
        if values.shape == probabilities.shape or not bool((values.sum(-1) < top_p).any()):
            return values, order
    return probabilities.sort(dim=-1, descending=True)


class Counted:
    """Logits of 16 bits, counted: equal ones are equally likely, and of different ones there are 65,536 at most, whose
    order is known. So no vocabulary of 150,000 need be sorted for each row and step.

    Draws what sorting would, up to rounding; among equally likely tokens the first ones come first, as there.
    """

    def __init__(self, logits: Tensor) -> None:
        logits = logits + 0.0  # for -0.0 has other bits
        self._logits = logits
        bits, self._values = _numbers(logits.dtype, logits.device)
        # One operation makes whole numbers of bits: a tensor of one dimension, unlike a number, widens the other.
        places = logits.view(torch.int16) + torch.full((1,), NUMBERS // 2, device=logits.device)
        one = torch.ones((1, 1), dtype=torch.int32, device=logits.device).expand_as(places)
        counts = torch.zeros(len(logits), NUMBERS, dtype=torch.int32, device=logits.device)
        self.counts = counts.scatter_add_(1, places, one).index_select(1, bits + NUMBERS // 2)
        """Tokens of each number, the largest number first, (R, N)."""
        self._best = logits.amax(-1).float()
        self._below = (self._values - self._best[:, None]).clamp(max=0.0)

    def logsumexp(self) -> Tensor:
        """Of the logits, (R,)."""
        return self._best + (self.counts * self._below.exp()).sum(-1).log()

    def kept(self, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
        """(how many tokens of each number the nucleus has, the probability of one of them), both (R, N)."""
        each = (self._below / temperature).exp()
        each = each / (self.counts * each).sum(-1, keepdim=True)
        mass = self.counts * each
        before = mass.cumsum(-1) - mass
        enough = torch.minimum(((top_p - before) / each).ceil(), self.counts.float())
        return enough.masked_fill(before >= top_p, 0.0), each

    def nucleus(self, uniforms: Tensor, temperature: float, top_p: float) -> Tensor:
        """Draw from the smallest set of most likely tokens whose probability reaches `top_p`."""
        kept, each = self.kept(temperature, top_p)
        mass = kept * each
        sums = mass.cumsum(-1)
        number, target = _passed(sums, uniforms)
        # Among the tokens of this number, which are equally likely, the place at which the sum passes.
        before, each, kept = ((of.gather(1, number[:, None])) for of in (sums - mass, each, kept))
        place = torch.minimum(((target[:, None] - before) / each).floor().clamp(min=0), kept - 1)
        same = self._logits == self._values[number, None].to(self._logits.dtype)
        return torch.searchsorted(same.cumsum(-1, dtype=torch.int32), place.int() + 1)[:, 0]


@lru_cache(maxsize=8)
def _numbers(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """All numbers of a type of 16 bits, the largest first: their bits as whole numbers, and their values (N,). What is
    no number stands last."""
    bits = torch.arange(-NUMBERS // 2, NUMBERS // 2, device=device)
    values = bits.to(torch.int16).view(dtype).float()
    values = values.masked_fill(values.isnan(), -torch.inf)
    values, order = values.sort(descending=True, stable=True)
    return bits[order], values
