"""`sicog doctor`: what it finds here, and what it says where something is wrong."""

from __future__ import annotations

import io
from collections import namedtuple

import pytest
from rich.console import Console

from sicog_exp import doctor


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """In an empty folder, without a network and without a tracking server."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)


def told() -> tuple[bool, str]:
    output = io.StringIO()
    ready = doctor.examine(Console(file=output, width=200))
    return ready, output.getvalue()


def test_a_machine_that_runs_the_tests_is_ready() -> None:
    ready, printed = told()
    assert ready
    for name in ("packages", "python", "GPU", "CPU", "disk", "memory", "tracking", "model hub"):
        assert name in printed
    assert "all requirements are met" in printed
    assert "HF_HUB_OFFLINE" in printed


def test_a_full_disk_and_a_wrong_package_are_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(10, 9, 1e9))
    monkeypatch.setattr(doctor, "requires", lambda name: ["torch>=99", "no-such-package", "pytest; extra == 'dev'"])
    ready, printed = told()
    assert not ready
    assert "free 5 GB" in printed
    assert "no-such-package is missing" in printed
    assert "needed >=99" in printed


def test_a_tracking_store_that_does_not_answer_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "1")  # so that what the check sets is put back
    (finding,) = doctor.tracking()
    assert finding.wrong
    assert "MLFLOW_TRACKING_URI" in finding.advice
