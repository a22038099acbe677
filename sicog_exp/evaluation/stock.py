"""lmms-eval's task files read as text: what a task is made of, without importing the harness, which takes seconds."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

LOCAL = ("parquet", "json", "csv", "text", "arrow", "pandas")
"""Values of `dataset_path` that read files of this machine."""
HUB_TIMEOUT = 3
"""Seconds to wait for the hub's answer."""
_NAME = re.compile(r"^task\s*:\s*[\"']?([\w.\-]+)[\"']?\s*(?:#.*)?$", re.MULTILINE)


class StockError(RuntimeError):
    """A task file that cannot be read; the message names it."""


class _Loader(yaml.SafeLoader):
    """Task files name functions of theirs; here the names are enough."""


_Loader.add_constructor("!function", lambda loader, node: node.value)


@dataclass(frozen=True)
class TaskData:
    """Where a task's documents come from. `path` is a data set of the hub, or a reader of `files` of this machine."""

    path: str
    config: str | None
    split: str
    login: bool
    """Whether the task asks the hub for them with an account's token."""
    files: tuple[Path, ...] = ()

    @property
    def on_hub(self) -> bool:
        return bool(self.path) and self.path not in LOCAL and not Path(self.path).exists()

    def __str__(self) -> str:
        return f"{self.path}{f', configuration {self.config}' if self.config else ''}, split {self.split}"


@cache
def stock_folder() -> Path:
    """lmms-eval's own tasks. Raises StockError where it is not installed."""
    found = importlib.util.find_spec("lmms_eval")
    if not found or not found.submodule_search_locations:
        raise StockError("lmms-eval is not installed: pip install -e . in a fresh environment")
    return Path(found.submodule_search_locations[0]) / "tasks"


def task_files(folder: Path) -> Mapping[str, Path]:
    """Task name -> its file, for every task file below a folder."""
    return {name: path for path in sorted(folder.rglob("*.yaml")) for name in _NAME.findall(_text(path))}


@cache
def _stock_files() -> Mapping[str, Path]:
    return task_files(stock_folder())


def find_task(name: str, folders: Sequence[Path] = ()) -> Path:
    """A task's file, in `folders` or else among lmms-eval's own. Raises StockError."""
    for files in (*map(task_files, folders), _stock_files()):
        if name in files:
            return files[name]
    where = "".join(f", nor in {folder}" for folder in folders)
    raise StockError(f"unknown task {name}: none of lmms-eval's own{where}")


def read_task(file: Path) -> dict[str, Any]:
    """A task file with what it includes, as lmms-eval merges them; functions are their names. Raises StockError."""
    try:
        values = yaml.load(_text(file), _Loader)
    except yaml.YAMLError as error:
        raise StockError(f"{file}: unreadable YAML, {' '.join(str(error).split())}; correct it there") from None
    if not isinstance(values, dict):
        raise StockError(f"{file}: holds no mapping; a task file has `key: value` lines")
    included = values.pop("include", None) or []
    merged: dict[str, Any] = {}
    for name in reversed([included] if isinstance(included, str) else included):
        merged |= read_task(Path(name) if Path(name).is_file() else file.parent / name)
    return merged | values


def task_data(file: Path) -> TaskData:
    """Where the documents of the task in `file` come from. Raises StockError."""
    task = read_task(file)
    given = task.get("dataset_kwargs")
    options = given if isinstance(given, dict) else {}
    split = str(task.get("test_split") or task.get("validation_split") or "")
    files = tuple(_resolved(Path(name), file.parent) for name in _flat(options.get("data_files")))
    login = bool(options.get("token"))
    return TaskData(str(task.get("dataset_path") or ""), task.get("dataset_name"), split, login, files)


def _flat(value: Any) -> Iterator[str]:
    """The paths in `data_files`: one, a list, or either by split; patterns and addresses are none."""
    if isinstance(value, str):
        if not any(sign in value for sign in "*?[") and "://" not in value:
            yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _flat(part)


def _resolved(path: Path, folder: Path) -> Path:
    """As lmms-eval takes it: beside the task file, or else from where the command runs."""
    return folder / path if (folder / path).exists() else path.absolute()


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StockError(f"{file}: {error}; lmms-eval cannot read this task file either") from None


# The hub.


def in_hub_cache(path: str) -> bool:
    """Whether something of a hub's data set was downloaded to this machine."""
    from datasets import config
    from huggingface_hub import constants

    downloaded = Path(constants.HF_HUB_CACHE) / f"datasets--{path.replace('/', '--')}"
    return downloaded.is_dir() or (Path(config.HF_DATASETS_CACHE) / path.replace("/", "___")).is_dir()


def hub_answers() -> bool:
    """Whether data sets can be downloaded now."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception:  # whatever its client raises: the answer is the same
        return False
    return True
