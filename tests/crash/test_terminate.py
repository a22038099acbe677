"""SIGTERM, as SLURM sends it, in training, sampling and evaluation: the process ends with 143, keeps what it has, and
the same command ends with the artifacts of a run that nothing stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from runs import arguments, environment, finish, outputs, start

from sicog_exp.evaluation.answers import ANSWERS

SMALL = ("iterations=1", "evaluation.batch_size=1", "sampling.batch_size=1", "instruct.checkpoint_every=100",
         "develop.steps=2", "pretrain.steps=2", "instruct.steps=40")  # fmt: skip
PATIENCE = 300.0


def stopped_where(shown: str, command: list[str], folder: Path) -> str:
    """Start the command, send SIGTERM once a file that matches is there; returns what it printed."""
    process = start(command, folder)
    deadline = time.monotonic() + PATIENCE
    while not any(folder.glob(shown)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"no {shown}"
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGTERM)
    printed, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGTERM, printed
    assert "the same command continues" in printed
    assert "Traceback" not in printed
    return printed


def test_sigterm_anywhere_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    finish(arguments(tiny_model, tmp_path / "whole", *SMALL), tmp_path)
    command = arguments(tiny_model, tmp_path / "store", *SMALL)
    # a step's mark in its scratch once it works: the clock that its first progress writes, a shard, an answer
    printed = stopped_where("store/instruct-*.partial/scratch/seconds", command, tmp_path)
    assert "behind training step" in printed
    (checkpoint,) = (tmp_path / "store").glob("instruct-*.partial/scratch/step-*.ckpt")
    assert 1 <= int(checkpoint.stem.removeprefix("step-")) <= 40
    stopped_where("store/generate-*.partial/scratch/batch-*.jsonl", command, tmp_path)
    stopped_where(f"store/evaluate-*.partial/scratch/{ANSWERS}", command, tmp_path)
    finish(command, tmp_path)
    assert outputs(tmp_path / "store") == outputs(tmp_path / "whole")
    runs = mlflow_statuses(tmp_path)
    assert runs.count("KILLED") >= 3
    assert "RUNNING" not in runs


def mlflow_statuses(folder: Path) -> list[str]:
    code = "import mlflow; print(*(r.info.status for r in mlflow.search_runs(search_all_experiments=True, " \
           "output_format='list')))"  # fmt: skip
    command = [arguments(folder, folder)[0], "-c", code]
    return subprocess.run(command, env=environment(folder), capture_output=True, text=True, check=True).stdout.split()
