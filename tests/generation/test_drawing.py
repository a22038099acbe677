"""Drawing without a sort, as a GPU does it, keeps and draws what sorting does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sicog_exp.generation import drawing
from sicog_exp.generation.drawing import NUMBERS, Counted, draw, nucleus
from sicog_exp.generation.engine import Decoding

CLOSE = 2e-6
"""What sums in float32 may be wrong by."""


@st.composite
def rows(draw_: st.DrawFn) -> tuple[Tensor, float, float]:
    """Logits with many ties, of a narrow or a wide spread, some of them impossible; a temperature and a top_p."""
    dtype = draw_(st.sampled_from([torch.bfloat16, torch.float16]))
    random = torch.Generator().manual_seed(draw_(st.integers(0, 2**31)))
    count, spread = draw_(st.integers(1, 700)), draw_(st.sampled_from([0.0, 0.01, 1.0, 4.0, 30.0]))
    logits = torch.randn(3, count, generator=random) * spread + draw_(st.sampled_from([-20.0, 0.0, 9.0]))
    logits = (logits * 4).round() / 4 if draw_(st.booleans()) else logits
    hidden = torch.rand(3, count, generator=random) < draw_(st.sampled_from([0.0, 0.3]))
    hidden[:, 0] = False
    return (logits.masked_fill(hidden, -torch.inf).to(dtype), draw_(st.sampled_from([0.3, 0.7, 1.0, 2.0])),
            draw_(st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999])))  # fmt: skip


def in_order(logits: Tensor, temperature: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of one row, the most likely and of these the first ones first; their probabilities, the sums before."""
    scores = logits.double().numpy() / temperature
    order = np.argsort(-scores, kind="stable")
    probabilities = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    return order, probabilities[order], probabilities[order].cumsum() - probabilities[order]


@settings(max_examples=150, deadline=None)
@given(case=rows())
def test_the_nucleus_is_the_sorted_one(case: tuple[Tensor, float, float]) -> None:
    logits, temperature, top_p = case
    kept, each = Counted(logits).kept(temperature, top_p)
    values = drawing._numbers(logits.dtype, logits.device)[1]
    for row, counts, one in zip(logits, kept, each, strict=True):
        order, probabilities, before = in_order(row, temperature)
        ours = [token for number in counts.nonzero()[:, 0].tolist() for token in
                (row == values[number].to(row.dtype)).nonzero()[: int(counts[number]), 0].tolist()]  # fmt: skip
        assert ours == order[: len(ours)].tolist(), "the most likely ones, ties in the order of the vocabulary"
        possible = probabilities > CLOSE
        wanted = (before < top_p) & possible
        doubtful = np.abs(before - top_p) < CLOSE
        found = (np.arange(len(order)) < len(ours)) & possible
        assert ((found == wanted) | doubtful).all()
        assert one[counts > 0].max().item() == pytest.approx(probabilities[0], rel=1e-4)


@settings(max_examples=150, deadline=None)
@given(case=rows(), noise=st.lists(st.floats(0, 1 - 2**-24, width=32), min_size=3, max_size=3))
def test_the_same_noise_draws_the_same_token(case: tuple[Tensor, float, float], noise: list[float]) -> None:
    """As by the path of the CPU, in float32; another one only where rounding decides, which float64 tells."""
    logits, temperature, top_p = case
    uniforms = torch.tensor(noise)
    ours = Counted(logits).nucleus(uniforms, temperature, top_p)
    sorted_ones = nucleus(torch.softmax(logits.float() / temperature, -1), uniforms, top_p)
    for row, u, token, other in zip(logits, noise, ours.tolist(), sorted_ones.tolist(), strict=True):
        order, probabilities, before = in_order(row, temperature)
        place = order.tolist().index(token)
        whole = probabilities[before < top_p].sum()
        assert row[token] > -torch.inf
        assert before[place] < top_p + CLOSE
        low, high = before[place], before[place] + probabilities[place]
        slack = CLOSE + abs(probabilities[np.abs(before - top_p) < CLOSE].sum())
        assert low - slack <= u * whole <= high + slack
        if low + slack < u * whole < high - slack:
            # Ties come in any order there.
            assert token == other or row[token] == row[other]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 0.9), (0.7, 0.9), (1.0, 1.0)])
def test_a_gpu_draws_what_a_cpu_does(dtype: torch.dtype, temperature: float, top_p: float,
                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Over many tokens, flat as those of an untrained model, up to equally likely ones and what rounding decides."""
    random = torch.Generator().manual_seed(0)
    logits = (torch.randn(200, 9000, generator=random) * 1.2).to(dtype)
    uniforms = torch.rand(200, generator=random)
    decoding = Decoding(temperature, top_p, 1, 0, 1)
    wanted, scores = draw(logits, uniforms, decoding)
    monkeypatch.setattr(drawing, "on_gpu", lambda tensor: True)
    found, ours = draw(logits, uniforms, decoding)
    same = logits.gather(1, found[:, None]) == logits.gather(1, wanted[:, None])
    assert same.float().mean() > 0.97
    # What differs stands beside it in the order: it is all but as likely.
    torch.testing.assert_close(ours, scores, atol=0.02, rtol=0)
    torch.testing.assert_close(ours[same[:, 0]], scores[same[:, 0]], atol=1e-4, rtol=0)
    assert ours.dtype == scores.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_are_all_there_in_order(dtype: torch.dtype) -> None:
    bits, values = drawing._numbers(dtype, torch.device("cpu"))
    assert sorted(bits.tolist()) == list(range(-NUMBERS // 2, NUMBERS // 2))
    assert bool((values[:-1] >= values[1:]).all())
    numbers = values > -torch.inf
    assert torch.equal(values[numbers], bits.to(torch.int16).view(dtype).float()[numbers])


def test_the_ends_of_the_noise_draw_possible_tokens() -> None:
    logits = torch.tensor([[-200.0, 1.0, 0.0, -torch.inf]], dtype=torch.bfloat16).repeat(2, 1)
    for top_p, last in ((0.99, 2), (0.5, 1), (1e-6, 1)):
        tokens = Counted(logits).nucleus(torch.tensor([0.0, 1 - 2**-24]), 1.0, top_p)
        assert tokens.tolist() == [1, last]
