"""What a second core is worth: one core, two on each batch, or a core for each batch; training and sampling.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/cores.py --model store/develop-...

The three are measured in turn, round by round; ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from sampling import SHIPPED, make_requests

from sicog_exp.base import SceneTurns, TextTurns
from sicog_exp.data.chat import ChatEncoder
from sicog_exp.data.mixture import Mixture
from sicog_exp.generation.engine import Decoding
from sicog_exp.generation.transformers_engine import TransformersEngine
from sicog_exp.models.loading import ModelSource, load_model
from sicog_exp.recipe import StageConfig
from sicog_exp.training.fit import StepBatches
from sicog_exp.training.modules import SupervisedFineTuning

ROWS, MICRO = 32, 8


def training(source: Path) -> Callable[[int, int], float]:
    """Gradients of one step of 32 rows in micro-batches of 8; rows per second by (threads, side by side)."""
    model, processor = load_model(ModelSource(str(source)))
    encoder = ChatEncoder(processor)
    stage = StageConfig(batch_size=ROWS, micro_batch_size=MICRO)
    module = SupervisedFineTuning(model, stage)
    mixture = Mixture([(SceneTurns(0, 8, encoder), 0.7), (TextTurns(0, encoder), 0.3)], 0)
    batches = StepBatches(mixture, stage, processor.tokenizer.pad_token_id).micro_batches(mixture.rows(0, ROWS))
    parameters = module.trained_parameters

    def rate(threads: int, beside: int) -> float:
        torch.set_num_threads(threads)
        with ThreadPoolExecutor(beside) as pool:
            started = time.perf_counter()
            list(pool.map(lambda batch: module._gradients(parameters, ROWS, batch), batches))
            return ROWS / (time.perf_counter() - started)

    return rate


def sampling(folder: Path, options: argparse.Namespace) -> Callable[[int, int], float]:
    """Candidates per second, by the engine's own loop; only its choice of one thread a batch is left to `threads`."""
    requests = make_requests(folder, options)
    decoding = Decoding(0.7, 0.9, options.max_new_tokens, 1, options.batch)

    def rate(threads: int, beside: int) -> float:
        engine = TransformersEngine.from_path(options.model, threads=beside)
        batches = engine.plan(requests, decoding)
        torch.set_num_threads(threads)
        prepared = (engine._prepare(batch, decoding) for batch in batches)
        started = time.perf_counter()
        count = sum(len(engine._candidates(batch, drawn)) for batch, drawn in engine._in_order(prepared))
        return count / (time.perf_counter() - started)

    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", type=Path, default=SHIPPED, help="folder of a model; chains need a taught one")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64, help="requests per batch")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--kind", choices=("cod", "dd", "cot", "direct"), default="cot")
    options = parser.parse_args()
    ways = {"one core": (1, 1), "two cores on each batch": (2, 1), "a core for each batch": (1, 2)}
    with TemporaryDirectory() as name:
        measured = {"training, rows/s": training(options.model),
                    "sampling, candidates/s": sampling(Path(name), options)}  # fmt: skip
        for what, rate in measured.items():
            rate(1, 1)  # warms up
            found = {way: [] for way in ways}
            for _ in range(options.rounds):
                for way, arguments in ways.items():
                    found[way].append(rate(*arguments))
            for way, rates in found.items():
                ratio = statistics.median(a / b for a, b in zip(rates, found["one core"], strict=True))
                print(f"{what:24s} {way:24s} {statistics.median(rates):8.1f}  {ratio:5.2f}x")


if __name__ == "__main__":
    main()
