"""CUDA graphs on a CPU: a step's operations, recorded with the memory that they read and write, and done again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sicog_exp.generation import drawing, fixed


class Recorder(TorchDispatchMode):
    """Every operation with the memory that it reads and writes, as a GPU captures them; what would wait is refused."""

    WAITS = ("item", "is_nonzero", "_local_scalar_dense", "nonzero", "unique", "_unique", "repeat_interleave",
             "masked_select", "bincount")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).removeprefix("aten.").startswith(self.WAITS):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result


class Replayed:
    """In place of a CUDA graph. Recording computes, where capturing does not, so the first replay has been computed."""

    made = 0

    def __init__(self) -> None:
        self.recorder, self.replays = Recorder(), 0

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, result in self.recorder.operations if self.replays > 1 else ():
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextmanager
def recorded(graph: Replayed, capture_error_mode: str) -> Iterator[None]:
    Replayed.made += 1
    with graph.recorder:
        yield


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's way: draws that wait for nothing, steps that are captured once and replayed. `Replayed.made` counts."""
    for module in (drawing, fixed):
        monkeypatch.setattr(module, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Replayed)
    monkeypatch.setattr(torch.cuda, "graph", recorded)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(Replayed, "made", 0)
