"""SIGTERM, as SLURM sends it, in training, evaluation, sampling and curation: the process ends with 143 and keeps what
it has, and the same command goes on to the artifacts of a run that nothing stopped."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from runs import arguments, outputs, start

from sicog_exp.evaluation.answers import ANSWERS

PATIENCE = 600.0
WHERE = {
    "training": "instruct-*.partial/scratch/seconds",
    "evaluation": f"evaluate-*.partial/scratch/{ANSWERS}",
    "sampling": "generate-*.partial/scratch/batch-*.jsonl",
    "curation": "curate-*.lock",
}
"""A file that shows what the run is at."""


def stopped_at(shown: str, command: list[str], folder: Path) -> str:
    """Start the command, send SIGTERM once there is such a file in the store; returns what it printed."""
    process = start(command, folder)
    deadline = time.monotonic() + PATIENCE
    while not any((folder / "store").glob(shown)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"no {shown}"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGTERM)
    printed, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGTERM, printed
    assert "stopped by SIGTERM" in printed
    assert "the same command continues" in printed
    assert "Traceback" not in printed
    return printed


@pytest.mark.timeout(3600)
def test_sigterm_anywhere_changes_nothing(tiny_model: Path, tiny_run: tuple[Path, str], tmp_path: Path) -> None:
    command = arguments(tiny_model, tmp_path / "store")
    assert "behind training step" in stopped_at(WHERE["training"], command, tmp_path)
    (checkpoint,) = (tmp_path / "store").glob("instruct-*.partial/scratch/step-*.ckpt")
    assert 1 <= int(checkpoint.stem.removeprefix("step-")) <= 8
    for where in ("evaluation", "sampling", "curation"):
        stopped_at(WHERE[where], command, tmp_path)
    whole, found = outputs(tiny_run[0] / "store"), outputs(tmp_path / "store")
    steps = {name.rpartition("-")[0] for name in found}
    assert {"instruct", "evaluate", "develop"} <= steps
    assert any(name.startswith("generate") for name in steps)
    assert found == {name: whole[name] for name in found}
