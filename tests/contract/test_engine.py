"""What every engine promises. One class of tests; a new engine adds its builder to `ENGINES`.

What an engine cannot promise stands in `CANNOT`, test by test, with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engines import our_server

from sicog_exp.generation.engine import Decoding, Engine, Refusal, Request, candidate_seed
from sicog_exp.generation.engines import open_engine
from sicog_exp.generation.requests import EngineError, keys_of
from sicog_exp.models.loading import EMBEDDED_BASE
from sicog_exp.prompts import prompt
from sicog_exp.recipe import EngineConfig, ModelConfig
from sicog_exp.records import user


@contextmanager
def transformers(folder: Path, home: Path) -> Iterator[Engine]:
    from sicog_exp.generation.transformers_engine import TransformersEngine

    yield TransformersEngine.from_path(folder)


@contextmanager
def ray(folder: Path, home: Path) -> Iterator[Engine]:
    """Two workers of a local cluster."""
    pytest.importorskip("ray")
    with open_engine(folder, ModelConfig(device="cpu"), EngineConfig(workers=2)) as opened:
        yield opened.engine


@contextmanager
def openai(folder: Path, home: Path) -> Iterator[Engine]:
    """A server process over our own engine."""
    model = home / "models" / "tiny"
    model.parent.mkdir()
    model.symlink_to(folder)
    with our_server(model.parent, home / "server.log") as url:
        config = EngineConfig(kind="openai", server=url, in_flight=4)
        with open_engine(model, ModelConfig(device="cpu"), config) as opened:
            yield opened.engine


@contextmanager
def vllm(folder: Path, home: Path) -> Iterator[Engine]:
    """The embedded base: vllm's kernels know no heads as narrow as those of the tiny model."""
    pytest.importorskip("vllm", reason="vllm is not installed beside the rest")
    from sicog_exp.generation.vllm_engine import VllmEngine

    engine = VllmEngine.from_path(EMBEDDED_BASE, max_length=512, memory=0.1, enforce_eager=True)
    yield engine
    engine.close()


ENGINES: list[Callable[[Path, Path], Any]] = [transformers, ray, openai, vllm]
LIKELIHOOD = ("test_log_likelihood_does_not_depend_on_the_batch", "test_log_likelihood_agrees_with_sampling")
REFUSED = "test_a_prompt_that_cannot_be_put_has_no_likelihood"
CANNOT = {openai: dict.fromkeys((*LIKELIHOOD, REFUSED), "OpenAI's protocol does not score given answers")}
WARM = Decoding(temperature=1.0, top_p=0.95, max_new_tokens=24, seed=5, batch_size=4)
GREEDY = Decoding(temperature=0.0, top_p=1.0, max_new_tokens=24, seed=5, batch_size=4)


@pytest.fixture(scope="module", params=ENGINES, ids=lambda build: build.__name__)
def opened(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
           ) -> Iterator[tuple[Any, Engine]]:  # fmt: skip
    with request.param(tiny_model, tmp_path_factory.mktemp("engine")) as engine:
        yield request.param, engine


@pytest.fixture
def engine(request: pytest.FixtureRequest, opened: tuple[Any, Engine]) -> Engine:
    build, engine = opened
    reason = CANNOT.get(build, {}).get(request.node.originalname)
    if reason:
        pytest.skip(reason)
    return engine


@pytest.fixture(scope="module")
def ragged(world_images: list[Path]) -> list[Request]:
    """Eleven requests: prompts of many lengths, one without an image, counts 1 to 5, first indices 0 to 2."""
    requests = []
    for i in range(9):
        question = "What is " + "very " * (i * i % 7) + "red?"
        requests.append(
            Request(f"s{i}", "cot", (user(prompt("cot", question), 1),), (world_images[i],), i % 5 + 1, i % 3)
        )
    requests.append(Request("s0", "direct", (user(prompt("direct", "What is red?"), 1),), (world_images[0],), 2))
    return [*requests, Request("text", "text", (user("Name a red animal."),), (), 3)]


def unfit(request: Request) -> Request:
    return replace(request, messages=(user("Which one?", 2),))


def run(engine: Engine, requests: list[Request], decoding: Decoding = WARM):
    return {c.key: c for batch in engine.sample(requests, decoding) for c in batch}


class TestEngine:
    def test_every_requested_key_exactly_once(self, engine, ragged):
        wanted = Counter(key for request in ragged for key in keys_of(request))
        found = Counter(c.key for batch in engine.sample(ragged, WARM) for c in batch)
        assert found == wanted

    def test_one_list_per_batch(self, engine, ragged):
        assert len(list(engine.sample(ragged, WARM))) == 3

    def test_candidates_carry_what_they_cost(self, engine, ragged):
        for key, candidate in run(engine, ragged).items():
            assert candidate.seed == candidate_seed(WARM.seed, *key)
            assert 1 <= candidate.tokens <= WARM.max_new_tokens
            assert candidate.finish_reason == "stop" or candidate.tokens == WARM.max_new_tokens
            assert candidate.logprob < 0
            assert candidate.text == candidate.text.strip()
            assert "<|end|>" not in candidate.text

    def test_same_seed_same_text(self, engine, ragged):
        assert run(engine, ragged) == run(engine, ragged)

    def test_another_seed_another_text(self, engine, ragged):
        other = Decoding(1.0, 0.95, 24, 6, 4)
        assert [c.text for c in run(engine, ragged).values()] != [c.text for c in run(engine, ragged, other).values()]

    def test_each_index_has_noise_of_its_own(self, engine, world_images):
        requests = [Request("a", "dd", (user(prompt("dd"), 1),), (world_images[0],), 32)]
        candidates = run(engine, requests).values()
        assert len({c.seed for c in candidates}) == 32
        assert len({c.text for c in candidates}) > 8

    def test_candidates_of_split_requests_are_the_same(self, engine, world_images):
        """Indices 0-7 asked at once or as 0-4 and 5-7: the noise belongs to the index."""
        whole = Request("a", "dd", (user(prompt("dd"), 1),), (world_images[0],), 8)
        parts = [
            Request("a", "dd", whole.messages, whole.images, 5),
            Request("a", "dd", whole.messages, whole.images, 3, 5),
        ]
        assert {k: c.text for k, c in run(engine, [whole]).items()} == {
            k: c.text for k, c in run(engine, parts).items()
        }

    def test_order_of_requests_is_irrelevant_to_greedy(self, engine, ragged):
        forward, backward = run(engine, ragged, GREEDY), run(engine, ragged[::-1], GREEDY)
        assert {key: c.text for key, c in forward.items()} == {key: c.text for key, c in backward.items()}

    def test_batches_do_not_change_greedy(self, engine, ragged):
        single = run(engine, ragged, Decoding(0.0, 1.0, 24, 5, 1))
        assert {key: c.text for key, c in run(engine, ragged, GREEDY).items()} == {k: c.text for k, c in single.items()}

    def test_greedy_candidates_of_one_prompt_agree(self, engine, ragged):
        for request in ragged:
            assert len({c.text for k, c in run(engine, [request], GREEDY).items()}) == 1

    @pytest.mark.parametrize("first", [0, 1])
    def test_duplicate_requests_are_refused_at_once(self, engine, ragged, first):
        doubled = Request("s4", "cot", ragged[4].messages, ragged[4].images, 2, first)
        with pytest.raises(EngineError, match=r"more than once.*'s4'"):
            engine.sample([*ragged, doubled], WARM)

    def test_no_requests_no_batches(self, engine):
        assert list(engine.sample([], WARM)) == []

    def test_log_likelihood_does_not_depend_on_the_batch(self, engine, ragged):
        texts = ["red", "two blue dogs", "no", "a", "left of the cat and above the dog"] * 2 + ["dog"]
        alone = [engine.log_likelihood([r], [t])[0] for r, t in zip(ragged, texts, strict=True)]
        for (value, count, best), expected in zip(engine.log_likelihood(ragged, texts), alone, strict=True):
            assert (count, best) == expected[1:]
            assert value == pytest.approx(expected[0], abs=1e-3)
            assert value < 0 < count

    def test_log_likelihood_agrees_with_sampling(self, engine, ragged):
        """One-token candidates that were cut by length: likelihood is the sampler's, greedy where temperature is 0."""
        checked = 0
        for decoding in (Decoding(1.0, 1.0, 1, 5, 4), Decoding(0.0, 1.0, 1, 5, 4)):
            for request in ragged:
                for candidate in run(engine, [request], decoding).values():
                    (value, count, best), *_ = engine.log_likelihood([request], [candidate.text])
                    if candidate.finish_reason == "length" and count == 1 and not candidate.text.isspace():
                        checked += value == pytest.approx(candidate.logprob, abs=1e-3)
                        assert best or decoding.temperature > 0 or value != pytest.approx(candidate.logprob, abs=1e-3)
        assert checked >= 5

    def test_a_prompt_that_cannot_be_put_costs_no_other(self, engine, ragged):
        """One image less than the question shows, as where its words hold the model's own mark for one. Beside others,
        and in a batch of its own."""
        asked = [*ragged[:5], unfit(ragged[5]), *ragged[6:], replace(unfit(ragged[4]), kind="direct")]
        (own,), *rest = ([unfit(ragged[5])], *engine.plan(asked, GREEDY))
        found = list(engine.sample_batches([[own], *rest], GREEDY))
        assert found[0].refused
        refused = {refusal.key: refusal.reason for sampled in found for refusal in sampled.refused}
        assert refused.keys() == {("s5", "cot", 2), ("s4", "direct", 1)}
        assert engine.refused.keys() == {"s4", "s5"}
        assert "shows 2 images, and 1 came with it" in refused["s5", "cot", 2]
        expected = run(engine, [*ragged[:5], *ragged[6:]], GREEDY)
        given = {c.key: c.text for sampled in found for c in sampled.candidates}
        assert given == {key: c.text for key, c in expected.items()}

    def test_a_prompt_that_cannot_be_put_has_no_likelihood(self, engine, ragged):
        asked = [ragged[0], unfit(ragged[5]), ragged[1]]
        expected = engine.log_likelihood([ragged[0], ragged[1]], ["red", "a dog"])
        first, refusal, last = engine.log_likelihood(asked, ["red", "red", "a dog"])
        assert isinstance(refusal, Refusal)
        assert refusal.key == ("s5", "cot", 2)
        assert [first, last] == [pytest.approx(one, abs=1e-3) for one in expected]
        assert isinstance(engine.log_likelihood(asked[1:2], ["red"])[0], Refusal)

    def test_defect_outputs_carry_their_sample_id(self, engine, ragged, world_images):
        """Authors' defect: one image without output shifts all later outputs onto wrong images.

        Each candidate of a mixed run is what its own request gives alone, under its own id; a bad image stops the run
        with its sample's name, it moves nothing.
        """
        together = run(engine, ragged, GREEDY)
        for request in ragged:
            for key, candidate in run(engine, [request], GREEDY).items():
                assert together[key].text == candidate.text
        broken = world_images[0].with_name("broken.png")
        broken.write_bytes(b"no image")
        bad = Request("the-bad-one", "dd", (user(prompt("dd"), 1),), (broken,), 2)
        with pytest.raises(EngineError, match=r"the-bad-one.*broken\.png"):
            list(engine.sample([*ragged, bad], WARM))
