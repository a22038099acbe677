"""Run the command line in a process of its own, as a user does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def arguments(model: Path, store: Path, *overrides: str) -> list[str]:
    """`sicog iterate` of the tiny recipe."""
    given = [f"model.base={model}", f"store={store}", *overrides]
    return [sys.executable, "-m", "sicog_exp.cli", "iterate", "tests/tiny.yaml", *given]


def environment(folder: Path) -> dict[str, str]:
    """One thread, offline, and a tracking store in `folder`."""
    # `mlflow run --env-manager=local` starts the first python on the path, as in an activated environment.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "OMP_WAIT_POLICY": "PASSIVE", "COLUMNS": "160",
           "PATH": path}  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    return {**kept, **own}


def start(command: list[str], folder: Path) -> subprocess.Popen:
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment(folder), text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip


def finish(command: list[str], folder: Path) -> str:
    """Run to the end; returns what it printed."""
    process = start(command, folder)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def outputs(store: Path) -> dict[str, dict[str, str]]:
    """Checksums of every step's outputs, the run's own summary (which holds times) left out."""
    manifests = sorted(store.glob("*/manifest.json"))
    read = {path.parent.name: json.loads(path.read_text())["outputs"] for path in manifests}
    return {name: value for name, value in read.items() if not name.startswith("iterate")}


def start_sweep(study: Path, folder: Path) -> subprocess.Popen:
    """One worker of a study."""
    return start([sys.executable, "-m", "sicog_exp.cli", "sweep", str(study)], folder)
