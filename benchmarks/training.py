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
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from shapes import SHAPES, clock, measured_peak, random_model, wait

from sicog_exp.data.chat import IGNORED, Example
from sicog_exp.data.mixture import Row, collate
from sicog_exp.models.loading import work_of
from sicog_exp.recipe import StageConfig
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


def micro_batches(way: str, rows: list[Row], options: argparse.Namespace) -> list[dict[str, Any]]:
    micro = options.micro_batch
    if way in ("packed", "padded"):
        stage = StageConfig(batch_size=len(rows), micro_batch_size=micro, max_length=options.max_length,
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


def measure(shape: str, options: argparse.Namespace, device: str) -> Iterator[str]:
    model, _ = random_model(shape, device)
    if device == "cuda":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    module = SupervisedFineTuning(model, StageConfig()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    rows = make_rows(model, options.rows, options.max_length)
    useful, flops = sum(len(row.example) for row in rows), flops_of(model, rows)
    ways = {way: micro_batches(way, rows, options) for way in ("packed", "padded", "unsorted", "plain")}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(options.rounds + 1):
        for way, batches in ways.items():
            took = step(model, module, optimizer, batches, plain_loss if way == "plain" else our_loss, device)
            if turn:  # the first round warms up
                seconds[way].append(took)
    peak = measured_peak(device)
    yield (f"\n{shape}: {len(rows)} rows, {useful:,} useful tokens (mean {useful / len(rows):.0f} of at most "
           f"{options.max_length}), {options.micro_batch} rows a forward pass; {peak / 1e12:.2f} TFLOP/s measured "
           "peak\n\n| way | computed tokens | useful tokens/s | model TFLOP/s | of the peak | packed is faster by |\n"
           + "|---" * 6 + "|")  # fmt: skip
    for way, found in seconds.items():
        middle, computed = statistics.median(found), sum(batch["input_ids"].numel() for batch in ways[way])
        ratio = statistics.median(a / b for a, b in zip(found, seconds["packed"], strict=True))
        yield (f"| {way} | {computed:,} | {useful / middle:,.0f} | {flops / middle / 1e12:.3f} "
               f"| {flops / middle / peak:.0%} | {ratio:.2f} |")  # fmt: skip


def flops_of(model: Any, rows: Sequence[Row]) -> float:
    tokens = sum(len(row.example) for row in rows)
    image = sum(row.example.input_ids.count(model.config.image_token_id) for row in rows)
    new = sum(label != IGNORED for row in rows for label in row.example.labels[1:])
    return work_of(model).training(tokens, image, new)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = device == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES)[1:] if gpu else ["embedded"])
    parser.add_argument("--rows", type=int, default=64, help="of one optimizer step")
    parser.add_argument("--micro-batch", type=int, default=8, help="rows of a forward pass")
    parser.add_argument("--max-length", type=int, default=2048 if gpu else 512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{torch.cuda.get_device_name() if gpu else f'{options.threads} CPU thread(s)'}, torch {torch.__version__}")
    for shape in options.shapes:
        try:
            for line in measure(shape, options, device):
                print(line, flush=True)
        except torch.cuda.OutOfMemoryError:
            print(f"\n{shape}: out of memory; take a smaller --micro-batch")
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
