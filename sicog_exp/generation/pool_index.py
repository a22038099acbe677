"""Candidates of several pools, item by item: where they stand is remembered, what they say is read when asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

FRONT = re.compile(rb'\{"sample_id": ("(?:[^"\\]|\\.)*")')


class PoolIndex:
    """Pool files joined by sample id, never by position (paper.md, defects).

    Memory grows with the samples by about 0.4 kB each, not with the length of their candidates.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = list(files)
        self._spans: dict[str, list[tuple[int, int, int]]] = {}
        for number, file in enumerate(self._files):
            self._read(number, file)

    def _read(self, number: int, file: Path) -> None:
        """Note (file, start, end) of each sample's neighbouring lines, in bytes."""
        start = 0
        with file.open("rb") as stream:
            for line in stream:
                spans = self._spans.setdefault(_sample_of(line), [])
                end = start + len(line)
                if spans and spans[-1][0] == number and spans[-1][2] == start:
                    spans[-1] = number, spans[-1][1], end
                else:
                    spans.append((number, start, end))
                start = end

    def __len__(self) -> int:
        """Samples of all files."""
        return len(self._spans)

    def __iter__(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """(sample id, its candidates in the order of files and lines), samples by their first mention."""
        with ExitStack() as stack:
            streams = [stack.enter_context(file.open("rb")) for file in self._files]
            for sample_id, spans in self._spans.items():
                lines: list[bytes] = []
                for number, start, end in spans:
                    streams[number].seek(start)
                    lines += streams[number].read(end - start).splitlines()
                yield sample_id, [json.loads(line) for line in lines]


def _sample_of(line: bytes) -> str:
    """The line's sample id; where it stands in front, as pools are written, the rest is not parsed."""
    front = FRONT.match(line)
    return json.loads(front.group(1)) if front else json.loads(line)["sample_id"]
