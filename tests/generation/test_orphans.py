from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import multiprocessing, sys, time
from sicog_exp.generation.orphans import children_end_with_us

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    with children_end_with_us():
        child = context.Process(target=time.sleep, args=(600,))
        child.start()
        print(child.pid, flush=True)
        time.sleep(1)
    {then}
"""


def started(folder: Path, method: str, then: str) -> tuple[subprocess.Popen, int]:
    script = folder / "owner.py"
    script.write_text(SCRIPT.format(then=then))
    owner = subprocess.Popen([sys.executable, str(script), method], stdout=subprocess.PIPE, text=True)
    assert owner.stdout
    return owner, int(owner.stdout.readline())


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int) -> bool:
    until = time.monotonic() + 20
    while runs(pid) and time.monotonic() < until:
        time.sleep(0.05)
    return not runs(pid)


@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.parametrize("wait", [0.7, 1.5], ids=["while it starts", "afterwards"])
def test_a_child_ends_with_a_killed_owner(tmp_path: Path, method: str, wait: float) -> None:
    owner, child = started(tmp_path, method, "time.sleep(600)")
    time.sleep(wait)
    assert runs(child)
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    assert gone(child)


def test_a_child_that_ended_is_no_concern(tmp_path: Path) -> None:
    owner, child = started(tmp_path, "spawn", "child.terminate(); child.join()")
    assert owner.wait(20) == 0
    assert gone(child)
