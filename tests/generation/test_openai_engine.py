"""The client against server processes: transformers' own, one of ours with n and log-probabilities, one that fails."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from engines import VLLM_PYTHON, free_port, our_server, serving, transformers_serve
from runs import arguments, finish

from sicog_exp.generation.engine import Decoding, Request
from sicog_exp.generation.openai_engine import OpenAIEngine, served
from sicog_exp.generation.requests import EngineError
from sicog_exp.generation.transformers_engine import TransformersEngine
from sicog_exp.models.loading import EMBEDDED_BASE
from sicog_exp.models.vllm_names import vllm_folder
from sicog_exp.prompts import prompt
from sicog_exp.records import user

GREEDY = Decoding(0.0, 1.0, 24, 5, 4)


def requests(images: list[Path], count: int = 2) -> list[Request]:
    return [Request(f"s{i}", "dd", (user(prompt("dd"), 1),), (image,), count) for i, image in enumerate(images)]


def sampled(engine, asked: list[Request], decoding: Decoding = GREEDY) -> dict:
    return {c.key: c for batch in engine.sample(asked, decoding) for c in batch}


def test_transformers_serve_gives_the_same_answers(tiny_model: Path, world_images: list[Path], tmp_path: Path) -> None:
    """A real server that nobody here wrote. It has no log-probabilities, and one choice a request."""
    with transformers_serve(tiny_model, tmp_path / "log") as url:
        engine = OpenAIEngine(url, served(url, tiny_model, wait=60), in_flight=2)
        found, asked = sampled(engine, requests(world_images[:4])), requests(world_images[:4])
        with pytest.raises(EngineError, match=rf"serves {tiny_model}.*\n.*vllm serve .*--served-model-name develop-1"):
            served(url, Path("/store/develop-1"))
    expected = sampled(TransformersEngine.from_path(tiny_model), asked)
    assert {key: (c.text, c.finish_reason) for key, c in found.items()} == {
        key: (c.text, c.finish_reason) for key, c in expected.items()
    }
    assert {c.logprob for c in found.values()} == {None}
    assert engine.counted["prompt_tokens"] > 0


def test_a_whole_run_is_sampled_and_scored_by_a_server(tiny_model: Path, tmp_path: Path) -> None:
    """One that serves the step store: every generation under its folder's name, as soon as it is there."""
    store = tmp_path / "store"
    store.mkdir()
    with our_server(store, tmp_path / "log") as url:
        chosen = ("engine.kind=openai", f"engine.server={url}", "engine.in_flight=4")
        printed = finish(arguments(tiny_model, store, "iterations=1", *chosen), tmp_path)
    assert "G1 evaluate" in printed
    asked = [*store.glob("generate-*/manifest.json"), *store.glob("evaluate-*/manifest.json")]
    assert [json.loads(path.read_text())["device"] for path in asked] == [url] * 4
    trained = [json.loads(path.read_text())["device"] for path in store.glob("pretrain-*/manifest.json")]
    assert trained == ["1 CPU threads"]


@pytest.mark.skipif(VLLM_PYTHON not in os.environ, reason=f"{VLLM_PYTHON} names no python with vllm")
def test_vllm_serve_gives_the_same_answers(world_images: list[Path], tmp_path: Path) -> None:
    """The embedded base, greedy, beside our engine; and drawn, the same again from the same seeds."""
    port, python = free_port(), os.environ[VLLM_PYTHON]
    folder = vllm_folder(EMBEDDED_BASE, tmp_path / "model")
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
               "--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port),
               "--generation-config", "vllm", "--dtype", "float32", "--max-model-len", "512",
               "--enforce-eager"]  # fmt: skip
    asked = requests(world_images[:6])
    with serving(command, port, tmp_path / "log", VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1",
                 VLLM_NO_USAGE_STATS="1", PYTHONPATH="") as url:  # fmt: skip
        engine = OpenAIEngine(url, served(url, Path("base")))
        found = sampled(engine, asked)
        warm = Decoding(1.0, 0.95, 24, 5, 4)
        drawn, again = sampled(engine, asked, warm), sampled(engine, asked, warm)
    expected = sampled(TransformersEngine.from_path(EMBEDDED_BASE), asked)
    for key, candidate in found.items():
        assert (candidate.text, candidate.tokens) == (expected[key].text, expected[key].tokens)
        assert candidate.logprob == pytest.approx(expected[key].logprob, abs=1e-2)
    assert {key: c.text for key, c in drawn.items()} == {key: c.text for key, c in again.items()}
    assert len({c.text for c in drawn.values()}) > 2


class Failing(BaseHTTPRequestHandler):
    """Answers what `script` says, one (status, body) a request, its last one for ever; notes keys and bodies."""

    script: list[tuple[int, dict]]
    seen: list[tuple[str, dict]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.headers["Authorization"], body))
        status, answer = self.script[0] if len(self.script) == 1 else self.script.pop(0)
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def failing() -> Iterator[tuple[str, type[Failing]]]:
    handler = type("Handler", (Failing,), {"script": [], "seen": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", handler
    server.shutdown()


def answered(*texts: str, tokens: int = 2) -> dict:
    listed = {"content": [{"token": "a", "logprob": -0.5, "bytes": None, "top_logprobs": []}] * tokens}
    choices = [{"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": "length",
                "logprobs": listed} for i, text in enumerate(texts)]  # fmt: skip
    usage = {"prompt_tokens": 7, "completion_tokens": tokens * len(texts), "total_tokens": 7 + tokens * len(texts)}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": choices, "usage": usage}


TEXT = Request("t", "text", (user("Name a red animal."),), (), 2, 3)
WARM = Decoding(1.0, 0.9, 8, 5, 4)


def test_one_request_asks_for_all_candidates(failing, monkeypatch: pytest.MonkeyPatch) -> None:
    url, handler = failing
    monkeypatch.setenv("SICOG_API_KEY", "secret")
    monkeypatch.setenv("OPENAI_API_KEY", "of-another-server")
    handler.script = [(429, {}), (200, answered("a fox", "a crab"))]
    found = sampled(OpenAIEngine(url, "m"), [TEXT], WARM)
    assert [(c.index, c.text, c.logprob, c.tokens, c.finish_reason) for c in found.values()] == [
        (3, "a fox", -1.0, 2, "length"), (4, "a crab", -1.0, 2, "length")]  # fmt: skip
    (key, body), again = handler.seen
    assert (key, body) == again, "a failure that passes is tried again"
    assert key == "Bearer secret"
    assert (body["model"], body["n"], body["temperature"], body["top_p"], body["max_tokens"]) == ("m", 2, 1.0, 0.9, 8)


def test_a_server_of_single_choices_is_asked_for_each(failing) -> None:
    url, handler = failing
    handler.script = [(200, answered("a fox"))]
    engine = OpenAIEngine(url, "m")
    assert [c.index for c in sampled(engine, [TEXT], WARM).values()] == [3, 4]
    assert [body["n"] for _, body in handler.seen] == [2, 1, 1]
    seeds = [body["seed"] for _, body in handler.seen]
    assert seeds[2] == seeds[1] + 1 == seeds[0] + 1
    assert engine.counted["prompt_tokens"] == 7


@pytest.mark.parametrize(("status", "meant"), [
    (401, "refuses the key.*SICOG_API_KEY"), (404, "does not serve what was asked.*engine.server"),
    (413, "refuses the request.*too long"), (503, "keeps failing")])  # fmt: skip
def test_what_does_not_pass_is_said(failing, status: int, meant: str) -> None:
    url, handler = failing
    handler.script = [(status, {"error": {"message": "too long"}})]
    with pytest.raises(EngineError, match=rf"sample 't': {url} {meant}"):
        sampled(OpenAIEngine(url, "m", retries=0), [TEXT], WARM)


def test_a_refused_prompt_costs_no_other(failing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the server refuses whatever it is asked."""
    url, handler = failing
    refusal = 400, {"error": {"message": "too long"}}
    asked = [Request(f"t{i}", "text", TEXT.messages, (), 2) for i in range(3)]
    handler.script = [(200, answered("a fox", "a crab")), refusal, (200, answered("a fox", "a crab"))]
    engine = OpenAIEngine(url, "m", in_flight=1, retries=0)
    (sampled_three,) = engine.sample_batches([asked], WARM)
    assert [c.key for c in sampled_three.candidates] == [(f"t{i}", "text", k) for i in (0, 2) for k in (0, 1)]
    assert [refused.key for refused in sampled_three.refused] == [("t1", "text", 0)]
    assert engine.refused == {"t1": sampled_three.refused[0].reason}
    assert f"{url} refuses the request" in engine.refused["t1"]
    assert "too long" in engine.refused["t1"]
    monkeypatch.setattr("sicog_exp.generation.openai_engine.REFUSALS", 5)
    handler.script = [refusal]
    assert len(list(engine.sample_batches([asked] * 3, WARM))) == 3, "it has answered before"
    with pytest.raises(EngineError, match=rf"6 requests and no answer, sample 't2': {url} refuses .*too long"):
        list(OpenAIEngine(url, "m", retries=0).sample_batches([asked] * 3, WARM))


def test_no_server(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(EngineError, match=rf"{url} cannot be reached"):
        served(url, tmp_path)
    with pytest.raises(EngineError, match=r"does not score given answers.*engine.evaluates=false"):
        OpenAIEngine(url, "m").log_likelihood([TEXT], ["a fox"])
