"""Training on several devices: the step starts one process a device, waits, and reads what the first one reports.

torchrun starts the processes of a machine, SLURM's srun one torchrun on each machine of a job. Everything else of a run
stays in the one process that started: nothing waits in a collective while it samples, and a stage's memory is given
back with its processes. Files in scratch carry the task there and progress, facts and errors back.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sicog_exp.recipe import ModelConfig
from sicog_exp.store import Artifact, Workplace, free_memory

RANKS = "ranks"
"""Folder of scratch with the files below."""
JOB, PROGRESS, DONE, LOG, STOP = "job.json", "progress.json", "done.json", "log.txt", "stop"
LOOK_EVERY = 0.2
"""Seconds between looks at progress."""
PATIENCE = 600.0
"""Seconds that ranks have for their step and its checkpoint when they are asked to stop."""


class LaunchError(RuntimeError):
    """Training on several devices that failed; the message is the first rank's that said why."""


def launch(stage: str, task: Any, inputs: Mapping[str, Artifact], workplace: Workplace) -> None:
    """Run a stage of `training.rank` on all devices of `task.model`; the artifact is written by the first rank.

    Raises LaunchError. When this process is interrupted, the ranks write a checkpoint and end; when it dies, they die.
    """
    folder = _prepared(workplace.scratch / RANKS, stage, task, inputs, workplace.tracked_run)
    free_memory()  # what sampling held on the first device
    with (folder / LOG).open("w") as log:
        process = subprocess.Popen(command(task.model, folder), stdin=subprocess.PIPE, stdout=log, stderr=log,
                                   env=_environment(), start_new_session=True)  # fmt: skip
        try:
            _watch(process, folder, workplace)
        finally:
            _end(process, folder)
    if process.returncode or not (folder / DONE).exists():
        raise LaunchError(_failure(folder, process.returncode))
    done = json.loads((folder / DONE).read_text())
    workplace.add(**done["facts"])
    workplace.device = f"{task.model.ranks} x {done['device']}"


def _prepared(folder: Path, stage: str, task: Any, inputs: Mapping[str, Artifact], tracked_run: str) -> Path:
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    paths = {name: str(artifact.path) for name, artifact in inputs.items()}
    job = {"stage": stage, "task": asdict(task), "inputs": paths, "tracked_run": tracked_run}
    (folder / JOB).write_text(json.dumps(job))
    return folder


def command(model: ModelConfig, folder: Path) -> list[str]:
    """What starts the ranks of all machines."""
    run = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={model.devices}"]
    rank = ["-m", "sicog_exp.training.rank", str(folder)]
    if model.nodes == 1:
        return [*run, "--standalone", *rank]
    name = f"{os.environ.get('SLURM_JOB_ID', 'sicog')}-{os.getpid()}-{time.time_ns()}"
    meeting = ["--rdzv-backend=c10d", f"--rdzv-id={name}", f"--rdzv-endpoint={socket.gethostname()}:{_free_port()}"]
    srun = ["srun", f"--nodes={model.nodes}", f"--ntasks={model.nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    return [*srun, *run, f"--nnodes={model.nodes}", *meeting, *rank]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]


def _environment() -> dict[str, str]:
    """Ours, with the tracking store that this process uses; progress bars of libraries would fill the log."""
    tracked = {"MLFLOW_TRACKING_URI": sys.modules["mlflow"].get_tracking_uri()} if "mlflow" in sys.modules else {}
    return {**os.environ, **tracked, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def _watch(process: subprocess.Popen, folder: Path, workplace: Workplace) -> None:
    shown: Sequence[int] = ()
    while True:
        with suppress(subprocess.TimeoutExpired):
            process.wait(LOOK_EVERY)
        found = read_progress(folder)
        if found and found != shown and workplace.progress:
            workplace.progress(*found)
        shown = found
        if process.poll() is not None:
            return


def read_progress(folder: Path) -> Sequence[int]:
    """(done, total) steps, empty before the first."""
    file = folder / PROGRESS
    return json.loads(file.read_text()) if file.exists() else ()


def write_whole(file: Path, value: Any) -> None:
    """As JSON, never half of it to a reader."""
    temporary = file.with_suffix(".part")
    temporary.write_text(json.dumps(value))
    temporary.replace(file)


def _end(process: subprocess.Popen, folder: Path) -> None:
    """Where ranks still run, this process was interrupted: they stop behind their step, or when patience is over."""
    if process.poll() is None:
        (folder / STOP).touch()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
    assert process.stdin
    process.stdin.close()  # ranks that lost torchrun end now
    process.wait()


def _failure(folder: Path, code: int) -> str:
    said = sorted(folder.glob("error-*.txt"), key=lambda path: path.stat().st_mtime_ns)
    if said:
        return said[0].read_text()
    last = "\n".join((folder / LOG).read_text(errors="replace").splitlines()[-15:])
    return f"training on several devices ended with status {code} and no word of why; the last lines of " \
           f"{folder / LOG} are:\n{last}"
