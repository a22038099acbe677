"""Batches that do not fit into memory: computed in halves, which give the same candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from sicog_exp.store import free_memory

Item = TypeVar("Item")
Result = TypeVar("Result")


class MemoryShortage(RuntimeError):
    """Not even a batch of one fits."""


SHORTAGES = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Where torch says so in words alone: the processor's memory, a GPU's outside of torch's own, cuBLAS's workspace."""


class Halving:
    """Computes a sequence of items at once, or in parts where memory is short.

    A size that failed is not tried again. `halved` counts the failures.
    """

    def __init__(self, smaller: str, spare: Callable[[], bool] = lambda: False) -> None:
        """`smaller` says what a user can do where one item alone does not fit. `spare` lets go of what can be made
        again, and says whether there was any: then the same size is tried once more."""
        self.halved = 0
        self._smaller, self._spare = smaller, spare
        self._most: int | None = None

    def run(self, compute: Callable[[Sequence[Item]], Result], items: Sequence[Item]) -> list[Result]:
        """The results of all parts, in order: one of the whole where it fits. Raises MemoryShortage."""
        most = self._most
        if most and len(items) > most:
            return [result for at in range(0, len(items), most) for result in self.run(compute, items[at : at + most])]
        try:
            return [compute(items)]
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if not self._spare():
                self._note(len(items), error)
        # Behind the handler, whose traceback holds the failed attempt's tensors.
        free_memory()
        return self.run(compute, items)

    def _note(self, size: int, error: Exception) -> None:
        if size == 1:
            problem = f"out of memory with a batch of one ({_first_line(error)})"
            raise MemoryShortage(f"{problem}; {self._smaller}") from error
        if not self.halved:
            print(f"out of memory with a batch of {size}: going on with halves ({_first_line(error)})")
        self.halved += 1
        self._most = min(self._most or size, size // 2)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was short: torch has a class for most cases, and words for the others."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in SHORTAGES)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
