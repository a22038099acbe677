"""Is this machine ready? Each check says what it found and, where something is wrong, what to do."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sicog_exp.hub import silence

MINIMUM_DISK_GB = 5
MINIMUM_MEMORY_GB = 4
TIMEOUT = 3
"""Seconds to wait for an answer from a tracking server."""


@dataclass(frozen=True)
class Finding:
    """What one check found. `advice` is what to do, empty where nothing needs to be done; `wrong` stops a run."""

    name: str
    found: str
    advice: str = ""
    wrong: bool = False


def packages() -> Iterator[Finding]:
    """The project's requirements against what is installed."""
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in requires("sicog-exp") or ()]
    bad = []
    for requirement in (r for r in wanted if not r.marker or r.marker.evaluate({"extra": ""})):
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            bad.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            bad.append(f"{requirement.name} {installed}, needed {requirement.specifier}")
    advice = "pip install -e . in a fresh environment" if bad else ""
    yield Finding("packages", "; ".join(bad) or "all requirements are met", advice, bool(bad))
    yield Finding("python", platform.python_version())


def devices() -> Iterator[Finding]:
    """GPUs and CPU cores that torch sees."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Finding("GPU", ", ".join(gpus) or "none: the embedded recipes need none")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("CPU", f"{cores} cores", "" if cores > 1 else "set model.threads=1")


def room() -> Iterator[Finding]:
    """Disk where the step store lies, and memory."""
    import psutil

    free = shutil.disk_usage(Path.cwd()).free / 1e9
    low = free < MINIMUM_DISK_GB
    yield Finding("disk", f"{free:.0f} GB free in {Path.cwd()}", f"free {MINIMUM_DISK_GB} GB" if low else "", low)
    memory = psutil.virtual_memory().available / 1e9
    low = memory < MINIMUM_MEMORY_GB
    yield Finding("memory", f"{memory:.0f} GB available", f"free {MINIMUM_MEMORY_GB} GB" if low else "", low)


def tracking() -> Iterator[Finding]:
    """Whether MLflow's store answers."""
    from sicog_exp.recipe import TrackingConfig
    from sicog_exp.tracking import connect

    uri = os.environ.get("MLFLOW_TRACKING_URI") or TrackingConfig().uri
    if uri == TrackingConfig().uri and not Path(uri.removeprefix("sqlite:///")).exists():
        yield Finding("tracking", f"{uri}, made by the first run")
        return
    # A server that is down is said so now, not after minutes of trying again.
    os.environ.update(MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", MLFLOW_HTTP_REQUEST_TIMEOUT=str(TIMEOUT))
    try:
        experiments = len(connect(TrackingConfig()).search_experiments())
    except Exception as error:
        yield Finding("tracking", f"{uri}: {error}", "start the server, or unset MLFLOW_TRACKING_URI", wrong=True)
    else:
        yield Finding("tracking", f"{uri}, {experiments} experiments")


def hub() -> Iterator[Finding]:
    """Whether models and data sets can be downloaded; the embedded recipes need none."""
    from huggingface_hub import constants

    silent = silence()
    advice = "name models and data by folder; the embedded recipes need nothing from outside" if silent else ""
    yield Finding("model hub", silent or f"{constants.ENDPOINT} answers", advice)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (packages, devices, room, tracking, hub)


def examine(console: Console) -> bool:
    """Run all checks and print them; True when a run can start."""
    table = Table(title="sicog doctor")
    for column in ("", "check", "found", "what to do"):
        table.add_column(column)
    findings = [finding for check in CHECKS for finding in check()]
    for finding in findings:
        mark = "✗" if finding.wrong else "!" if finding.advice else "✓"
        table.add_row(mark, finding.name, finding.found, finding.advice)
    console.print(table)
    return not any(finding.wrong for finding in findings)
