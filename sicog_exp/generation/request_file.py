"""Requests in a file: a step asks for more of them than memory should hold."""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import overload

from sicog_exp.generation.engine import Request


class RequestFile(Sequence[Request]):
    """The requests of a stream, 8 bytes of memory each, for one thread; the file has no name, so that only this process
    can read it and a killed one leaves nothing behind. `folder` is where it lies."""

    def __init__(self, requests: Iterable[Request], folder: Path) -> None:
        self._file = TemporaryFile(dir=folder)  # noqa: SIM115 - closed with this
        self._starts = array("q")
        for request in requests:
            self._starts.append(self._file.tell())
            pickle.dump(request, self._file, protocol=pickle.HIGHEST_PROTOCOL)

    def __enter__(self) -> RequestFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Request]:
        return map(self._read, self._starts)

    @overload
    def __getitem__(self, index: int) -> Request: ...
    @overload
    def __getitem__(self, index: slice) -> list[Request]: ...
    def __getitem__(self, index: int | slice) -> Request | list[Request]:
        return [self._read(start) for start in self._starts[index]] if isinstance(index, slice) else \
            self._read(self._starts[index])  # fmt: skip

    def _read(self, start: int) -> Request:
        self._file.seek(start)
        return pickle.load(self._file)
