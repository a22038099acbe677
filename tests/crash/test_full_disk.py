"""A disk that fills up, and a limit on a file's size: an error for people, nothing half-written under a final name, and
the same command continues when there is room."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import REPOSITORY

from sicog_exp.store import Step, Store, StoreError, Workplace

SIZE = 2_000_000
LIMITED = """
import resource, sys
from sicog_exp.store import Step, Store

def write(config, inputs, workplace):
    with (workplace.directory / "rows.bin").open("wb") as file:
        for _ in range(20):
            file.write(bytes(100_000))

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
Store(sys.argv[1]).run(Step("rows", write, {}))
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system, and not in every container")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def weights(config: dict[str, int], inputs: object, workplace: Workplace) -> None:
    """Writes through a library with errors of its own."""
    import torch
    from safetensors.torch import save_file

    (workplace.scratch / "shard-0").write_text("kept")
    save_file({"w": torch.zeros(config["bytes"], dtype=torch.uint8)}, workplace.directory / "model.safetensors")


def text(config: dict[str, int], inputs: object, workplace: Workplace) -> None:
    (workplace.scratch / "shard-0").write_text("kept")
    (workplace.directory / "rows.txt").write_text("x" * config["bytes"])


@pytest.mark.parametrize("write", [weights, text])
def test_a_full_disk_leaves_no_half_artifact(small_disk: Path, write: object) -> None:
    store, step = Store(small_disk / "store"), Step("model", write, {"bytes": 1_200_000})  # type: ignore[arg-type]
    (small_disk / "other.bin").write_bytes(bytes(1_000_000))
    with pytest.raises(StoreError, match=r"disk full while step model wrote to .*MB are free there.*same command"):
        store.run(step)
    assert not store.path_of(step).exists()
    assert [path.name for path in store.root.iterdir() if path.is_dir()] == [f"{store.path_of(step).name}.partial"]
    (small_disk / "other.bin").unlink()
    assert store.run(step).manifest["outputs"]
    assert not list(store.root.glob("*.partial"))


def test_not_a_byte_is_left_for_the_lock(small_disk: Path) -> None:
    store = Store(small_disk / "store")
    subprocess.run(["dd", "if=/dev/zero", f"of={small_disk / 'other.bin'}", "bs=4096"], capture_output=True)
    assert os.statvfs(small_disk).f_bavail == 0
    with pytest.raises(StoreError, match="disk full"):
        store.run(Step("model", text, {"bytes": 10}))
    (small_disk / "other.bin").unlink()
    assert store.run(Step("model", text, {"bytes": 10})).path.is_dir()


def test_a_limit_on_a_file_s_size_is_said(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "store")]
    place = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    limited = subprocess.run([*command, "500000"], env=place, capture_output=True, text=True)
    assert limited.returncode
    assert "a file reached the process's limit of 0.5 MB" in limited.stderr
    assert not list((tmp_path / "store").glob("*/manifest.json"))
    assert subprocess.run([*command, "3000000"], env=place).returncode == 0
    assert len(list((tmp_path / "store").glob("rows-*[0-9a-f]/rows.bin"))) == 1
