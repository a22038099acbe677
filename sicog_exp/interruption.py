"""SIGTERM, by which a cluster takes a machine back: what is finished is kept, the process ends, the same command
continues."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM
"""What a shell and SLURM see of a process that SIGTERM ended."""
MESSAGE = "stopped by SIGTERM; the same command continues"
_asked = False
"""Whether SIGTERM arrived inside `terminable`."""


class Terminated(BaseException):
    """SIGTERM arrived. No Exception: nothing that goes on after errors goes on after it."""


INTERRUPTIONS = (KeyboardInterrupt, Terminated)
"""What ends a run from outside, and is no failure of it."""


@contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM raises Terminated in the main thread, once: locks are freed and temporary files removed."""
    global _asked
    _asked = False
    before, report = signal.signal(signal.SIGTERM, _terminate), sys.unraisablehook
    sys.unraisablehook = lambda dropped: None if dropped.exc_type is Terminated else report(dropped)  # see `check`
    try:
        yield
    finally:
        _asked, sys.unraisablehook = False, report
        signal.signal(signal.SIGTERM, before)


def check() -> None:
    """Raise Terminated where SIGTERM arrived and was not heard: Python drops what is raised while it gives up a
    generator or an object. The store asks at every step and whenever one advances."""
    if _asked:
        raise Terminated(MESSAGE)


def _terminate(signum: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True
    signal.signal(signum, signal.SIG_IGN)  # a second one would break off the cleaning up
    raise Terminated(MESSAGE)
