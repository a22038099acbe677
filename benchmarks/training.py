"""Useful tokens per second of fine-tuning on rows of mixed length: packed, padded, and by a plain transformers loop.

    python benchmarks/training.py                     # one GPU: both LLaVA-Qwen2 shapes; else the embedded one
    python benchmarks/training.py --shapes llava-qwen2-7b

Lengths are uniform up to `--max-length`, half of it on average; a row that is long enough shows an image, the others
are text. Useful tokens are those of rows, padding left out. Four ways take turns in one process, on the same rows:

- packed: our stage with packing, several rows in one
- padded: our stage as it is by default, rows of like length together
- unsorted: our stage's loss on padded rows as they come
- plain: the same batches by `model(..., labels=...).loss`, as a plain fine-tuning loop computes it

Each computes forward and backward passes of one step (gradient checkpointing on a GPU) and AdamW's update. On a GPU
seconds are the clock's, on a CPU those of the processor. Model FLOPs are those of useful tokens (6 a parameter and
position, nothing for what is computed twice); their share is that of a large matrix product's rate in the same run.

A way that finds no memory takes half as many rows a forward pass, until it fits; all have the same rows, and its number
stands beside it. On a GPU weights and AdamW's moments are bfloat16, with no copy in float32: what is measured is speed,
and such training at a low rate learns little (docs/your-model.md). `--write benchmarks` keeps what is printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before torch begins: the ways' tensors are of other sizes, whose gaps would else leave a full GPU short of memory.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
from results import Results, verdict
from shapes import SHAPES, clock, measured_peak, random_model, wait

from sicog_exp.data.chat import IGNORED, Example
from sicog_exp.data.mixture import Row, collate
from sicog_exp.generation.memory import out_of_memory
from sicog_exp.models.loading import work_of
from sicog_exp.recipe import StageConfig
from sicog_exp.store import free_memory
from sicog_exp.training.fit import StepBatches
from sicog_exp.training.modules import NOT_THE_MODELS, SupervisedFineTuning

TEXT = 16
"""Fewest tokens of a row beside its image."""
MIXTURE: Any = None
"""`micro_batches` cuts rows that are given to it."""


def make_rows(model: Any, count: int, max_length: int) -> list[Row]:
    """Lengths spread evenly over (TEXT, max_length], shuffled; the last half of a row's text is its response."""
    rng, config = np.random.default_rng(0), model.config
    side, image = config.vision_config.image_size, config.image_seq_length
    rows = []
    for n in rng.permutation(np.linspace(TEXT, max_length, count).astype(int)).tolist():
        shown = image if n >= image + TEXT else 0
        ids = [config.image_token_id] * shown + rng.integers(10, 300, n - shown).tolist()
        asked = shown + (n - shown) // 2
        pixels = torch.from_numpy(rng.standard_normal((1, 3, side, side), np.float32)) if shown else None
        inputs = {"pixel_values": pixels} if pixels is not None else None
        rows.append(Row(Example(ids, [IGNORED] * asked + ids[asked:]), inputs, "benchmark"))
    return rows


def micro_batches(way: str, rows: list[Row], micro: int, max_length: int) -> list[dict[str, Any]]:
    if way in ("packed", "padded"):
        stage = StageConfig(batch_size=len(rows), micro_batch_size=micro, max_length=max_length,
                            packing=way == "packed")  # fmt: skip
        return StepBatches(MIXTURE, stage, 0).micro_batches(rows)
    return [collate(rows[i : i + micro], 0) for i in range(0, len(rows), micro)]


def moved(batch: dict[str, Any], model: Any) -> dict[str, Any]:
    return {name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            if isinstance(value, torch.Tensor) else value for name, value in batch.items()}  # fmt: skip


def plain_loss(model: Any, batch: dict[str, Any], _: SupervisedFineTuning) -> torch.Tensor:
    given = {name: value for name, value in batch.items() if name not in NOT_THE_MODELS}
    return model(**given, labels=batch["labels"], use_cache=False).loss


def our_loss(model: Any, batch: dict[str, Any], module: SupervisedFineTuning) -> torch.Tensor:
    summed, terms = module.batch_loss(batch)
    return summed / terms


def step(model: Any, module: SupervisedFineTuning, optimizer: torch.optim.Optimizer, batches: Sequence[dict[str, Any]],
         loss: Callable[..., torch.Tensor], device: str) -> float:  # fmt: skip
    """Seconds of one optimizer step."""
    wait(device)
    started = clock(device)
    for batch in batches:
        loss(model, moved(batch, model), module).backward()
    optimizer.step()
    optimizer.zero_grad()
    wait(device)
    return clock(device) - started


@dataclass
class Way:
    """One of the ways: its rows a forward pass (0 where not even one fits), its batches, its seconds a step."""

    name: str
    micro: int
    batches: list[dict[str, Any]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def middle(self) -> float:
        return statistics.median(self.seconds) if self.seconds else float("nan")


class Subject:
    """A model, what trains it, and the rows of a step."""

    def __init__(self, shape: str, options: argparse.Namespace, device: str) -> None:
        self.model, _ = random_model(shape, device)
        if device == "cuda":
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.module = SupervisedFineTuning(self.model, StageConfig()).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        self.device, self.max_length = device, options.max_length
        self.rows = make_rows(self.model, options.rows, options.max_length)
        # AdamW makes its moments in its first step: what fits beside them is found with them there.
        longest = max(self.rows, key=lambda row: len(row.example))
        self._step(Way("plain", 1, [collate([longest], 0)]))

    def turn(self, way: Way) -> float | None:
        """Seconds of one step, with fewer rows a pass than before where memory is short; None where nothing fits."""
        while way.micro:
            way.batches = way.batches or micro_batches(way.name, self.rows, way.micro, self.max_length)
            try:
                return self._step(way)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            # Behind the handler, whose traceback holds the failed attempt's tensors.
            self.optimizer.zero_grad()
            free_memory()
            way.micro, way.batches, way.seconds = way.micro // 2, [], []
        return None

    def _step(self, way: Way) -> float:
        loss = plain_loss if way.name == "plain" else our_loss
        return step(self.model, self.module, self.optimizer, way.batches, loss, self.device)


def measure(shape: str, options: argparse.Namespace, device: str, results: Results) -> None:
    subject = Subject(shape, options, device)
    rows, ways = subject.rows, [Way(name, options.micro_batch) for name in ("packed", "padded", "unsorted", "plain")]
    useful, flops = sum(len(row.example) for row in rows), flops_of(subject.model, rows)
    for turn in range(options.rounds + 1):
        for way in ways:
            took = subject.turn(way)
            if turn and took:  # the first round warms up
                way.seconds.append(took)
    peak = measured_peak(device)
    results.say(f"\n## {shape}\n\n{len(rows)} rows, {useful:,} useful tokens (mean {useful / len(rows):.0f} of at most "
                f"{options.max_length}); {peak / 1e12:.2f} TFLOP/s measured peak; median of {options.rounds}\n\n"
                "| way | rows a pass | computed tokens | useful tokens/s | model TFLOP/s | of the peak "
                "| packed is faster by |\n" + 7 * "|---" + "|")
    for way in ways:
        results.say(line(way, ways[0], useful, flops, peak))
    results.say("\n" + "\n".join(verdicts(shape, {way.name: way.middle for way in ways}, flops, peak)))


def line(way: Way, packed: Way, useful: int, flops: float, peak: float) -> str:
    """A row of the table."""
    if not way.seconds:
        return f"| {way.name} | out of memory |" + " |" * 5
    computed = sum(batch["input_ids"].numel() for batch in way.batches)
    return (f"| {way.name} | {way.micro} | {computed:,} | {useful / way.middle:,.0f} | {flops / way.middle / 1e12:.3f} "
            f"| {flops / way.middle / peak:.0%} | {way.middle / packed.middle:.2f} |")  # fmt: skip


def verdicts(shape: str, seconds: dict[str, float], flops: float, peak: float) -> list[str]:
    """The bars of one H100."""
    packed = seconds["packed"]
    if shape == "llava-qwen2-0.5b":
        return [verdict("times plain transformers", seconds["plain"] / packed, 2.0)]
    if shape != "llava-qwen2-7b":
        return ["no bar was set for this shape"]
    return [verdict("times batches padded as they come (unsorted)", seconds["unsorted"] / packed, 1.7),
            verdict("times our batches of like length (padded)", seconds["padded"] / packed, 1.7),
            verdict("share of the measured peak", flops / packed / peak, 0.45)]  # fmt: skip


def flops_of(model: Any, rows: Sequence[Row]) -> float:
    tokens = sum(len(row.example) for row in rows)
    image = sum(row.example.input_ids.count(model.config.image_token_id) for row in rows)
    new = sum(label != IGNORED for row in rows for label in row.example.labels[1:])
    return work_of(model).training(tokens, image, new)


MAX_LENGTH = 1024
"""On a GPU. Of 84 GB that an H100 leaves to torch, weights, gradients and AdamW's moments of 7.9 billion parameters
take 63.5 (8 bytes each). A pass of 8 rows of 1024 tokens adds 1.6 for what is kept of each layer (28 x 3,584 x 2 bytes
a token) and, at its peak, three float32 copies of a position's 152,064 logits: ours, at response tokens alone (half of
them at most), below 7.5; `plain`, at all positions, 14.9, which leaves 4. With 2048 tokens it would want 97 in all."""


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = device == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES)[1:] if gpu else ["embedded"])
    parser.add_argument("--rows", type=int, default=64, help="of one optimizer step")
    parser.add_argument("--micro-batch", type=int, default=8, help="rows of a forward pass")
    parser.add_argument("--max-length", type=int, default=MAX_LENGTH if gpu else 512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="a dated file of results in it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = Results("training", options.write)
    for shape in options.shapes:
        try:
            measure(shape, options, device, results)
        except torch.OutOfMemoryError:
            results.say(f"\n## {shape}\n\nNot measured: weights, gradients and moments alone do not fit.")
        free_memory()


if __name__ == "__main__":
    main()
