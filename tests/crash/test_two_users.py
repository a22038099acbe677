"""Two users, and two processes at once, on one store: each step is made once, and both read it."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from runs import REPOSITORY

NOBODY = 65534
USER = """
import os, sys, time
from importlib.metadata import metadata
from sicog_exp.store import Step, Store
metadata("torch")  # all code is read before it may no longer be, in a home of root's
uid, gid, root, kill = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "killed"
if uid:
    os.setgroups([gid]); os.setgid(gid); os.setuid(uid)
os.umask(0o022)

def first(config, inputs, workplace):
    done = workplace.scratch / "shard"
    if not done.exists():
        done.write_text(str(os.getuid()))
        workplace.progress(1, 2)
        if kill:
            os.kill(os.getpid(), 9)
        time.sleep(0.3)
    with done.open("a") as file:
        file.write(" and " + str(os.getuid()))
    made = workplace.directory / "text.txt"
    made.write_text("made once")
    made.chmod(0o600)   # as some libraries leave their files

def second(config, inputs, workplace):
    (workplace.directory / "longer.txt").write_text((inputs["text"] / "text.txt").read_text() + ", read by all")

store = Store(root)
one = store.run(Step("first", first, {}))
two = store.run(Step("second", second, {}, {"text": one}))
print(one.cached, two.cached, (two / "longer.txt").read_text())
"""


def user(root: Path, uid: int, gid: int, then: str = "") -> subprocess.Popen:
    command = [sys.executable, "-c", USER, str(uid), str(gid), str(root), then]
    place = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, env=place, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finished(*processes: subprocess.Popen) -> list[str]:
    ended = [process.communicate(timeout=120) for process in processes]
    assert all(process.returncode == 0 for process in processes), ended
    return [printed.splitlines()[-1] for printed, _ in ended]


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder as docs/cluster.md says: its group may write, and what is made in it stays the group's."""
    if os.geteuid():
        pytest.skip("only root may start processes of another user")
    for folder in (tmp_path, *tmp_path.parents):
        if not folder.stat().st_mode & stat.S_IXOTH:
            folder.chmod(folder.stat().st_mode | stat.S_IXOTH)
    root = tmp_path / "store"
    root.mkdir()
    os.chown(root, 0, NOBODY)
    root.chmod(0o2770)
    return root


def test_two_users_at_once_make_one_artifact(shared: Path) -> None:
    said = finished(user(shared, 0, 0), user(shared, NOBODY, NOBODY))
    assert all(line.endswith("made once, read by all") for line in said)
    assert sorted(line.split()[0] for line in said) == ["False", "True"], "one made it, the other read it"
    manifests = list(shared.glob("*/manifest.json"))
    assert sorted(json.loads(path.read_text())["step"] for path in manifests) == ["first", "second"]
    assert not list(shared.glob("*.partial"))


@pytest.mark.parametrize("starts", [0, NOBODY])
def test_one_user_continues_what_the_other_s_killed_process_left(shared: Path, starts: int) -> None:
    killed = user(shared, starts, starts, "killed")
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    (shard,) = shared.glob("first-*.partial/scratch/shard")
    assert shard.read_text() == str(starts)
    other = NOBODY - starts
    assert finished(user(shared, other, other)) == ["False False made once, read by all"]
    assert finished(user(shared, starts, starts)) == ["True True made once, read by all"]


def test_a_store_that_is_not_shared_says_how_to_share_it(shared: Path) -> None:
    shared.chmod(0o755)
    finished(user(shared, 0, 0))
    refused = user(shared, NOBODY, NOBODY)
    _, errors = refused.communicate(timeout=120)
    assert refused.returncode
    assert "user 65534 may not write there. Let the owner share the store" in errors
