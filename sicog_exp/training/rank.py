"""One of the processes that train a stage together: `python -m sicog_exp.training.rank FOLDER`, started by torchrun.

`training.launch` says what the folder holds.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sicog_exp.interruption import EXIT_CODE, Terminated, terminable
from sicog_exp.recipe import build
from sicog_exp.store import Artifact, Workplace, peaks
from sicog_exp.training import preference, stages
from sicog_exp.training.launch import DONE, JOB, PROGRESS, write_whole

REPORT_EVERY = 0.5
"""Seconds between two notes of progress."""


def main(folder: Path) -> int:
    """Train this rank's share; what goes wrong is left in the folder in words."""
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    threading.Thread(target=_die_with_the_parent, daemon=True).start()
    job = json.loads((folder / JOB).read_text())
    workplace = Workplace(folder.parent.parent, folder.parent)
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
    if rank == 0:
        workplace.progress, workplace.tracked_run = _reporter(folder), job["tracked_run"]
    try:
        with terminable():
            run(job, workplace)
    except Terminated as stopped:
        (folder / f"error-{rank}.txt").write_text(str(stopped))
        return EXIT_CODE
    except Exception as error:
        ours = type(error).__module__.startswith("sicog_exp.")
        words = str(error) if ours else f"rank {rank} failed:\n{traceback.format_exc()}"
        (folder / f"error-{rank}.txt").write_text(words)
        raise
    if rank == 0:
        write_whole(folder / DONE, {"facts": {**workplace.facts, **peaks()}, "device": workplace.device})
    return 0


def run(job: Mapping[str, Any], workplace: Workplace) -> None:
    """The stage that the job names."""
    inputs = {name: Artifact(Path(path), {}, cached=True) for name, path in job["inputs"].items()}
    if job["stage"] == "prefer":
        preference.train(build(preference.PreferenceTask, job["task"]), inputs, workplace)
        return
    stages.train(job["stage"], stages.MixtureData(build(stages.TrainingTask, job["task"]), inputs), workplace)


def _reporter(folder: Path) -> Any:
    last = 0.0

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > REPORT_EVERY or done == total:
            last = time.monotonic()
            write_whole(folder / PROGRESS, [done, total])

    return report


def _die_with_the_parent() -> None:
    """The pipe behind standard input ends when the process that holds its other end does, however it ended."""
    if not stat.S_ISFIFO(os.fstat(0).st_mode):
        return  # an srun that hands no input on ends its tasks itself
    # not by sys.stdin, whose lock the interpreter would find taken at its end
    while os.read(0, 1):
        pass
    os._exit(EXIT_CODE)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
