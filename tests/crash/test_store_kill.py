"""kill -9 at random moments of a chain of steps: the same command continues, and ends with the same checksums."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from sicog_exp.store import Store, checksums

KILLS = 10
CHAIN = """
import sys, time
from sicog_exp.store import Step, Store

def first(config, inputs, workplace):
    # a checkpoint of one number, written atomically; one line a count
    checkpoint = workplace.scratch / "count"
    done = int(checkpoint.read_text()) if checkpoint.exists() else 0
    while done < config["count"]:
        done += 1
        time.sleep(0.004)
        (workplace.scratch / "count.tmp").write_text(str(done))
        (workplace.scratch / "count.tmp").rename(checkpoint)
    (workplace.directory / "sum.txt").write_text(str(sum(range(done + 1))))
    for i in range(20):
        (workplace.directory / f"part{i}.bin").write_bytes(bytes([i]) * 1000)

def second(config, inputs, workplace):
    total = int((inputs["x"] / "sum.txt").read_text())
    (workplace.directory / "double.txt").write_text(str(2 * total))
    time.sleep(0.02)

store = Store(sys.argv[1])
artifact = store.run(Step("first", first, {"count": 40}))
for i in range(4):
    artifact = store.run(Step("first", first, {"count": 20 + i}, {"x": artifact}))
    artifact = store.run(Step("second", second, {"i": i}, {"x": artifact}))
    artifact = store.run(Step("first", first, {"count": 10}, {"x": artifact}))
"""


def outputs(root: Path) -> dict[str, dict[str, str]]:
    return {path.name: checksums(path) for path in root.iterdir() if path.is_dir()}


def run(root: Path, kill_after: float | None = None) -> int:
    process = subprocess.Popen([sys.executable, "-c", CHAIN, str(root)], stdout=subprocess.PIPE)
    if kill_after is not None:
        try:
            process.wait(timeout=kill_after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
    process.communicate(timeout=120)
    return process.returncode


def test_ten_kills_end_with_the_checksums_of_an_undisturbed_run(tmp_path: Path) -> None:
    started = time.monotonic()
    assert run(tmp_path / "whole") == 0
    length = time.monotonic() - started
    wanted = outputs(tmp_path / "whole")
    rng = random.Random(3)
    killed = rounds = 0
    while killed < KILLS:
        root = tmp_path / f"killed{rounds}"
        rounds += 1
        assert rounds <= KILLS, "the machine is too uneven: most runs ended before they were killed"
        while run(root, rng.uniform(0.1, 0.9) * length) != 0:
            killed += 1
            # What stands under a final name is whole, whenever the kill came.
            finished = [path for path in root.glob("*") if path.is_dir() and path.suffix != ".partial"]
            assert all(Store(root).check(path.name) for path in finished)
        assert outputs(root) == wanted
