"""Records by position, on disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sicog_exp.data.table import Pairs, RecordTable, Subset
from sicog_exp.records import Record, conversation, read_records, write_records

LARGE = """
import sys
from pathlib import Path
from sicog_exp.data.mixture import ImageTensors, Mixture
from sicog_exp.recipe import ModelConfig, StageConfig
from sicog_exp.records import Record, conversation, write_records
from sicog_exp.store import Artifact
from sicog_exp.training.stages import TrainingTask, build_mixture

def own_memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("RssAnon"))

class Encoder:
    def example(self, messages, images, max_length):
        from sicog_exp.data.chat import Example
        return Example([len(messages[1].content)] * 400, [0] * 400)

home = Path(sys.argv[1])
said = "a red dog on a mat, " * 100
write_records(home / "instruction.parquet", [])
rows = (Record(f"r{i}", conversation("What?", said + str(i), ()), (), "direct", "annotated") for i in range(100_000))
write_records(home / "annotated.parquet", rows)
task = TrainingTask(StageConfig(max_length=512), ModelConfig(device="cpu"), {"annotated": 1.0}, 0)
before = own_memory()
mixture = build_mixture(task, {"data": Artifact(home, {}, True)}, Encoder(), home)
drawn = {mixture.row(slot).id for slot in range(20_000)}
assert len(drawn) == 20_000, len(drawn)
print(own_memory() - before)
"""


@pytest.fixture
def made(tmp_path: Path) -> list[Path]:
    for name, count in (("one", 5), ("none", 0), ("two", 3)):
        rows = [Record(f"{name}{i}", conversation("What?", "a dog", ()), (), "direct" if i % 2 else "text", name)
                for i in range(count)]  # fmt: skip
        write_records(tmp_path / f"{name}.parquet", rows)
    return [tmp_path / f"{name}.parquet" for name in ("one", "none", "two")]


def test_records_are_found_by_position(made: list[Path], tmp_path: Path) -> None:
    whole = [record for path in made for record in read_records(path)]
    for _ in range(2):  # made, and found
        table = RecordTable(made, tmp_path / "rows")
        assert [table[i] for i in range(len(table))] == whole
    assert table.files.tolist() == ["one"] * 5 + ["two"] * 3
    assert table.column("kind").tolist() == [record.kind for record in whole]
    assert table.ids(np.array([6, 0])) == ["two1", "one0"]


def test_parts_of_a_table(made: list[Path], tmp_path: Path) -> None:
    table = RecordTable(made, tmp_path / "rows")
    texts = Subset(table, np.flatnonzero(table.column("kind") == "text"))
    assert [record.id for record in texts] == texts.ids == ["one0", "one2", "one4", "two0", "two2"]
    last = texts.part([4, 1], lambda record: Record("new", record.messages, (), "text", "x"))
    assert ([record.id for record in last], last.ids) == (["new", "new"], ["two2", "one2"])
    assert len(texts.part([])) == 0
    one, other = Pairs(texts, last)[1]
    assert (one.id, other.id) == ("one2", "new")


def test_a_copy_that_was_broken_off_is_made_again(made: list[Path], tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "one.arrow.part").write_bytes(b"ARROW1 and no more")
    assert len(RecordTable(made, tmp_path / "rows")) == 8


def test_training_holds_no_data_set(tmp_path: Path) -> None:
    """Of 100,000 rows, 640 MB when tokenized, 20,000 are drawn: what is kept is the tokens of the last
    few thousand, some bytes a row, and what copying takes, which does not grow."""
    done = subprocess.run([sys.executable, "-c", LARGE, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 40
