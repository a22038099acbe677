"""SIGTERM, by which a cluster takes a machine back: what is finished is kept, the process ends, the same command
continues."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM
"""What a shell and SLURM see of a process that SIGTERM ended."""


class Terminated(BaseException):
    """SIGTERM arrived. No Exception: nothing that goes on after errors goes on after it."""


INTERRUPTIONS = (KeyboardInterrupt, Terminated)
"""What ends a run from outside, and is no failure of it."""


@contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM raises Terminated in the main thread, once: locks are freed and temporary files removed."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(signum: int, frame: FrameType | None) -> None:
    signal.signal(signum, signal.SIG_IGN)  # a second one would break off the cleaning up
    raise Terminated("stopped by SIGTERM; the same command continues")
