"""Weights that only the first rank loads: shards are the loaded model's, and whole again afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from families import build
from safetensors.torch import load_file, save_file

PROGRAM = Path(__file__).parent.parent / "sharded.py"
KINDS = "llava", "smolvlm", "qwen2_5_vl", "gemma3"
"""Buffers of one, of many and of scaled rotary embeddings, of positions and of scales. The program takes any family."""


def twice_in_the_file(folder: Path, target: Path) -> Path:
    """A checkpoint that holds tied weights under both names: ranks that read no values cannot see that they are."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    embedding = next(value for name, value in weights.items() if name.endswith("embed_tokens.weight"))
    assert "lm_head.weight" not in weights
    save_file({**weights, "lm_head.weight": embedding.clone()}, target / "model.safetensors", {"format": "pt"})
    return target


def test_ranks_hold_shards_of_what_the_first_one_loads(tiny_model: Path, tmp_path: Path) -> None:
    folders = [build(name, tmp_path / name / "model").folder for name in KINDS]
    folders += [twice_in_the_file(tiny_model, tmp_path / "twice" / "model")]
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(PROGRAM)]
    ran = subprocess.run([*ranks, *map(str, folders)], capture_output=True, text=True, timeout=300,
                         env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"})  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert sorted(ran.stdout.splitlines()) == sorted(
        f"{folder.parent.name}: rank {rank} is done" for folder in folders for rank in (0, 1))  # fmt: skip
