"""A stream that is read more than once and never held in memory."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import Generic, TypeVar

from sicog_exp.curation.similarity import batched

T = TypeVar("T")

TOGETHER = 256
"""Things pickled together, so that texts they share are written once."""


class Spool(Generic[T]):
    """The things of a stream, kept in a file without a name that only this process can open; one reader at a time.

    `folder` is where the file lies: the disk must hold the stream once more.
    """

    def __init__(self, stream: Iterable[T], folder: Path | None = None) -> None:
        self._file = TemporaryFile(dir=folder)  # noqa: SIM115 - closed with the spool
        for batch in batched(stream, TOGETHER):
            pickle.dump(batch, self._file, protocol=pickle.HIGHEST_PROTOCOL)

    def __enter__(self) -> Spool[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[T]:
        end = self._file.seek(0, 2)
        self._file.seek(0)
        while self._file.tell() < end:
            yield from pickle.load(self._file)
