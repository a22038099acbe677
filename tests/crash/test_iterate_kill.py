"""kill -9 at random moments of `iterate`: the same command goes on and ends with the same artifacts.

SICOG_KILLS sets how many kills (default 4; the release check uses 20).
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from runs import arguments, finish, outputs, start

KILLS = int(os.environ.get("SICOG_KILLS", "4"))


@pytest.mark.timeout(3600)
def test_kill_minus_nine_at_random_moments_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    finish(arguments(tiny_model, tmp_path / "whole"), tmp_path)
    duration = time.monotonic() - started
    expected = outputs(tmp_path / "whole")
    assert len(expected) > 10

    command, moments = arguments(tiny_model, tmp_path / "killed"), random.Random(17)
    kills = 0
    while kills < KILLS:
        process = start(command, tmp_path)
        try:
            process.communicate(timeout=moments.uniform(0.1, 1.0) * duration)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
        else:  # it came through: this run must be right too, and the kills go on with a fresh store
            assert outputs(tmp_path / "killed") == expected
            shutil.rmtree(tmp_path / "killed")
    printed = finish(command, tmp_path)
    assert outputs(tmp_path / "killed") == expected
    assert "report.html" in printed
