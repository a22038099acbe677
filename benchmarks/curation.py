"""Curating a pool with given 384-dimensional embeddings: ours and the authors' way, their growth and peak memory.

    OMP_NUM_THREADS=1 python benchmarks/curation.py --sizes 10000,100000,1000000 --peer-sizes 10000,100000

Ours is the loop's own step (`sicog_exp.selfdata.curate`): a pool's candidates are joined with their items, scored,
chosen, kept and written, training rows included. The authors' way repeats the steps of thunlp/SICOG's
quality_evaluation/caption_quality_eval.py (a6db5eb) with the same embeddings in place of its encoder. Every
measurement is a process of its own, so that its peak memory is its own; seconds are those of the processor, of one
thread (no way has more), the clock's beside them. Memory is the process's peak; own memory leaves out pages of files,
which the system takes back when it needs them: libraries, and embeddings while they are read. Candidates are three
captions an image, two in five steps and one plain, of `--words` words a step.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

N, SIZE, BLOCK = 3, 384, 3000
TAUS = (0.8, 0.85, 0.9)
KINDS = ("cod", "cod", "dd")
BANK = 20_000


# The data, the same for both ways.


def make(folder: Path, candidates: int, words: int) -> None:
    """Items as records, their candidates as a pool, its embeddings; and the rows that the authors' script reads."""
    from sicog_exp.curation.embeddings import TEXTS, VECTORS, _digest
    from sicog_exp.prompts import final_text, prompt
    from sicog_exp.records import Record, conversation, write_records

    items = candidates // N
    for name in ("data", "pool", "embeddings", "out"):
        (folder / name).mkdir(parents=True)
    (folder / "size.json").write_text(json.dumps([items, words]))
    asked = prompt("cod")
    write_records(folder / "data" / "unlabeled.parquet", (
        Record(f"{i:07d}:caption", conversation(asked, None, (f"{i}.png",)), (f"{i}.png",), "cod", "unlabeled")
        for i in range(items)))  # fmt: skip
    digests = (folder / "embeddings" / TEXTS).open("wb")
    pool = (folder / "pool" / "candidates.jsonl").open("w")
    rows = (folder / "authors.json").open("w")
    with digests, pool, rows:
        rows.write("[")
        for i, texts in enumerate(captions(items, words)):
            for j, text in enumerate(texts):
                row = {"sample_id": f"{i:07d}:caption", "kind": KINDS[j], "index": j, "text": text, "seed": 1,
                       "logprob": -1.0, "tokens": 100, "finish_reason": "stop"}  # fmt: skip
                pool.write(json.dumps(row) + "\n")
                digests.write(_digest(final_text(KINDS[j], text) or ""))
            turns = [{"from": "human", "value": asked}]
            rows.write(("," if i else "") + json.dumps({"id": str(i), "image": f"{i}.png", "conversations": turns,
                                                        "candidates": texts}))  # fmt: skip
        rows.write("]")
    _write_vectors(folder / "embeddings" / VECTORS, items)


def captions(items: int, words: int) -> Iterator[list[str]]:
    from sicog_exp.prompts import structured

    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("aeioubcdfglmnprst", k=rng.randrange(2, 9))) for _ in range(5000)]
    bank = [" ".join(rng.choices(vocabulary, k=words)) for _ in range(BANK)]
    for i in range(items):
        finals = [f"{rng.choice(bank)} {rng.choice(bank)} {i} {j}" for j in range(N)]
        yield [structured("cod", (*rng.choices(bank, k=4), final)) if KINDS[j] == "cod" else final
               for j, final in enumerate(finals)]  # fmt: skip


def _write_vectors(path: Path, items: int) -> None:
    """Unit vectors about one of their item; how far from it differs by item, so that some items reach each tau."""
    stored = np.lib.format.open_memmap(path, "w+", np.float32, (items * N, SIZE))
    rng = np.random.default_rng(0)
    for start in range(0, items, BLOCK):
        count = min(BLOCK, items - start)
        centre = rng.standard_normal((count, 1, SIZE), np.float32)
        spread = rng.random((count, 1, 1), np.float32)
        block = (centre + spread * rng.standard_normal((count, N, SIZE), np.float32)).reshape(-1, SIZE)
        stored[start * N : (start + count) * N] = block / np.linalg.norm(block, axis=1, keepdims=True)
    stored.flush()


# Ours.


def ours(folder: Path) -> dict[str, Any]:
    """The step as the loop runs it, with the seconds of its parts."""
    from sicog_exp import selfdata
    from sicog_exp.recipe import CurationConfig
    from sicog_exp.store import Artifact, Workplace

    spent: dict[str, float] = {}
    for name in ("write_jsonl", "curate_file", "write_records"):
        setattr(selfdata, name, _timed(getattr(selfdata, name), spent))
    inputs = {name: Artifact(folder / place, {}, True)
              for name, place in (("data", "data"), ("pool00", "pool"), ("embeddings00", "embeddings"))}  # fmt: skip
    # The name is never looked up: every text has its embedding.
    task = selfdata.CurationTask(CurationConfig(encoder="given", caption_threshold=TAUS[-1]))
    started = time.process_time()
    selfdata.curate(task, inputs, Workplace(folder / "out", folder / "out"))
    seconds = time.process_time() - started
    kept = json.loads((folder / "out" / "summary.json").read_text())["kept"]
    return {"seconds": seconds, "join": spent["write_jsonl"], "curate": spent["curate_file"],
            "rows": spent["write_records"], "kept": kept}  # fmt: skip


def _timed(function: Any, spent: dict[str, float]) -> Any:
    def measured(*arguments: Any) -> Any:
        started = time.process_time()
        try:
            return function(*arguments)
        finally:
            spent[function.__name__] = time.process_time() - started

    return measured


def core(folder: Path) -> dict[str, Any]:
    """Scores, choice and thresholds alone, from items to decisions, without a file but the embeddings'."""
    from sicog_exp.curation.curate import curate
    from sicog_exp.curation.embeddings import stored_encoder
    from sicog_exp.curation.items import Item, Response
    from sicog_exp.recipe import CurationConfig

    making = 0.0

    def items() -> Iterator[Item]:
        nonlocal making
        made = captions(*json.loads((folder / "size.json").read_text()))
        started = time.process_time()
        for i, texts in enumerate(made):
            item = Item(str(i), "caption", "", f"{i}.png", tuple(map(Response, texts, KINDS, range(N))))
            making += time.process_time() - started
            yield item
            started = time.process_time()

    encoder = stored_encoder("given", [folder / "embeddings"])
    config = CurationConfig(encoder="given", caption_threshold=TAUS[-1])
    started = time.process_time()
    kept = sum(decision.kept for decision in curate(items(), config, encoder))
    return {"seconds": time.process_time() - started - making, "kept": kept}


# The authors' way.


def authors(folder: Path) -> dict[str, Any]:
    """Step by step, with what their script leaves in memory; what it prints goes nowhere."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    given = np.load(folder / "embeddings" / "vectors.npy")
    started = time.process_time()
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        rows = [copy.deepcopy(row) for row in json.loads((folder / "authors.json").read_text())]
        for row in rows:
            row["predictions"] = [_extract(text) for text in row["candidates"]]
        data = Dataset.from_list(rows)
        sentences: list[str] = sum([row["predictions"] for row in data], [])  # noqa: RUF017 - theirs
        embeddings = given[: len(sentences)]

        def score(row: dict[str, Any], index: int) -> dict[str, Any]:
            own = np.array(embeddings[index * N : (index + 1) * N])
            row["scores"] = (own @ own.T).mean(axis=1).tolist()
            row["chosen"] = row["candidates"][np.argmax(row["scores"])]
            return row

        def reject(row: dict[str, Any]) -> dict[str, Any]:
            order = np.argsort(row["scores"])
            row["rejected"] = row["candidates"][random.choice(order[: len(order) // 2])]
            return row

        data = data.map(score, with_indices=True)
        data.save_to_disk(folder / "out" / "authors")
        final = data.map(reject).map(lambda row: {**row, "prompt": row["conversations"][0]["value"]}).to_list()
    kept = {tau: [row for row in final if max(row["scores"]) >= tau] for tau in TAUS}
    for name, chosen in {"all": final, **kept}.items():
        with (folder / "out" / f"{name}.json").open("w") as file:
            json.dump(chosen, file, indent=4)
    return {"seconds": time.process_time() - started, "kept": len(kept[TAUS[-1]])}


def _extract(text: str) -> str:
    """The description of step 5, or, where there is none, of step 1; the script prints every text it looks at."""
    print("text: ", text)
    patterns = [rf"Step {step}: .*?{lines}(.*)" for step in (5, 1) for lines in ("\n\n", "\n")]
    found = [re.search(pattern, text, re.DOTALL) for pattern in patterns] if "Step" in text else []
    return next((match.group(1).strip() for match in found if match), text)


# The runs.


class OwnMemory:
    """The process's largest anonymous memory while it lasts, in MB, looked at 20 times a second."""

    def __init__(self) -> None:
        self.peak = 0.0
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> OwnMemory:
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watch.join()

    def _look(self) -> None:
        while not self._over.wait(0.05):
            self.peak = max(self.peak, _megabytes("RssAnon"))


def _megabytes(name: str) -> float:
    """A size of this process. (`ru_maxrss` would begin with what the process held that started this one.)"""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1000


WAYS = {"ours": ours, "core": core, "authors": authors}


def measure(way: str, folder: Path) -> dict[str, Any]:
    """One way in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--measure", way, str(folder)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _sizes(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=_sizes, default="10000,100000,1000000", help="candidates")
    parser.add_argument("--peer-sizes", type=_sizes, default="10000,100000", help="candidates for the authors' way")
    parser.add_argument("--words", type=int, default=20, help="words of each of a caption's six pieces")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        way, folder = options.measure
        clock = time.perf_counter()
        with OwnMemory() as memory:
            found = WAYS[way](Path(folder))
        clock = time.perf_counter() - clock
        print(json.dumps({**found, "clock": clock, "own": memory.peak, "resident": _megabytes("VmHWM")}))
        return
    print("| candidates | way | seconds | clock | us each | own MB | peak MB | kept | parts |\n" + "|---" * 9 + "|")
    for size in sorted({*options.sizes, *options.peer_sizes}):
        with TemporaryDirectory() as name:
            make(Path(name) / "made", size, options.words)
            found = {}
            for way in WAYS:
                if size in (options.peer_sizes if way == "authors" else options.sizes):
                    found[way] = measure(way, Path(name) / "made")
                    _report(size, way, found[way])
            if len(found) == len(WAYS):
                for way in ("ours", "core"):
                    print(f"{size:,}: the authors' way takes {found['authors']['seconds'] / found[way]['seconds']:.1f} "
                          f"times as long as {way}")  # fmt: skip


def _report(size: int, way: str, found: dict[str, Any]) -> None:
    parts = ", ".join(f"{name} {found[name]:.1f}" for name in ("join", "curate", "rows") if name in found)
    print(f"| {size:,} | {way} | {found['seconds']:.1f} | {found['clock']:.1f} "
          f"| {found['seconds'] / size * 1e6:.0f} | {found['own']:,.0f} | {found['resident']:,.0f} "
          f"| {found['kept']:,} | {parts} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
