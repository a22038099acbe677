"""Processes that a library starts under this one end with this one, also where kill -9 leaves it no last word."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

WATCHER = """
import os, select, signal, sys
owner, ward = (os.pidfd_open(int(pid)) for pid in sys.argv[1:])
if ward not in select.select([owner, ward], [], [])[0]:
    signal.pidfd_send_signal(ward, signal.SIGKILL)
"""
"""Waits for the first of two processes to end. It holds no pid, which the system may give to another meanwhile."""
INTERVAL = 0.1


@contextmanager
def children_end_with_us() -> Iterator[None]:
    """Children that `multiprocessing` starts in the meantime: seen while they start, which can take minutes."""
    known, done = {child.pid for child in multiprocessing.active_children()}, Event()
    thread = Thread(target=_watch_new, args=(known, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _watch_new(known: set[int | None], done: Event) -> None:
    last = False
    while not last:
        last = done.wait(INTERVAL)  # and look once more
        for child in multiprocessing.active_children():
            if child.pid not in known:
                known.add(child.pid)
                _watch(child.pid)


def _watch(pid: int | None) -> None:
    # in a session of its own: what is sent to our group, such as Ctrl-C, must not end the watcher first
    subprocess.Popen([sys.executable, "-I", "-S", "-c", WATCHER, str(os.getpid()), str(pid)], start_new_session=True)
