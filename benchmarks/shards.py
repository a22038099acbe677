"""Main memory of ranks that train one model in shards (`model.strategy=fsdp`): its peaks by rank and phase.

    python benchmarks/shards.py                        # two ranks on gloo, 340 MB of float32 weights
    python benchmarks/shards.py --dtype bfloat16       # the checkpoint is half as large, and becomes float32
    python benchmarks/shards.py --width 64             # what a rank holds without a model worth the name

Only the projector trains, so that what is seen is weights and not their gradients and moments. Every 10 ms the kernel
is asked for each rank's anonymous pages, which are its own (pages of a mapped file are the page cache's, and shared).
On CPUs alone shards lie in main memory too. Linux only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image

from sicog_exp.data.scenes import make_scene, render
from sicog_exp.models.embedded import build_model, build_processor, build_tokenizer
from sicog_exp.prompts import prompt
from sicog_exp.recipe import ModelConfig, StageConfig
from sicog_exp.records import Record, conversation, write_records
from sicog_exp.store import Artifact, Workplace
from sicog_exp.training import stages
from sicog_exp.training.modules import SupervisedFineTuning
from sicog_exp.training.stages import MixtureData, TrainingTask

PATCH, SEED = 24, 3
PHASES = "load", "shard", "train", "gather and save"


class Watched(SupervisedFineTuning):
    """Says in a file which phase its rank is in."""

    home = Path()

    def say(self, phase: int) -> None:
        (self.home / f"rank-{os.environ['RANK']}").write_text(f"{os.getpid()} {phase}")

    def configure_model(self) -> None:
        self.say(1)
        super().configure_model()

    def on_train_start(self) -> None:
        self.say(2)

    def on_train_end(self) -> None:
        self.say(3)


def make_model(folder: Path, width: int, dtype: str) -> None:
    """A LLaVA of random weights with its processor."""
    tokenizer = build_tokenizer([prompt("dd"), "a red dog"], 400)
    model = build_model(tokenizer, width=width, vision_layers=1, language_layers=5, heads=8, patch_size=PATCH,
                        max_length=512)  # fmt: skip
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    build_processor(tokenizer, PATCH, [0.5] * 3, [0.25] * 3).save_pretrained(folder)


def make_data(folder: Path) -> None:
    """Four rows about pictures of the built-in world."""
    rows = []
    for number in range(4):
        name = f"{number}.png"
        Image.fromarray(render(make_scene(SEED, "development", number), SEED)).save(folder / name)
        rows.append(Record(name, conversation(prompt("dd"), "a red dog", (name,)), (name,), "dd", "annotated"))
    write_records(folder / "annotated.parquet", rows)
    write_records(folder / "instruction.parquet", [])


def rank(home: Path, options: argparse.Namespace) -> None:
    """What torchrun starts: a stage of two steps in this process."""
    Watched.home = home
    Watched.say(Watched, 0)  # type: ignore[arg-type]
    stage = StageConfig(steps=2, batch_size=options.devices, micro_batch_size=1, max_length=512, vision_lr=0.0,
                        projector_lr=1e-3, language_lr=0.0)  # fmt: skip
    machine = ModelConfig(device="cpu", threads=1, devices=options.devices, strategy="fsdp")
    inputs = {part: Artifact(home / part, {}, True) for part in ("model", "data")}
    data = MixtureData(TrainingTask(stage, machine, {"annotated": 1.0}, SEED), inputs)
    stages.MODULES = {**stages.MODULES, "watched": Watched}
    stages.train("watched", data, Workplace(home / "made", home / "scratch"))


class Watch(threading.Thread):
    """Peaks in MB by (phase, rank)."""

    def __init__(self, home: Path) -> None:
        super().__init__(daemon=True)
        self.home, self.ended = home, False
        self.peaks: dict[tuple[int, int], float] = defaultdict(float)

    def run(self) -> None:
        while not self.ended:
            for file in self.home.glob("rank-*"):
                process, _, phase = file.read_text().partition(" ")
                if phase:
                    place = int(phase), int(file.name.removeprefix("rank-"))
                    self.peaks[place] = max(self.peaks[place], anonymous(process))
            time.sleep(0.01)


def anonymous(process: str) -> float:
    """MB of pages that no file stands behind."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0.0
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("Anonymous:"))


def measure(options: argparse.Namespace) -> None:
    """Start the ranks, watch them, print a table."""
    with TemporaryDirectory() as name:
        home = Path(name)
        for part in ("data", "made", "scratch"):
            (home / part).mkdir()
        make_model(home / "model", options.width, options.dtype)
        make_data(home / "data")
        size = sum(file.stat().st_size for file in (home / "model").glob("*.safetensors"))
        watch = Watch(home)
        watch.start()
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                        f"--nproc-per-node={options.devices}", *sys.argv, "--home", name], check=True)  # fmt: skip
        watch.ended = True
        watch.join()
    ranks = range(options.devices)
    print(f"{size / 1e6:.0f} MB of weights on disk in {options.dtype}; anonymous pages at their peak, MB")
    print("| phase | " + " | ".join(f"rank {rank}" for rank in ranks) + " |\n" + "|---" * (1 + len(ranks)) + "|")
    for number, phase in enumerate(PHASES):
        print(f"| {phase} | " + " | ".join(f"{watch.peaks[number, rank]:.0f}" for rank in ranks) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the checkpoint")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.home:
        rank(options.home, options)
    else:
        measure(options)


if __name__ == "__main__":
    main()
