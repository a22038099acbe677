"""Engines for tests: servers as processes of their own, and what this machine has of the optional packages."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

VLLM_PYTHON = "SICOG_TEST_VLLM"
"""Environment variable: the python of an environment with vllm, where it is not installed beside everything else."""
STARTS_IN = 400


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def serving(command: Sequence[str], port: int, log: Path, **environment: str) -> Iterator[str]:
    """The base URL of a server process on 127.0.0.1, once it lists its models."""
    url = f"http://127.0.0.1:{port}/v1"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **environment},
                                   start_new_session=True)  # fmt: skip
    try:
        _wait(url, process, log)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(url: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(STARTS_IN * 2):
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{url}/models", timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")


@contextmanager
def our_server(models: Path, log: Path) -> Iterator[str]:
    """`served.py` over a folder of models."""
    port = free_port()
    script = Path(__file__).with_name("served.py")
    with serving([sys.executable, str(script), str(models), str(port)], port, log) as url:
        yield url


@contextmanager
def transformers_serve(folder: Path, log: Path) -> Iterator[str]:
    """transformers' own server over a model; it takes the model's path for its name."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--host", "127.0.0.1",
               "--port", str(port), "--device", "cpu"]  # fmt: skip
    with serving(command, port, log, HF_HUB_OFFLINE="1") as url:
        yield url
