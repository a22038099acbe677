"""Records by position, however many there are: they stay on disk, mapped into memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sicog_exp.records import ROWS_READ, Record, record_from


class RecordTable:
    """The records of Parquet files, the files in their order.

    Parquet has no way to one row but through its neighbours; so a copy of each file in Arrow's own format lies in
    `folder`, made unless it is there, and a record is read from it where it is asked for.
    """

    def __init__(self, paths: Sequence[Path], folder: Path) -> None:
        import pyarrow as pa

        parts = [_mapped(path, folder) for path in paths]
        self._rows = pa.concat_tables(parts)
        self.files: NDArray[np.str_] = np.repeat([path.stem for path in paths], [len(part) for part in parts])
        """The name of each record's file, without its ending."""

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, position: int) -> Record:
        return record_from(self._rows.slice(position, 1).to_pylist()[0])

    def column(self, name: str) -> NDArray[np.str_]:
        """A field of few short texts (kind, source) of all records."""
        return np.array(self._rows.column(name).to_pylist(), dtype=np.str_)

    def ids(self, positions: NDArray[np.int64]) -> list[str]:
        """The ids of the records at these positions."""
        return self._rows.column("id").take(positions).to_pylist()


def _mapped(path: Path, folder: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    copy, temporary = (folder / f"{path.stem}{ending}" for ending in (".arrow", ".arrow.part"))
    if not copy.exists():
        folder.mkdir(exist_ok=True)
        with pq.ParquetFile(path) as file, pa.ipc.new_file(temporary, file.schema_arrow) as writer:
            for batch in file.iter_batches(ROWS_READ):
                writer.write_batch(batch)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # what is found under its name is whole, even after a power cut
        temporary.rename(copy)
    return pa.ipc.open_file(pa.memory_map(str(copy))).read_all()


class Subset(Sequence[Record]):
    """Some records of a table, by position; `change` makes of each what is asked for."""

    def __init__(self, table: RecordTable, positions: NDArray[np.int64],
                 change: Callable[[Record], Record] | None = None) -> None:  # fmt: skip
        self.table, self.positions, self._change = table, positions, change

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: Any) -> Any:
        record = self.table[int(self.positions[index])]
        return self._change(record) if self._change else record

    @property
    def ids(self) -> list[str]:
        """The ids as they are in the table."""
        return self.table.ids(self.positions)

    def part(self, numbers: Sequence[int], change: Callable[[Record], Record] | None = None) -> Subset:
        """Those with these numbers."""
        return Subset(self.table, self.positions[np.array(numbers, np.int64)], change or self._change)


class Pairs(Sequence[tuple[Record, Record]]):
    """Two sequences of records side by side."""

    def __init__(self, chosen: Sequence[Record], rejected: Sequence[Record]) -> None:
        self._chosen, self._rejected = chosen, rejected

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: Any) -> Any:
        return self._chosen[index], self._rejected[index]
