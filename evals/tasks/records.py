"""Benchmarks made of this project's records, for any lmms-eval model.

The data come from the directory that the environment variable SICOG_DATA names (`images/`, `benchmark.parquet`,
`development.parquet`), except easy-vqa's official test split, which its package carries. lmms-eval runs this file once
per `!function` in a YAML, so what is slow stands behind `__getattr__`.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from sicog_exp.data.images import FORMATS, resolve
from sicog_exp.prompts import Kind, final_text, normalize_answer, prompt, question_of
from sicog_exp.records import IMAGE_PLACEHOLDER, Record, conversation, record_from, write_records

VARIABLE = "SICOG_DATA"


def __getattr__(name: str) -> dict[str, Any]:
    """`dataset_kwargs` of the task YAMLs; only the one that a YAML names is made."""
    if name in ("benchmark", "development"):
        return _parquet(_root() / f"{name}.parquet")
    if name == "easyvqa":
        return _parquet(_write_easyvqa())
    raise AttributeError(name)


def _root() -> Path:
    value = os.environ.get(VARIABLE)
    if not value:
        raise RuntimeError(f"set {VARIABLE} to a data set directory (images/, benchmark.parquet, development.parquet)")
    return Path(value)


def _parquet(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; does {VARIABLE} name a data set directory?")
    # A cache of its own for every load: the library's keys on path and time, and would outlive a rebuilt data set.
    return {"data_files": {"test": str(path)}, "cache_dir": str(_temporary())}


def _temporary() -> Path:
    folder = tempfile.mkdtemp(prefix="sicog-task-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def direct_text(doc: dict[str, Any]) -> str:
    """The record's own words, which the prompt table made; a question of another kind in the `direct` wording."""
    record = record_from(doc)
    return _words(record) if record.kind == "direct" else prompt("direct", _question(record))


def cot_text(doc: dict[str, Any]) -> str:
    return prompt("cot", _question(record_from(doc)))


def _question(record: Record) -> str:
    return question_of(record.kind, _words(record))


def _words(record: Record) -> str:
    if len(record.prompt) != 1:
        raise ValueError(f"record {record.id}: {len(record.prompt)} messages before the answer; a benchmark needs one")
    text = record.prompt[0].content
    for _ in record.images:
        text = text.removeprefix(IMAGE_PLACEHOLDER).removeprefix("\n")
    return text


def images(doc: dict[str, Any]) -> list[Image.Image]:
    return [_open(_root(), name) for name in doc["images"]]


def easyvqa_images(doc: dict[str, Any]) -> list[Image.Image]:
    return [_open(_easyvqa_root(), name) for name in doc["images"]]


def _open(root: Path, name: str) -> Image.Image:
    """Undecoded: our model takes the file's path from it, others decode it."""
    return Image.open(resolve(root, name), formats=FORMATS)


def target(doc: dict[str, Any]) -> str:
    """The answer inside the record's response."""
    record = record_from(doc)
    answer = final_text(record.kind, record.response) if record.response else None
    if answer is None:
        raise ValueError(f"record {record.id}: no answer to compare with")
    return answer


def direct_accuracy(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"accuracy": _correct("direct", doc, results[0])}


def cot_accuracy(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """A response that does not keep to the four steps has no answer, so it is wrong."""
    return {"accuracy": _correct("cot", doc, results[0])}


def _correct(kind: Kind, doc: dict[str, Any], response: str) -> float:
    answer = final_text(kind, response)
    return float(answer is not None and normalize_answer(answer) == normalize_answer(target(doc)))


def _easyvqa_root() -> Path:
    import easy_vqa

    return Path(easy_vqa.__file__).parent / "data" / "test" / "images"


def _write_easyvqa() -> Path:
    import easy_vqa

    path = _temporary() / "test.parquet"
    asked: dict[int, int] = {}
    records = []
    for question, answer, image in zip(*easy_vqa.get_test_questions(), strict=True):
        number = asked[image] = asked.get(image, -1) + 1
        files = (f"{image}.png",)
        messages = conversation(prompt("direct", question), answer, files)
        records.append(Record(f"{image}:q{number}", messages, files, "direct", "easyvqa", _family(question, answer)))
    write_records(path, records)
    return path


def _family(question: str, answer: str) -> str:
    if answer in ("yes", "no"):
        return "existence"
    return "color" if "color" in question else "shape"
