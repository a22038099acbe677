from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from sicog_exp.generation.engine import Decoding, Refusal, Request, Sampled, candidate_seed
from sicog_exp.generation.pool import PoolError, generate_pool
from sicog_exp.generation.requests import EngineError, cut, keys_of
from sicog_exp.prompts import prompt
from sicog_exp.records import Candidate, read_jsonl, user
from sicog_exp.store import REJECTED

DECODING = Decoding(1.0, 1.0, 8, 3, 4)
REQUESTS = [Request(f"s{i}", kind, (user("w" * (i * 7 % 5 + 1)),), (), i % 3 + 1)
            for i in range(11) for kind in ("cot", "direct")]  # fmt: skip
SLOW = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from generation.test_pool import world_requests
from sicog_exp.generation.engine import Decoding
from sicog_exp.generation.pool import generate_pool
from sicog_exp.generation.transformers_engine import TransformersEngine
model, images, home, wait = sys.argv[1:]
generate_pool(TransformersEngine.from_path(model), world_requests(Path(images)), Decoding(1.0, 0.9, 12, 1, 2),
              Path(home) / "scratch", Path(home) / "candidates.jsonl", lambda done, total: time.sleep(float(wait)))
"""
LEAN = """
import re, sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, {tests!r})
from generation.test_pool import DECODING, Long
from sicog_exp.generation.engine import Request
from sicog_exp.generation.pool import generate_pool
from sicog_exp.records import user

home = Path(sys.argv[1])


def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def generate(items, out):
    requests = (Request(f"sample {{i}}", "cot", (user(f"What is number {{i}}? " + "w" * 300, 1),),
                        (home / f"image-{{i}}.png",), 8) for i in range(items))
    grown = []
    generate_pool(Long(), requests, replace(DECODING, batch_size=100), home / out / "s", home / out / "c.jsonl",
                  lambda done, total: grown.append(anonymous()))
    return max(*grown, anonymous())


before = generate(200, "warm")
print(*(generate(12500, "pool") - before for _ in ("sampled", "found")))
"""


class Fake:
    """An engine without a model; notes the batches that it was asked to sample."""

    def __init__(self) -> None:
        self.sampled: list[list[Request]] = []
        self.refusals_last = True
        self.drop: set[str] = set()
        self.refuse: set[str] = set()

    def plan(self, requests, decoding):
        return cut(requests, [len(r.messages[0].content) for r in requests], decoding.batch_size)

    def sample(self, requests, decoding):
        return (batch.candidates for batch in self.sample_batches(self.plan(requests, decoding), decoding))

    def sample_batches(self, batches, decoding):
        for batch in batches:
            self.sampled.append(batch)
            kept = [request for request in batch if request.sample_id not in self.drop | self.refuse]
            candidates = [self._candidate(key, decoding) for request in kept for key in keys_of(request)]
            refused = [Refusal.of(r, ValueError(f"too\nlong {r.kind}")) for r in batch if r.sample_id in self.refuse]
            yield Sampled(candidates, sum(len(r.messages[0].content) for r in batch), 0.25, refused=tuple(refused))

    def log_likelihood(self, requests, continuations):
        raise NotImplementedError

    def _candidate(self, key, decoding):
        seed = candidate_seed(decoding.seed, *key)
        return Candidate(*key, f"text {seed % 97} ü \u2028 \x85 end", seed, -seed % 7 / 3, 3, "stop")


class Long(Fake):
    """Its texts are of a kB, and it notes nothing."""

    def sample_batches(self, batches, decoding):
        for batch in batches:
            keys = [key for request in batch for key in keys_of(request)]
            yield Sampled([Candidate(*key, f"{key[0]} says " * 35, 7, -1.0, 3, "stop") for key in keys], 5, 0.25)


def test_file_and_facts(tmp_path):
    engine, calls = Fake(), []
    facts = generate_pool(engine, REQUESTS, DECODING, tmp_path / "s", tmp_path / "candidates.jsonl",
                          lambda *call: calls.append(call))  # fmt: skip
    rows = list(read_jsonl(tmp_path / "candidates.jsonl"))
    total = sum(r.count for r in REQUESTS)
    assert [(r["sample_id"], r["kind"], r["index"]) for r in rows] == [k for r in REQUESTS for k in keys_of(r)]
    assert facts["candidates"] == len(rows) == total
    assert facts["new_tokens"] == 3 * total
    assert facts["prompt_tokens"] == sum(len(r.messages[0].content) for r in REQUESTS)
    assert facts["seconds"] == 0.25 * len(engine.sampled)
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert not list((tmp_path / "s").glob(".*"))


def test_candidates_of_a_sample_are_sorted_by_kind_and_index(tmp_path):
    requests = [replace(REQUESTS[1], sample_id="a", count=2, first_index=2), replace(REQUESTS[1], sample_id="b"),
                replace(REQUESTS[0], sample_id="a", count=1), replace(REQUESTS[1], sample_id="a", count=2)]  # fmt: skip
    generate_pool(Fake(), requests, DECODING, tmp_path / "s", tmp_path / "c.jsonl")
    found = [(r["sample_id"], r["kind"], r["index"]) for r in read_jsonl(tmp_path / "c.jsonl")]
    assert found == [("a", "cot", 0), *[("a", "direct", i) for i in range(4)], ("b", "direct", 0)]


@pytest.mark.parametrize("damage", ["missing", "torn", "changed", "not JSON", "empty"])
def test_resume_samples_only_what_is_missing(tmp_path, damage):
    out, scratch = tmp_path / "c.jsonl", tmp_path / "s"
    facts = generate_pool(Fake(), REQUESTS, DECODING, scratch, out)
    before = out.read_bytes()
    out.unlink()
    shard = scratch / "batch-00002.jsonl"
    text = shard.read_text()
    damaged = {"torn": text[:-40], "changed": text.replace("text ", "TEXT ", 1), "not JSON": "{", "empty": ""}
    shard.unlink() if damage == "missing" else shard.write_text(damaged[damage])
    engine = Fake()
    again = generate_pool(engine, REQUESTS, DECODING, scratch, out)
    assert engine.sampled == [engine.plan(REQUESTS, DECODING)[2]]
    assert out.read_bytes() == before
    assert {**again, "seconds": 0} == {**facts, "seconds": 0}


def test_shards_of_other_requests_are_not_taken(tmp_path):
    generate_pool(Fake(), REQUESTS, DECODING, tmp_path / "s", tmp_path / "a.jsonl")
    engine, other = Fake(), replace(DECODING, seed=4)
    generate_pool(engine, REQUESTS, other, tmp_path / "s", tmp_path / "b.jsonl")
    generate_pool(Fake(), REQUESTS, other, tmp_path / "fresh", tmp_path / "c.jsonl")
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "c.jsonl").read_bytes()
    assert len(engine.sampled) == 6


def test_an_engine_that_loses_a_sample_is_an_error(tmp_path):
    engine = Fake()
    engine.drop = {"s3"}
    with pytest.raises(PoolError, match=r"2 missing, such as \('s3', '(cot|direct)', 0\)|1 missing, such as \('s3'"):
        generate_pool(engine, REQUESTS, DECODING, tmp_path / "s", tmp_path / "c.jsonl")
    assert not (tmp_path / "c.jsonl").exists()


def test_what_a_batch_lacks_or_has_too_much_is_named(tmp_path):
    request = replace(REQUESTS[0], count=2)
    good = [Fake()._candidate(key, DECODING) for key in keys_of(request)]

    def given(candidates):
        engine = Fake()
        engine.sample_batches = lambda batches, decoding: (Sampled(candidates, 1, 0.25) for _ in batches)
        generate_pool(engine, [request], DECODING, tmp_path / "s", tmp_path / "c.jsonl")

    with pytest.raises(PoolError, match=r"of 2 requested candidates: 1 missing, such as \('s0', 'cot', 1\)"):
        given(good[:1])
    with pytest.raises(PoolError, match=r"1 doubled, such as \('s0', 'cot', 0\)"):
        given([*good, good[0]])
    with pytest.raises(PoolError, match=r"1 not requested, such as \('s0', 'cot', 5\)"):
        given([*good, replace(good[0], index=5)])
    assert not (tmp_path / "c.jsonl").exists()
    given(good[::-1])
    assert [row["index"] for row in read_jsonl(tmp_path / "c.jsonl")] == [0, 1]


def test_defect_merge_of_nothing_is_an_error(tmp_path):
    """Authors' defect: the merge reads a name that nobody writes, finds nothing and reports success."""
    engine = Fake()
    engine.drop = {request.sample_id for request in REQUESTS}
    with pytest.raises(PoolError, match="4 missing, such as"):
        generate_pool(engine, [replace(r, count=1) for r in REQUESTS], DECODING, tmp_path / "s", tmp_path / "c.jsonl")
    with pytest.raises(PoolError, match="nothing to sample"):
        generate_pool(Fake(), [], DECODING, tmp_path / "s", tmp_path / "c.jsonl")
    engine.plan = lambda requests, decoding: cut(requests[:3], [1, 1, 1], decoding.batch_size)
    engine.drop = set()
    with pytest.raises(PoolError, match="19 of 22 requests are in no batch"):
        generate_pool(engine, REQUESTS, DECODING, tmp_path / "s", tmp_path / "c.jsonl")
    assert not (tmp_path / "c.jsonl").exists()


def test_refused_prompts_are_listed_counted_and_never_asked_again(tmp_path):
    """Whole batches of them, and single ones; what is resumed has the same bytes and asks only what is missing."""
    whole, calls = Fake(), []
    whole.refuse = {"s3", "s5", "s10"}
    facts = generate_pool(whole, REQUESTS, DECODING, tmp_path / "s", tmp_path / "a" / "c.jsonl",
                          lambda *call: calls.append(call))  # fmt: skip
    rows = list(read_jsonl(tmp_path / "a" / "c.jsonl"))
    assert {r["sample_id"] for r in rows} == {r.sample_id for r in REQUESTS} - whole.refuse
    assert list(read_jsonl(tmp_path / "a" / REJECTED)) == [
        {"id": r.sample_id, "kind": r.kind, "reason": f"too long {r.kind}"}
        for r in REQUESTS if r.sample_id in whole.refuse]  # fmt: skip
    assert (facts["rejected"], facts["candidates"]) == (6, len(rows))
    total = sum(r.count for r in REQUESTS)
    assert calls[-1] == (total, total)
    again = Fake()
    (tmp_path / "s" / "batch-00001.jsonl").unlink()
    again.refuse = whole.refuse
    assert generate_pool(again, REQUESTS, DECODING, tmp_path / "s", tmp_path / "b" / "c.jsonl") == facts
    assert len(again.sampled) == 1
    for name in ("c.jsonl", REJECTED):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_a_server_refused_is_asked_again(tmp_path):
    """It may have been started with other settings since; also where it refused all."""
    whole = Fake()
    facts = generate_pool(whole, REQUESTS, DECODING, tmp_path / "whole", tmp_path / "whole.jsonl")
    for refuse in ({"s3", "s5"}, {request.sample_id for request in REQUESTS}):
        server, scratch, out = Fake(), tmp_path / f"s{len(refuse)}", tmp_path / f"{len(refuse)}.jsonl"
        server.refusals_last, server.refuse = False, refuse
        with suppress(PoolError):
            generate_pool(server, REQUESTS, DECODING, scratch, out)
        server.refuse = set()
        assert generate_pool(server, REQUESTS, DECODING, scratch, out) == facts
        assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_model_that_refuses_all_prompts_stops(tmp_path):
    engine = Fake()
    engine.refuse = {request.sample_id for request in REQUESTS}
    with pytest.raises(PoolError, match=r"none of 22 prompts can be put to this model: sample 's0', say: too long cot"):
        generate_pool(engine, REQUESTS, DECODING, tmp_path / "s", tmp_path / "c.jsonl")
    assert not (tmp_path / "c.jsonl").exists()


def test_memory_holds_neither_candidates_nor_requests(tmp_path):
    """100,000 candidates of 0.6 kB for 12,500 requests: sampled, and found again."""
    tests = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", LEAN.format(tests=str(tests)), str(tmp_path)], capture_output=True,
                          text=True, check=True, env={**os.environ, "PYTHONPATH": str(tests.parent)})  # fmt: skip
    sampled, found = map(float, done.stdout.split())
    assert sampled < 30
    assert found < 30


def test_doubled_requests_are_refused(tmp_path):
    with pytest.raises(EngineError, match="more than once"):
        generate_pool(Fake(), [*REQUESTS, REQUESTS[0]], DECODING, tmp_path / "s", tmp_path / "c.jsonl")


def world_requests(images: Path) -> list[Request]:
    """Ragged requests about the pictures in a folder."""
    return [Request(path.stem, "cot", (user(prompt("cot", f"What is {'very ' * (i % 5)}red?"), 1),), (path,), i % 3 + 1)
            for i, path in enumerate(sorted(images.glob("*.png")))]  # fmt: skip


def test_killed_and_restarted_gives_the_same_bytes(tmp_path, tiny_model, world_images):
    tests = Path(__file__).parents[1]
    images = tmp_path / "images"
    images.mkdir()
    for path in world_images:
        (images / path.name).write_bytes(path.read_bytes())

    def start(home: str, wait: float) -> subprocess.Popen[bytes]:
        arguments = [str(tiny_model), str(images), str(tmp_path / home), str(wait)]
        environment = {**os.environ, "PYTHONPATH": str(tests.parent)}
        return subprocess.Popen([sys.executable, "-c", SLOW.format(tests=str(tests)), *arguments], env=environment)

    assert start("whole", 0).wait() == 0
    killed, shards = start("killed", 0.5), tmp_path / "killed" / "scratch"
    while len(list(shards.glob("batch-*"))) < 3:
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "candidates.jsonl").exists()
    finished = {path.name: path.read_bytes() for path in shards.glob("batch-*")}
    assert 3 <= len(finished) < 6
    assert start("killed", 0).wait() == 0
    assert {name: (shards / name).read_bytes() for name in finished} == finished
    assert (tmp_path / "killed" / "candidates.jsonl").read_bytes() == (
        tmp_path / "whole" / "candidates.jsonl"
    ).read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "whole" / "candidates.jsonl").read_text().splitlines()]
    assert len(rows) == sum(request.count for request in world_requests(images))
