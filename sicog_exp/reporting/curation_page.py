"""`sicog curation`: the thresholds of a finished pool moved after the fact, as a table, a page or JSON.

A pool is a folder that curation wrote, here or in the step store, or what a run keeps of its own with itself in MLflow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sicog_exp.curation.calibration import (
    DRAWN,
    Bounds,
    Calibration,
    Drawn,
    Level,
    calibrate,
    encoder_agreement,
    read_pools,
)
from sicog_exp.curation.curate import Group
from sicog_exp.curation.diagnosis import Truth, Truths, read_truth, truth_of
from sicog_exp.curation.similarity import build_encoder
from sicog_exp.evaluation.statistics import RESAMPLES, interval
from sicog_exp.recipe import TrackingConfig
from sicog_exp.records import read_jsonl
from sicog_exp.reporting import report
from sicog_exp.reporting.calibration_view import findings, proxies, view
from sicog_exp.reporting.side_by_side import ReportError, find_run, read_run
from sicog_exp.tracking import connect, generation_runs

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from rich.console import Console

WRITTEN = ("curated.jsonl", "scores.jsonl", "summary.json")
"""What makes a folder one of curation's."""
NO_THRESHOLD = "its candidates were chosen by the truth (an upper bound), so there is no threshold to move"
SELF_DATA = "self-data"
"""Where a generation's run keeps it."""


@dataclass(frozen=True)
class Iteration:
    """One pool."""

    title: str
    groups: tuple[Calibration, ...]


@dataclass(frozen=True)
class Found:
    """All pools of a source."""

    name: str
    iterations: tuple[Iteration, ...]


def read(source: str, candidates: Path | None = None, truth: Path | None = None, encoder: str = "") -> Found:
    """The pools of a curation folder, or of an MLflow run (named as for `sicog report`).

    `candidates` is the file that was curated and `truth` a file of true answers, for a folder that has neither with
    it. `encoder` is compared with the one that scored. Raises ReportError and CurationError.
    """
    folder = Path(source)
    if folder.is_dir():
        return _of_folder(folder, candidates, truth, encoder)
    if candidates or truth:
        raise ReportError(f"{source}: no folder; --candidates and --truth go with one that `sicog curate` wrote")
    return _of_run(source, encoder)


# A folder.


def _of_folder(folder: Path, candidates: Path | None, truth: Path | None, encoder: str) -> Found:
    missing = [name for name in WRITTEN if not (folder / name).is_file()]
    if missing:
        raise ReportError(f"{folder}: no {missing[0]} there; name a folder that `sicog curate` wrote, or a curate-... "
                          "folder of a step store")  # fmt: skip
    pool = candidates or (folder / "pool.jsonl" if (folder / "pool.jsonl").is_file() else None)
    groups = calibrated(folder, _truths(folder, truth), RESAMPLES, pool, encoder)
    if not groups:
        raise ReportError(f"{folder}: {NO_THRESHOLD}")
    return Found(folder.resolve().name, (Iteration("This pool", tuple(groups.values())),))


def _truths(folder: Path, given: Path | None) -> Mapping[str, Truth]:
    """Of a file of ours, or of the data artifact that a step's manifest names; empty where nothing is known."""
    if given:
        return _given_truths(given)
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return {}
    fingerprint = json.loads(manifest.read_text(encoding="utf-8"))["inputs"]["data"]
    homes = [home for home in folder.resolve().parent.glob(f"*data-{fingerprint}") if (home / "truth.jsonl").is_file()]
    return read_truth(homes[0]) if homes else {}


def _given_truths(file: Path) -> Mapping[str, Truth]:
    """Every row is looked at first, and read again when its item comes."""
    try:
        for row in read_jsonl(file):
            row["id"], truth_of(row)
        return Truths(file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(f"--truth {file}: {type(error).__name__} {error}; write a JSON object a line with id, answer "
                          "(or description, for captions) and optionally family") from None  # fmt: skip


def calibrated(curated: Path, truths: Mapping[str, Truth], resamples: int, candidates: Path | None,
               encoder: str = "") -> dict[Group, Calibration]:  # fmt: skip
    """The groups of a curation folder under every threshold. Where an embedding model scored, the lexical encoder,
    which costs nothing, is compared with it."""
    include_self = json.loads((curated / "summary.json").read_text(encoding="utf-8"))["config"]["include_self"]
    found: dict[Group, Calibration] = {}
    for group, pool in read_pools(curated, truths, candidates).items():
        made = calibrate(pool, bounds(resamples))
        second = encoder or ("lexical" if pool.encoder != "lexical" else "")
        found[group] = _with_encoder(made, pool.drawn, second, include_self)
    return found


def bounds(resamples: int) -> Bounds:
    """95% intervals of means from resampling images."""

    def of(values: Sequence[float], images: Sequence[str]) -> tuple[float, float]:
        found = interval(values, images, resamples)
        return found.low, found.high

    return of


def _with_encoder(found: Calibration, drawn: Sequence[Drawn], second: str, include_self: bool) -> Calibration:
    if not second or not found.encoder or second == found.encoder:
        return found
    agreement = encoder_agreement(drawn, found.encoder, build_encoder(second), include_self)
    return replace(found, encoders=agreement)


# A run.


def _of_run(source: str, encoder: str) -> Found:
    client: MlflowClient = connect(TrackingConfig())
    data, run = read_run(client, source), find_run(client, source)
    if data.upper_bound:
        raise ReportError(f"{source}: {NO_THRESHOLD}")
    if not data.calibration:
        raise ReportError(_why_nothing(client, run, bool(data.curation)))
    made = []
    for iteration, groups in enumerate(data.calibration):
        if encoder:
            drawn = read_drawn(_logged(client, run, iteration + 1))
            include_self = data.curation[iteration].include_self
            groups = {group: _with_encoder(one, [d for d in drawn if d.group == group], encoder, include_self)
                      for group, one in groups.items()}  # fmt: skip
        title = f"Candidates of G{iteration}, training data of G{iteration + 1}"
        made.append(Iteration(title, tuple(groups.values())))
    return Found(data.name, tuple(made))


def _why_nothing(client: MlflowClient, run: Run, curated: bool) -> str:
    id = run.info.run_id
    if not curated:
        return f"run {id} curated nothing: its generations were trained on annotated rows alone"
    known = generation_runs(client, run).values()
    folders = [child.data.params[name] for child in known if (name := "origin.curated") in child.data.params]
    return (f"run {id} keeps no sweep: an older version made it. Name its curation folders in the step store instead: "
            f"{', '.join(folders)}")  # fmt: skip


def _logged(client: MlflowClient, run: Run, generation: int) -> Path:
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    child = generation_runs(client, run)[generation]
    try:
        path = download_artifacts(run_id=child.info.run_id, artifact_path=f"{SELF_DATA}/{DRAWN}",
                                  tracking_uri=client.tracking_uri)  # fmt: skip
    except (MlflowException, OSError):
        raise ReportError(f"run {child.info.run_id} keeps no {DRAWN}, which --encoder compares; name the curation "
                          "folder in the step store instead") from None  # fmt: skip
    return Path(path)


def drawn_lines(curated: Path) -> str:
    """The texts that a second encoder compares, as the lines of a file for `read_drawn`."""
    pools = read_pools(curated, {}, curated / "pool.jsonl")
    rows = [asdict(drawn) for pool in pools.values() for drawn in pool.drawn]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_drawn(file: Path) -> list[Drawn]:
    return [Drawn(row["id"], row["group"], tuple(row["texts"]), tuple(row["scores"])) for row in read_jsonl(file)]


# Showing.


def write(found: Found, out: Path) -> None:
    """The page, one self-contained HTML file."""
    iterations = [
        {"title": one.title, "anchor": f"pool-{i}", "encoded": any(group.encoders for group in one.groups),
         "views": [view(group, f"{group.group}, {one.title}") for group in one.groups]}
        for i, one in enumerate(found.iterations)
    ]  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    report.write_page(report.draw("curation.html", name=found.name, iterations=iterations), out)


def to_json(found: Found) -> str:
    """Every figure as it is; shares are fractions."""
    return json.dumps(asdict(found), indent=1, ensure_ascii=False)


def show(found: Found, console: Console) -> None:
    """A table of every threshold and what it says, group by group."""
    for one in found.iterations:
        for group in one.groups:
            _show_group(f"{one.title}: {group.group}", group, console)


def _show_group(title: str, found: Calibration, console: Console) -> None:
    from rich.table import Table

    table = Table(title=title)
    for column in ("threshold", "kept", "keep rate", f"{found.quality_name}, %", "formats agree", "distinct-2",
                   "entropy", "words"):  # fmt: skip
        table.add_column(column, justify="right")
    for level in found.levels:
        today = level.threshold == found.threshold
        table.add_row(*_cells(level, " today" if today else ""), style="bold" if today else None)
    console.print(table)
    for text in (*findings(found), "Proxies for truth, which they are not:", *proxies(found)):
        console.print(text, highlight=False, markup=False)


def _cells(level: Level, mark: str) -> list[str]:
    found = level.precision
    precision = f"{100 * found.mean:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]" if found else "\N{EN DASH}"
    return [f"{level.threshold:.4g}{mark}", f"{level.kept:,}", report.percent(level.keep_rate), precision,
            report.percent(level.formats), report.percent(level.distinct_2), report.number(level.answer_entropy),
            report.number(level.mean_words)]  # fmt: skip
