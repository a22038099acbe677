"""Rows of JSONL files by id: where they stand is remembered, what they say is read when asked for."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import numpy as np


class RowIndex:
    """Rows of files that this project wrote, joined by the id that stands under `key`, never by position.

    Memory grows by 48 bytes for every run of neighbouring rows of one id, whatever they say.
    """

    def __init__(self, files: Sequence[Path], key: str = "id") -> None:
        self._files, self._key = list(files), key
        self._front = re.compile(rb'\{"%b": ("(?:[^"\\]|\\.)*")' % key.encode())
        hashes, spans = array("q"), array("q")
        for number, file in enumerate(self._files):
            for id, start, end in self._runs(file):
                hashes.append(hash(id))
                spans.extend((number, start, end))
        found = np.array(hashes, np.int64)
        self._spans = np.array(spans, np.int64).reshape(-1, 3)
        self._order = np.argsort(found, kind="stable")
        self._hashes = found[self._order]
        self._firsts = np.sort(np.unique(found, return_index=True)[1])

    def _runs(self, file: Path) -> Iterator[tuple[str, int, int]]:
        """(id, start, end in bytes) of neighbouring lines of one id."""
        start = 0
        with file.open("rb") as stream:
            for id, lines in groupby(stream, self._id_of):
                end = start + sum(map(len, lines))
                yield id, start, end
                start = end

    def _id_of(self, line: bytes) -> str:
        """The line's id; where it stands in front, as it is written, the rest is not parsed."""
        front = self._front.match(line)
        return json.loads(front.group(1)) if front else json.loads(line)[self._key]

    def __len__(self) -> int:
        """Ids of all files."""
        return len(self._firsts)

    def __contains__(self, id: object) -> bool:
        return len(self._places(hash(id))) > 0

    def __iter__(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """(id, its rows in the order of files and lines), ids by their first mention."""
        with ExitStack() as stack:
            streams = {i: stack.enter_context(file.open("rb")) for i, file in enumerate(self._files)}
            for first in self._firsts.tolist():
                number, start, _ = self._spans[first].tolist()
                streams[number].seek(start)
                id = self._id_of(streams[number].readline())
                yield id, self._parsed(id, self._lines(id, streams))

    def rows(self, id: str) -> list[dict[str, Any]]:
        """The rows of one id in the order of files and lines; none of an unknown one."""
        return self._parsed(id, self.lines(id))

    def lines(self, id: str) -> list[bytes]:
        """The same, unread."""
        with ExitStack() as stack:
            numbers = set(self._spans[self._places(hash(id)), 0].tolist())
            return self._lines(id, {i: stack.enter_context(self._files[i].open("rb")) for i in numbers})

    def _places(self, hashed: int) -> Any:
        """The spans of an id, by its hash."""
        low, high = np.searchsorted(self._hashes, [hashed]), np.searchsorted(self._hashes, [hashed], "right")
        return self._order[low[0] : high[0]]

    def _lines(self, id: str, streams: Mapping[int, IO[bytes]]) -> list[bytes]:
        lines: list[bytes] = []
        for number, start, end in self._spans[self._places(hash(id))].tolist():
            streams[number].seek(start)
            lines += streams[number].read(end - start).splitlines()
        return lines

    def _parsed(self, id: str, lines: Sequence[bytes]) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in lines]
        if any(row[self._key] != id for row in rows):  # once in 2**64 pairs of ids
            raise RuntimeError(f"another id has the hash of {id!r}: run the command again, which hashes otherwise")
        return rows
