"""Memory that is short: a batch is computed in halves, to the same candidates; one that cannot be halved says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from test_transformers_engine import engine, requests_36  # noqa: F401 - fixtures

from sicog_exp.generation.engine import Decoding, Request
from sicog_exp.generation.engines import OpenEngine
from sicog_exp.generation.memory import MemoryShortage
from sicog_exp.generation.pool import generate_pool
from sicog_exp.generation.transformers_engine import TransformersEngine
from sicog_exp.models.loading import work_of
from sicog_exp.records import Candidate


def cuda_error() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def cpu_error() -> Exception:
    try:
        torch.empty(1 << 60)
    except RuntimeError as error:  # torch's own words
        return error
    raise AssertionError("this machine has an exabyte of memory")


def cublas_error() -> Exception:
    return RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def driver_error() -> Exception:
    return torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported asynchronously")


@contextmanager
def memory_for(engine: TransformersEngine, rows: int, error: Callable[[], Exception] = cuda_error) -> Iterator[None]:  # noqa: F811
    """The model computes at most so many rows at once."""

    def refuse(module: torch.nn.Module, inputs: tuple, given: dict) -> None:
        if len(given["attention_mask"]) > rows:
            raise error()

    hook = engine.model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def drawn(engine: TransformersEngine, requests: list[Request], decoding: Decoding) -> list[list[Candidate]]:  # noqa: F811
    return list(engine.sample(requests, decoding))


@pytest.fixture
def asked(requests_36: list[Request]) -> list[Request]:  # noqa: F811
    """Eight prompts, some about one picture, with one to three candidates; one of text alone."""
    several = [Request(r.sample_id, r.kind, r.messages, r.images, 1 + i % 3) for i, r in enumerate(requests_36[:14:2])]
    text = Request("text", "cot", (type(requests_36[0].messages[0])("user", "Where is it?"),), (), 2)
    return [*several, text]


@pytest.mark.parametrize("error", [cuda_error, cpu_error, cublas_error, driver_error])
def test_halves_give_the_same_candidates(engine: TransformersEngine, asked: list[Request],  # noqa: F811
                                         capsys: pytest.CaptureFixture, error: Callable[[], Exception]
                                         ) -> None:  # fmt: skip
    fresh = TransformersEngine(engine.model, engine.encoder.processor)
    decoding = Decoding(0.9, 0.95, 24, 5, 4)
    wanted = drawn(engine, asked, decoding)
    with memory_for(fresh, 3, error):
        found = drawn(fresh, asked, decoding)
    assert [[c.key for c in batch] for batch in found] == [[c.key for c in batch] for batch in wanted]
    for one, other in zip(chain(*found), chain(*wanted), strict=True):
        assert (one.text, one.tokens, one.seed, one.finish_reason) == (other.text, other.tokens, other.seed,
                                                                       other.finish_reason)  # fmt: skip
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
    assert OpenEngine(fresh, work_of(fresh.model), "cpu").halvings == {"halved_batches": fresh.halved}
    assert 1 <= fresh.halved <= 3, "a size that failed is not tried again"
    assert capsys.readouterr().out.count("going on with halves") == 1
    assert OpenEngine(engine, work_of(engine.model), "cpu").halvings == {}


def test_buffers_of_the_batch_before_go_first(engine: TransformersEngine, asked: list[Request],  # noqa: F811
                                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """A prompt's pass that finds no room beside them has it without them: nothing is halved."""
    fresh = TransformersEngine(engine.model, engine.encoder.processor, static_cache=True)
    decoding = Decoding(0.9, 0.95, 12, 5, 4)
    wanted = drawn(fresh, asked, decoding)
    run_fixed = TransformersEngine._run_fixed

    def keeping(*given: Any) -> Any:  # as on a GPU
        result = run_fixed(fresh, *given)
        fresh._fixed = cast(Any, object())
        return result

    def short(module: torch.nn.Module, inputs: tuple, given: dict) -> None:
        if fresh._fixed:
            shortages.append(1)
            raise cuda_error()

    shortages: list[int] = []
    monkeypatch.setattr(fresh, "_run_fixed", keeping)
    hook = fresh.model.register_forward_pre_hook(short, with_kwargs=True)
    try:
        assert drawn(fresh, asked, decoding) == wanted
    finally:
        hook.remove()
    assert len(shortages) == len(wanted) - 1
    assert fresh.halved == 0


def test_likelihoods_are_halved_too(engine: TransformersEngine, asked: list[Request]) -> None:  # noqa: F811
    fresh = TransformersEngine(engine.model, engine.encoder.processor)
    texts = ["a dog", "two red dogs", "no", "a cat at the top", "yes", "blue", "a hat", "no one"]
    wanted = engine.log_likelihood(asked, texts)
    with memory_for(fresh, 2):
        found = fresh.log_likelihood(asked, texts)
    for one, other in zip(found, wanted, strict=True):
        assert one == (pytest.approx(other[0], abs=1e-3), other[1], other[2])
    assert fresh.halved == 2
    assert fresh.counted["new_tokens"] == sum(tokens for _, tokens, _ in wanted)


def test_a_single_candidate_that_does_not_fit_is_an_error(engine: TransformersEngine, asked: list[Request],  # noqa: F811
                                                          tmp_path: Path) -> None:  # fmt: skip
    fresh = TransformersEngine(engine.model, engine.encoder.processor)
    with memory_for(fresh, 0), pytest.raises(MemoryShortage, match=r"batch of one.*lower sampling.max_new_tokens"):
        generate_pool(fresh, asked, Decoding(0.9, 0.95, 8, 5, 4), tmp_path, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
