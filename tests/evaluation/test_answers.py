"""Answers of a killed evaluation: found again by what was asked and by whom, and by nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import OracleEngine, RefusingOracle
from PIL import Image

from sicog_exp.evaluation.answers import ANSWERS, LIKELIHOOD_CHUNK, KeptAnswers
from sicog_exp.generation.engine import Decoding, Refusal, Request, Sampled
from sicog_exp.generation.requests import cut
from sicog_exp.generation.transformers_engine import TransformersEngine
from sicog_exp.prompts import prompt
from sicog_exp.records import user

GREEDY = Decoding(0.0, 1.0, 20, 0, 3)


class Counting(OracleEngine):
    """Answers with the number of letters; counts what it is asked and can die on the way."""

    def __init__(self, dies_after: int = 10**9) -> None:
        super().__init__(lambda request: f"{len(request.messages[0].content)} letters")
        self.batches: list[list[str]] = []
        self.likelihoods = 0
        self._left = dies_after

    def plan(self, requests: Sequence[Request], decoding: Decoding) -> list[list[Request]]:
        return cut(requests, [len(request.messages[0].content) for request in requests], decoding.batch_size)

    def sample_batches(self, batches: Sequence[Sequence[Request]], decoding: Decoding) -> Iterator[Sampled]:
        for batch in batches:
            if not self._left:
                raise KeyboardInterrupt
            self._left -= 1
            self.batches.append([request.sample_id for request in batch])
            yield Sampled([self._candidate(request, decoding) for request in batch], 5, 2.0)

    def log_likelihood(self, requests, continuations):
        self.likelihoods += len(requests)
        return super().log_likelihood(requests, continuations)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (4, 4), (90 * i, 0, 0)).save(folder / f"{i}.png")
    return folder


def questions(pictures: Path, count: int = 10) -> list[Request]:
    return [Request(f"task/{i}/0", "direct", (user("?" * (i * 7 % 5 + 1), 1),), (pictures / f"{i % 3}.png",), 1)
            for i in range(count)]  # fmt: skip


def answered(engine: Counting, scratch: Path, requests: Sequence[Request], weights: str = "w",
             decoding: Decoding = GREEDY) -> dict[str, str]:  # fmt: skip
    batches = KeptAnswers(engine, scratch, weights).sample(requests, decoding)
    return {candidate.sample_id: candidate.text for batch in batches for candidate in batch}


def test_a_killed_evaluation_asks_only_for_the_missing_batches(pictures: Path, tmp_path: Path):
    requests, whole, first, second = questions(pictures), Counting(), Counting(dies_after=2), Counting()
    expected = answered(whole, tmp_path / "whole", requests)
    with pytest.raises(KeyboardInterrupt):
        answered(first, tmp_path / "s", requests)
    assert answered(second, tmp_path / "s", requests) == expected
    assert first.batches + second.batches == whole.batches, "a batch is asked as it was"
    assert len(first.batches) == 2
    third = Counting()
    kept = KeptAnswers(third, tmp_path / "s", "w")
    assert len(list(kept.sample(requests, GREEDY))) == 4
    assert (third.batches, kept.kept_seconds) == ([], pytest.approx(8.0))
    undisturbed = KeptAnswers(Counting(), tmp_path / "again", "w")
    list(undisturbed.sample(requests, GREEDY))
    assert kept.counted == undisturbed.counted
    assert kept.counted["prompt_tokens"] > 0


@pytest.mark.parametrize("change", ["weights", "decoding", "picture", "words"])
def test_another_question_or_model_is_asked_anew(pictures: Path, tmp_path: Path, change: str):
    answered(Counting(), tmp_path / "s", questions(pictures))
    engine, requests = Counting(), questions(pictures)
    if change == "picture":
        for path in pictures.iterdir():
            Image.new("RGB", (4, 4), "white").save(path)
    if change == "words":
        requests = [Request(r.sample_id, r.kind, (user("what?", 1),), r.images, 1) for r in requests]
    decoding = Decoding(0.0, 1.0, 21, 0, 3) if change == "decoding" else GREEDY
    answered(engine, tmp_path / "s", requests, "v" if change == "weights" else "w", decoding)
    assert len(engine.batches) == 4


def test_paths_are_no_part_of_a_question(pictures: Path, tmp_path: Path):
    expected = answered(Counting(), tmp_path / "s", questions(pictures))
    shutil.move(pictures, tmp_path / "elsewhere")
    shutil.move(tmp_path / "s", tmp_path / "t")
    engine = Counting()
    assert answered(engine, tmp_path / "t", questions(tmp_path / "elsewhere")) == expected
    assert engine.batches == []


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), junk=st.binary(max_size=6), cut_off=st.booleans())
def test_a_damaged_file_costs_batches_and_never_an_answer(tmp_path: Path, pictures: Path, place: int, junk: bytes,
                                                          cut_off: bool):  # fmt: skip
    requests, scratch = questions(pictures), tmp_path / f"{place}-{junk.hex()}-{cut_off}"
    expected = answered(Counting(), scratch, requests)
    file = scratch / ANSWERS
    data = file.read_bytes()
    at = place % len(data)
    damaged = data[:at] + junk + (b"" if cut_off else data[at + len(junk) :])
    file.write_bytes(damaged)
    assert answered(Counting(), scratch, requests) == expected
    again = Counting()
    assert answered(again, scratch, requests) == expected
    assert again.batches == [], "what was lost is kept now"


def test_likelihoods_are_kept_in_chunks(pictures: Path, tmp_path: Path):
    requests = questions(pictures, LIKELIHOOD_CHUNK + 7)
    texts = ["yes" if i % 2 else "no, never" for i in range(len(requests))]
    first, second = Counting(), Counting()
    expected = KeptAnswers(first, tmp_path / "s", "w").log_likelihood(requests, texts)
    assert expected == Counting().log_likelihood(requests, texts)
    assert KeptAnswers(second, tmp_path / "s", "w").log_likelihood(requests, texts) == expected
    assert (first.likelihoods, second.likelihoods) == (len(requests), 0)
    texts[0] = "maybe"
    KeptAnswers(second, tmp_path / "s", "w").log_likelihood(requests, texts)
    assert second.likelihoods == LIKELIHOOD_CHUNK


def test_a_refused_question_is_not_asked_again(pictures: Path, tmp_path: Path):
    requests = questions(pictures)
    for _ in range(2):
        engine = RefusingOracle(lambda request: "a", refuses=lambda request: request.sample_id[5] in "27")
        kept, heard = KeptAnswers(engine, tmp_path, "w"), []
        kept.heard = heard.extend
        found = [candidate.sample_id for batch in kept.sample(requests, GREEDY) for candidate in batch]
        assert sorted(found) == [f"task/{i}/0" for i in range(10) if i not in (2, 7)]
        assert kept.refused == {"task/2/0": "too wide", "task/7/0": "too wide"}
        assert sorted(heard) == [f"task/{i}/0" for i in range(10)]
        scored = kept.log_likelihood(requests, ["yes"] * 10)
        assert [i for i, row in enumerate(scored) if isinstance(row, Refusal)] == [2, 7]
        assert scored[0] == (-3.0, 2, False)
    assert engine.asked == []


def test_a_question_that_a_server_refused_is_asked_again(pictures: Path, tmp_path: Path):
    requests = questions(pictures)
    for refuses in ("27", ""):
        numbers = tuple(refuses)
        engine = RefusingOracle(lambda request: "a", refuses=lambda r, those=numbers: r.sample_id[5] in those)
        engine.refusals_last = False
        kept = KeptAnswers(engine, tmp_path, "w")
        found = [candidate.sample_id for batch in kept.sample(requests, GREEDY) for candidate in batch]
        assert len(found) == 10 - len(refuses)
        assert len(kept.refused) == len(refuses)
    assert {request.sample_id for request in engine.asked} >= {"task/2/0", "task/7/0"}


def test_a_real_engine_answers_by_length_and_resumes(tiny_model: Path, world_images: list[Path], tmp_path: Path):
    words = [prompt("direct", "What is " + "to the left of the " * (i % 3) + f"dog {i}?") for i in range(12)]
    requests = [Request(f"t/{i}/0", "direct", (user(text, 1),), (world_images[i],), 1) for i, text in enumerate(words)]
    engine = TransformersEngine.from_path(tiny_model)
    expected = list(engine.sample(requests, GREEDY))
    lengths = [[len(words[int(c.sample_id.split("/")[1])].split()) for c in batch] for batch in expected]
    assert [row for batch in lengths for row in batch] == sorted(row for batch in lengths for row in batch)
    started = KeptAnswers(engine, tmp_path, "w").sample(requests, GREEDY)
    assert [next(started), next(started)] == expected[:2]
    started.close()
    assert list(KeptAnswers(engine, tmp_path, "w").sample(requests, GREEDY)) == expected
