"""A server of OpenAI's protocol over our own engine, as a process: `python served.py MODELS PORT`.

MODELS is a folder of models (a step store, say), each served under its folder's name and loaded when it is first asked.
It keeps to what vllm's server does where that differs from others: choice i of n has seed + i, several greedy choices
are refused, `logprobs` are of every new token. Their sum is the engine's; how it spreads over the tokens is not.
"""

from __future__ import annotations

import base64
import json
import sys
import tempfile
import threading
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from sicog_exp.generation.engine import Decoding, Request
from sicog_exp.generation.transformers_engine import TransformersEngine
from sicog_exp.records import IMAGE_PLACEHOLDER, Candidate, Message

ONE_AT_A_TIME = threading.Lock()


@lru_cache(maxsize=2)
def engine(folder: Path) -> TransformersEngine:
    return TransformersEngine.from_path(folder)


def completed(folder: Path, body: dict[str, Any]) -> dict[str, Any]:
    """The response to one request."""
    text, pictures = "", []
    with tempfile.TemporaryDirectory() as home:
        for part in body["messages"][-1]["content"]:
            if part["type"] == "text":
                text += part["text"]
                continue
            head, _, data = part["image_url"]["url"].partition(",")
            assert head == "data:image/png;base64"
            pictures.append(Path(home) / f"{len(pictures)}.png")
            pictures[-1].write_bytes(base64.b64decode(data))
            text += IMAGE_PLACEHOLDER + "\n"
        decoding = Decoding(body["temperature"], body["top_p"], body["max_tokens"], 0, 1)
        asked = [Request(f"seed {body['seed'] + i}", "dd", (Message("user", text),), tuple(pictures), 1)
                 for i in range(body["n"])]  # fmt: skip
        with ONE_AT_A_TIME:
            drawn = [sampled for request in asked for sampled in engine(folder).sample_batches([[request]], decoding)]
    if drawn[0].refused:
        return {"error": {"message": drawn[0].refused[0].reason, "code": 400}}
    found = [sampled.candidates[0] for sampled in drawn]
    new, prompt = sum(candidate.tokens for candidate in found), drawn[0].prompt_tokens
    return {"id": "1", "object": "chat.completion", "created": 0, "model": folder.name,
            "choices": [choice(i, candidate, body["logprobs"]) for i, candidate in enumerate(found)],
            "usage": {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}}  # fmt: skip


def choice(index: int, made: Candidate, logprobs: bool) -> dict[str, Any]:
    assert made.logprob is not None
    each = {"token": "", "logprob": made.logprob / made.tokens, "bytes": None, "top_logprobs": []}
    return {"index": index, "message": {"role": "assistant", "content": made.text}, "finish_reason": made.finish_reason,
            "logprobs": {"content": [each] * made.tokens} if logprobs else None}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    models: Path

    def do_GET(self) -> None:
        folders = sorted(path.parent for path in self.models.glob("*/config.json"))
        self._send(200, {"object": "list", "data": [{"id": folder.name, "object": "model", "created": 0,
                                                     "owned_by": "tests"} for folder in folders]})  # fmt: skip

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["temperature"] == 0 and body["n"] > 1:
            return self._send(400, {"error": {"message": "n must be 1 when using greedy sampling", "code": 400}})
        answer = completed(self.models / body["model"], body)
        return self._send(400 if "error" in answer else 200, answer)

    def _send(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


if __name__ == "__main__":
    Handler.models = Path(sys.argv[1])
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
