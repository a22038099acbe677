"""No step holds a whole data set or pool: what Python and numpy allocate stays far below the size of the rows.

Rows that are read or written together are a constant, which is made small here, and rows are long, so that few of them
tell a stream from a list. Every bound is a fraction of what a list of the same rows takes.
"""

from __future__ import annotations

import gc
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sicog_exp import cleandata, records
from sicog_exp.cleandata import QUESTIONS, CleanTask
from sicog_exp.curation import contamination, spool
from sicog_exp.curation.contamination import Question, picture_of
from sicog_exp.curation.diagnosis import diagnose, read_truth
from sicog_exp.data.sources import build_dataset
from sicog_exp.evaluation import contents
from sicog_exp.generation.engine import Request
from sicog_exp.generation.pool import merge
from sicog_exp.generation.requests import keys_of
from sicog_exp.preferences import PairsTask, make_pairs
from sicog_exp.prompts import prompt
from sicog_exp.recipe import CurationConfig, DataConfig, load
from sicog_exp.records import Candidate, Record, conversation, write_jsonl, write_records
from sicog_exp.reporting import collect, export
from sicog_exp.store import Artifact, Workplace
from sicog_exp.training.preference import read_pairs

ROWS, PICTURES, ITEMS = 800, 200, 150
TEXT = "A red dog sits on the left of a blue house under a tree, and a yellow car stands in front of it. " * 25
LONG = "read the sign at the door of the old mill beside the river and say who may enter it after dark"


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "ROWS_PER_GROUP", 16)
    monkeypatch.setattr(records, "ROWS_READ", 16)
    monkeypatch.setattr(spool, "TOGETHER", 16)
    monkeypatch.setattr(cleandata, "DECODED", 8)
    monkeypatch.setattr(contamination, "ROWS_PER_BATCH", 8)
    monkeypatch.setattr(contamination, "PAIRS_PER_BATCH", 8)


def peak_mb(run: Callable[[], object]) -> float:
    """Of what is allocated while something runs."""
    gc.collect()
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def artifact(folder: Path) -> Artifact:
    return Artifact(folder, {"fingerprint": folder.name}, True)


def place(folder: Path) -> Workplace:
    folder.mkdir()
    return Workplace(folder, folder)


def record(i: int) -> Record:
    shown = (f"images/{i % PICTURES:04d}.png",)
    messages = conversation(prompt("direct", f"What is {i}?"), f"{TEXT}{i}", shown)
    return Record(f"r{i:06d}", messages, shown, "direct", "instruction")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of ROWS instruction rows, 2.5 MB as a list, about PICTURES pictures, 1.4 MB as thumbnails."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (PICTURES, 12, 12, 3), np.uint8)
    for i, one in enumerate(pixels):
        Image.fromarray(one).save(folder / f"images/{i:04d}.png")
    write_records(folder / "instruction.parquet", map(record, range(ROWS)))
    return folder


def test_a_list_of_these_rows_is_large(data: Path) -> None:
    """Without which no other test here would say anything."""
    assert peak_mb(lambda: records.read_records(data / "instruction.parquet")) > 2.2


def test_the_contamination_check(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = picture_of(Image.open(data / "images/0000.png").convert("RGB"))
    held = contents.Contents([Question("task", "1", "What is it?", "a dog", ("one",))], {"one": first})
    monkeypatch.setattr(contents, "read_contents", lambda *_: held)
    monkeypatch.setattr(cleandata, "load_suite", lambda _: None)
    out = place(tmp_path / "out")
    assert peak_mb(lambda: cleandata.check("suite", data, out, 10**6)) < 3
    assert out.facts == {"samples": ROWS, "overlapping": ROWS // PICTURES}


def test_the_check_of_self_generated_rows(data: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / QUESTIONS, [{**vars(Question("task", "1", LONG, "the miller")), "images": []}])
    (tmp_path / "self.parquet").symlink_to(data / "instruction.parquet")
    inputs, out = {"checked": artifact(tmp_path), "curated": artifact(tmp_path)}, place(tmp_path / "out")
    assert peak_mb(lambda: cleandata._check_self({}, inputs, out)) < 0.8
    assert out.facts == {"samples": ROWS, "overlapping": 0}


def test_a_copy_without_some_rows(data: Path, tmp_path: Path) -> None:
    """Ids are held, since they must be unique."""
    task, out = CleanTask({"instruction.parquet": ["r000007"]}), place(tmp_path / "out")
    assert peak_mb(lambda: cleandata._copy_without(task, {"source": artifact(data)}, out)) < 1
    assert len(records.RecordFile(out.directory / "instruction.parquet")) == ROWS - 1


def test_the_rows_of_an_export(data: Path, tmp_path: Path) -> None:
    rows, folder = records.RecordFile(data / "instruction.parquet"), tmp_path / "out"
    assert peak_mb(lambda: export.write_self_data(rows, folder)) < 0.8
    assert peak_mb(lambda: export.copy_images(rows, data, folder)) < 0.8
    assert len(json.loads((folder / export.LLAVA).read_text())) == ROWS


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set and a curation of ITEMS questions with four candidates each: 1.8 MB as rows."""
    folder = tmp_path_factory.mktemp("curated")
    ids = [f"u{i:05d}" for i in range(ITEMS)]
    asked = [Record(id, conversation(prompt("cot", f"What is {id}?"), None, ()), (), "cot", "unlabeled") for id in ids]
    write_records(folder / "unlabeled.parquet", asked)
    said = [{"kind": "direct", "text": f"{TEXT}{k}", "finish_reason": "stop"} for k in range(4)]
    chosen = {"chosen": said[3]["text"], "chosen_kind": "direct", "score": 0.9, "kept": True, "reason": None}
    row = {"kind": "reasoning", "prompt": "What is it?", "image": None}
    write_jsonl(folder / "curated.jsonl", ({"id": id, **row, **chosen} for id in ids))
    write_jsonl(folder / "pool.jsonl", ({"id": id, **row, "candidates": said} for id in ids))
    write_jsonl(folder / "scores.jsonl", ({"id": id, "position": k, "kind": "direct", "score": k / 4, "reason": None}
                                          for id in ids for k in range(4)))  # fmt: skip
    write_jsonl(folder / "truth.jsonl", ({"id": id, "answer": TEXT, "family": "what"} for id in ids))
    trained = (Record(f"{id}:direct", conversation("What?", TEXT, ()), (), "direct", "self") for id in ids)
    write_records(folder / "self.parquet", trained)
    return folder


def test_a_pool_of_candidates(tmp_path: Path) -> None:
    asked = [Request(f"u{i}", "cod", (), (), 4) for i in range(ITEMS)]
    keys = (key for request in reversed(asked) for key in keys_of(request))
    drawn = (Candidate(*key, f"{TEXT}{key}", 0, -1.0, 9, "stop") for key in keys)
    assert peak_mb(lambda: merge(asked, drawn, tmp_path / "candidates.jsonl")) < 0.8
    assert len(list(records.read_jsonl(tmp_path / "candidates.jsonl"))) == 4 * ITEMS


def test_preference_pairs(curated: Path, tmp_path: Path) -> None:
    inputs, out = {"items": artifact(curated), "curated": artifact(curated)}, place(tmp_path / "out")
    task = PairsTask(CurationConfig(), "low_score")
    assert peak_mb(lambda: make_pairs(task, inputs, out)) < 0.8
    assert out.facts == {"samples": ITEMS, "pairs": ITEMS}
    assert len(read_pairs(out.directory, ("direct",))) == ITEMS


def test_what_a_report_reads(curated: Path) -> None:
    recipe, lineage = load("tests/tiny.yaml", []), SimpleNamespace(data=artifact(curated), curated=[artifact(curated)])
    assert peak_mb(lambda: diagnose(curated, curated)) < 0.5
    assert peak_mb(lambda: collect._gallery(recipe, lineage)) < 0.7
    truths = read_truth(curated)
    assert (truths["u00007"].family, len(truths), "nobody" in truths) == ("what", ITEMS, False)


def test_a_data_set_of_a_user_s_files(data: Path, tmp_path: Path) -> None:
    """Unlabeled rows with long answers, in turn about the same pictures."""
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a dog"}]
    write_jsonl(tmp_path / "annotated.jsonl", ({"id": str(i), "image": f"images/{100 + i:04d}.png",
                                                "conversations": turns} for i in range(40)))  # fmt: skip
    write_jsonl(tmp_path / "asked.jsonl", ({"image": f"images/{i % 60:04d}.png", "question": f"What is {i}?",
                                            "answer": TEXT} for i in range(ROWS // 2)))  # fmt: skip
    config = DataConfig(source="own", annotated=str(tmp_path / "annotated.jsonl"), root=str(data),
                        unlabeled=str(tmp_path / "asked.jsonl"), unlabeled_images=0)  # fmt: skip
    assert peak_mb(lambda: build_dataset(config, tmp_path / "out")) < 0.8
    assert len(records.RecordFile(tmp_path / "out" / "unlabeled.parquet")) == ROWS // 2 + 60
