"""Stock tasks over local copies of their data: a derived task file each, scored by the stock functions.

The copies lie in one folder, a folder per data set named as on the hub (`OWNER/NAME`, or `NAME` alone) with the files
of the hub's repository in it: `CONFIGURATION/SPLIT-*.parquet`, `data/SPLIT-*.parquet`, or what its README.md declares.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from sicog_exp.evaluation import stock
from sicog_exp.evaluation.stock import TaskData
from sicog_exp.evaluation.suites import BenchmarkError, Suite, SuiteTask, evals_folder, load_suite

SUFFIXES = (".parquet", ".json", ".jsonl")
"""What a copy may be, the preferred first."""
ENDING = "_local"
"""Behind a stock task's name: lmms-eval never lets another task take the name itself."""


@dataclass(frozen=True)
class Local:
    """A stock task, its file, and the local files with its documents; none where the copy is missing."""

    task: SuiteTask
    file: Path
    data: TaskData
    found: tuple[Path, ...]

    @property
    def name(self) -> str:
        return self.task.task + ENDING


@dataclass(frozen=True)
class Mirror:
    """A suite's file, what its tasks read, and what a reader must know."""

    suite: Path
    tasks: tuple[Local, ...]
    notes: tuple[str, ...]


def mirror(name: str, source: Path, out: Path) -> Mirror:
    """Write `out/SUITE.yaml` and `out/SUITE/`, in which each stock task of the suite reads its copy in `source`.

    Tasks that read this machine already stay as they are. Every derived task is tried on its first document. A task
    that a judge scores and that lacks its copy is left out. Raises BenchmarkError naming each other missing data set.
    """
    suite = load_suite(name)
    wanted = [_local(task, source, suite) for task in (*suite.benchmark, *suite.development)]
    stocked = {one.task.task: one for one in wanted if one.data.on_hub}
    if not stocked:
        raise BenchmarkError(f"suite {name}: no task of it reads the hub; there is nothing to mirror")
    _check(list(stocked.values()), source)
    usable = {task: one for task, one in stocked.items() if one.found}
    notes = [f"left out: {one.task.task}, scored by a judge; no copy of {one.data}"
             for one in stocked.values() if not one.found]  # fmt: skip
    notes += _tried(list(usable.values()))
    folder = out.absolute() / Path(name).stem
    folder.mkdir(parents=True, exist_ok=True)
    for one in usable.values():
        _write(folder / f"{one.name}.yaml", _derived(one, one.found, out.absolute() / "cache"))
    _write(folder.with_suffix(".yaml"), _suite(suite, stocked, folder))
    return Mirror(folder.with_suffix(".yaml"), tuple(usable.values()), tuple(notes))


def _local(task: SuiteTask, source: Path, suite: Suite) -> Local:
    file = stock.find_task(task.task, [evals_folder() / "tasks", *map(Path, suite.include)])
    data = stock.task_data(file)
    return Local(task, file, data, copies(source, data) if data.on_hub else ())


def copies(source: Path, data: TaskData) -> tuple[Path, ...]:
    """The files of a data set's split below `source`, all of one kind; empty where there are none."""
    for folder in (source / data.path, source / Path(data.path).name):
        for files in (_declared(folder, data), _by_name(folder, data)):
            for suffix in SUFFIXES:
                kind = tuple(file.absolute() for file in files if file.suffix == suffix)
                if kind:
                    return kind
    return ()


def _declared(folder: Path, data: TaskData) -> list[Path]:
    """What the front matter of the data set's README.md names; where it names one configuration, that is the one."""
    configs = _front_matter(folder / "README.md").get("configs") or []
    fitting = [one for one in configs if one.get("config_name") == (data.config or "default")]
    chosen = fitting or (configs if len(configs) == 1 and not data.config else [])
    patterns = [pattern for one in chosen for pattern in _patterns(one.get("data_files"), data.split)]
    return sorted({file for pattern in patterns for file in _matching(folder, pattern)})


def _matching(folder: Path, pattern: Any) -> list[Path]:
    """A README is as foreign as the data: it names nothing outside of its folder. Raises BenchmarkError."""
    try:
        if ".." not in Path(pattern).parts:
            return list(folder.glob(pattern))
    except (TypeError, ValueError, NotImplementedError):
        pass
    raise BenchmarkError(f"{folder / 'README.md'}: its configs name {pattern!r}, which is no pattern of files in that "
                         "folder; correct it there, or download the data set again")  # fmt: skip


def _patterns(declared: Any, split: str) -> Iterator[str]:
    """`data_files` of a README: a list of {split, path}, or a mapping of splits."""
    if isinstance(declared, Mapping):
        declared = [{"split": name, "path": path} for name, path in declared.items()]
    for one in declared if isinstance(declared, list) else []:
        if isinstance(one, Mapping) and one.get("split") == split:
            paths = one.get("path")
            yield from [paths] if isinstance(paths, str) else paths or []


def _front_matter(readme: Path) -> dict[str, Any]:
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if not text.startswith("---"):
        return {}
    try:
        return yaml.safe_load(text.split("---", 2)[1]) or {}
    except (yaml.YAMLError, IndexError):
        return {}


def _by_name(folder: Path, data: TaskData) -> list[Path]:
    """Files named as the hub's tools name them, in the first place that has any."""
    places = [data.config] if data.config else ["data", "default", "."]
    for place in places:
        names = (f"{data.split}-*", f"{data.split}.*", f"{data.split}/*")
        found = sorted({file for name in names for file in (folder / place).glob(name) if file.is_file()})
        if found:
            return found
    return []


def _check(tasks: Sequence[Local], source: Path) -> None:
    missing = [one for one in tasks if not one.found and not one.task.judge]
    if missing:
        listed = "\n".join(f"  {one.task.task}: {one.data}" for one in missing)
        commands = "\n".join(f"  {line}" for line in dict.fromkeys(download(one.data, source) for one in missing))
        raise BenchmarkError(f"{source} has no copies for {len(missing)} of {len(tasks)} tasks:\n{listed}\nWhere there "
                             f"is a hub (and after `hf auth login`):\n{commands}")  # fmt: skip


def download(data: TaskData, source: Path) -> str:
    """The command that brings a data set to where `mirror` looks for it."""
    return f"hf download {data.path} --repo-type dataset --local-dir {source / data.path}"


def _derived(one: Local, files: Sequence[Path], cache: Path) -> dict[str, Any]:
    reader = "parquet" if files[0].suffix == ".parquet" else "json"
    options = {"data_files": {one.data.split: [str(file) for file in files]}, "cache_dir": str(cache)}
    return {"include": str(one.file), "task": one.name, "dataset_path": reader, "dataset_name": None,
            "dataset_kwargs": options}  # fmt: skip


def _suite(suite: Suite, stocked: Mapping[str, Local], folder: Path) -> dict[str, Any]:
    """The suite with the derived tasks in the places of the stock ones; values at their defaults are left out."""

    def written(task: SuiteTask) -> dict[str, Any]:
        one = stocked.get(task.task)
        named = asdict(replace(task, task=one.name) if one else task)
        return {field.name: named[field.name] for field in fields(task) if named[field.name] != field.default}

    splits = {"benchmark": suite.benchmark, "development": suite.development}
    kept = {split: [written(task) for task in tasks if task.task not in stocked or stocked[task.task].found]
            for split, tasks in splits.items()}  # fmt: skip
    return {"name": suite.name, **{split: tasks for split, tasks in kept.items() if tasks},
            "include": [*suite.include, str(folder)]}  # fmt: skip


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True), encoding="utf-8")


# The stock functions on the first document of each copy.


def _tried(tasks: Sequence[Local]) -> list[str]:
    """What is wrong with tasks that a judge scores, a sentence each. Raises BenchmarkError for the others."""
    from sicog_exp.evaluation.benchmarks import harness

    wrong: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="sicog-mirror-") as place:
        folder = Path(place)
        for one in tasks:
            first = _first_row(one.found[0], folder / f"{one.name}{one.found[0].suffix}")
            _write(folder / f"{one.name}.yaml", _derived(one, [first], folder / "cache"))
        with harness(folder, [one.name for one in tasks], [place]) as manager:
            for one in tasks:
                try:
                    _read_first(manager.load_task_or_group(one.name)[one.name])
                except Exception as error:  # a stock task's own code over somebody's file
                    wrong[one.task.task] = f"{one.task.task} over {one.found[0]}: {_cause(error)}"
    bad = [wrong[one.task.task] for one in tasks if one.task.task in wrong and not one.task.judge]
    if bad:
        raise BenchmarkError("stock tasks cannot read the first document of their copies:\n  " + "\n  ".join(bad) +
                             "\nCompare the columns with the hub's; copy its files as they are")  # fmt: skip
    return list(wrong.values())


def _read_first(task: Any) -> None:
    document = task.eval_docs[0]
    task.doc_to_text(document)
    for visual in task.doc_to_visual(document) or ():
        visual.load()


def _cause(error: BaseException) -> str:
    """The harness tries again and again; what counts is what it met the last time."""
    attempt = getattr(error, "last_attempt", None)
    error = (attempt.exception() if attempt else None) or error
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _first_row(file: Path, out: Path) -> Path:
    """A file of the same kind with its first document alone, Parquet with the schema's metadata (what is a picture)."""
    if file.suffix != ".parquet":
        return file
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as rows:
        first = next(rows.iter_batches(batch_size=1), None)
        if first is None:
            raise BenchmarkError(f"{file}: no rows; download it again")
        pq.write_table(pa.Table.from_batches([first], schema=rows.schema_arrow), out)
    return out
