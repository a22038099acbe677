"""What `sicog data check` costs: seconds and memory for LLaVA rows over a few hundred pictures, or a picture a row.

    OMP_NUM_THREADS=1 python benchmarks/data_check.py --rows 100000 --pictures 300

A third of the rows are captions of 60 to 139 words, the others short answers; three in ten have a second turn. Pictures
are JPEGs of the sizes that COCO has most often. The processor is loaded before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from sicog_exp.cli import quiet_libraries

SIZES = ((640, 480), (480, 640), (500, 375), (640, 427))
TEXT = "the a red blue cat dog tree house stands left right of near car person holding cup table on street window small"
WORDS = TEXT.split()


def make(folder: Path, rows: int, pictures: int) -> Path:
    rng, noise = random.Random(0), np.random.default_rng(0)
    for i in range(pictures):
        width, height = rng.choice(SIZES)
        coarse = noise.integers(0, 256, (height // 20 + 1, width // 20 + 1, 3), dtype=np.uint8)
        pixels = np.kron(coarse, np.ones((20, 20, 1), np.uint8))[:height, :width]
        Image.fromarray(pixels).save(folder / f"{i:06d}.jpg", quality=85)
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(rows):
            file.write(json.dumps(_row(rng, i, i % pictures)) + "\n")
    return folder / "rows.jsonl"


def _row(rng: random.Random, number: int, picture: int) -> dict[str, Any]:
    def say(words: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(words))

    caption = rng.random() < 0.35
    asked = "Describe the image in detail." if caption else f"{say(9)}?"
    turns = [("human", f"<image>\n{asked}"), ("gpt", say(rng.randrange(60, 140) if caption else rng.randrange(1, 12)))]
    if rng.random() < 0.3:
        turns += [("human", f"{say(8)}?"), ("gpt", say(12))]
    return {"id": f"{number:09d}", "image": f"{picture:06d}.jpg",
            "conversations": [{"from": speaker, "value": text} for speaker, text in turns]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--max-length", type=int, default=4096)
    parser.add_argument("--images", choices=("headers", "all"), default="headers")
    parser.add_argument("--tokens", choices=("sample", "all"), default="sample")
    options = parser.parse_args()
    quiet_libraries()
    from sicog_exp.data.check import Options, check

    with TemporaryDirectory() as name:
        source = make(Path(name), options.rows, options.pictures)
        asked = Options(max_length=options.max_length, decode=options.images == "all", every=options.tokens == "all")
        (Path(name) / "first").mkdir()
        check(make(Path(name) / "first", 10, 1), asked)  # loads what is loaded once
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
        started = time.process_time()
        found = check(source, asked)
        spent = time.process_time() - started
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(f"{found.read:,} rows over {found.images:,} pictures, images {options.images}, tokens {options.tokens}, "
          f"max_length {options.max_length}: {spent:.1f} s of one core, {found.seconds:.1f} s on the clock, "
          f"peak {after:,.0f} MB ({before:,.0f} MB before the first row)")  # fmt: skip


if __name__ == "__main__":
    main()
