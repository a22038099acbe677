"""Candidates per second of our engine against `generate(num_return_sequences=N)`, same model, same batches, in turns.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/sampling.py [--model DIR] [--images 32] [--threads 1]
    python benchmarks/sampling.py --shapes llava-qwen2-7b llava-qwen2-0.5b     # one GPU

Both sides open the same images, apply the same chat template and decode the same number of candidates to text. They
take turns in one process (A B A B ...), so that load from elsewhere falls on both; the ratio is the median of pairs.

With `--shapes` models of random weights sample to the limit of new tokens (32 images x 8 in one batch, 256 tokens,
unless said otherwise), on a GPU in bfloat16 and with captured steps too; rates are new tokens per second, from opening
the images to texts. Here one side takes all its turns before the next one begins, in a memory that holds the model
alone: the buffers of one side would be in the other's way, and a GPU has no load from elsewhere. The first turn of each
warms up. cuDNN, which plans attention anew for each length, is out of torch's attention for all of them, `generate`
included. `--write benchmarks` keeps what is printed, with day, machine and versions.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from results import Results, verdict
from shapes import SHAPES, wait
from shapes import random_model as shaped_model

from sicog_exp.data.chat import to_chat
from sicog_exp.data.questions import questions
from sicog_exp.data.scenes import make_scene, render, rng_for
from sicog_exp.generation.engine import Decoding, Request
from sicog_exp.generation.memory import out_of_memory
from sicog_exp.generation.transformers_engine import TransformersEngine
from sicog_exp.prompts import prompt
from sicog_exp.records import user
from sicog_exp.store import free_memory

SHIPPED = Path(__file__).parents[1] / "sicog_exp" / "models" / "base"
SEED = 11
NEVER = [-1]
"""A stop token that no model draws."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model; the shipped base, else random weights")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="random weights of these shapes, on a GPU if any")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--batch", type=int, help="requests per batch, on both sides; 16, with --shapes all")
    parser.add_argument("--max-new-tokens", type=int, help="160, with --shapes 256")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--kind", choices=("cod", "dd", "cot", "direct"), default="cot")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of the CPU; 1, with a GPU as many as torch takes")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="with --shapes: a dated file of results in it")
    options = parser.parse_args()
    options.batch = options.batch or (options.images if options.shapes else 16)
    options.max_new_tokens = options.max_new_tokens or (256 if options.shapes else 160)
    return options


def random_model(folder: Path) -> Path:
    """Untrained weights in the embedded shape: no answer ends early, so the ratio is a lower bound (about 1.4)."""
    from sicog_exp.models.embedded import build_model, build_processor, build_tokenizer

    tokenizer = build_tokenizer([" ".join(map(str, range(300)))], 400)
    build_model(tokenizer, width=128, vision_layers=3, language_layers=4, heads=4, patch_size=24,
                max_length=1024).save_pretrained(folder)  # fmt: skip
    build_processor(tokenizer, 24, [0.5] * 3, [0.25] * 3).save_pretrained(folder)
    return folder


def make_requests(folder: Path, options: argparse.Namespace) -> list[Request]:
    requests = []
    for i in range(options.images):
        scene, path = make_scene(SEED, "development", i), folder / f"{i}.png"
        Image.fromarray(render(scene, SEED)).save(path)
        question = questions(scene, rng_for(SEED, "development", i, "sampling"), 1)[0]
        message = user(prompt(options.kind, question.text), 1)
        requests.append(Request(scene.id, options.kind, (message,), (path,), options.candidates))
    return requests


def ours(engine: TransformersEngine, requests: Sequence[Request], decoding: Decoding) -> list[int]:
    """Lengths of the candidates drawn by our engine."""
    return [candidate.tokens for batch in engine.sample(requests, decoding) for candidate in batch]


@torch.inference_mode()
def generate(engine: TransformersEngine, requests: Sequence[Request], decoding: Decoding) -> list[int]:
    """Lengths of the candidates drawn by transformers' `generate` over the same batches."""
    processor, stops = engine.encoder.processor, engine.stops.tolist()
    lengths: list[int] = []
    ends = {} if stops == NEVER else {"eos_token_id": stops}
    for batch in engine.plan(requests, decoding):
        texts = [processor.apply_chat_template(to_chat(r.messages), add_generation_prompt=True, tokenize=False)
                 for r in batch]  # fmt: skip
        images = [Image.open(r.images[0]).convert("RGB") for r in batch]
        inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
        inputs = {name: engine._moved(tensor) for name, tensor in inputs.items()}
        output = engine.model.generate(
            **inputs, do_sample=True, temperature=decoding.temperature, top_p=decoding.top_p, top_k=0,
            max_new_tokens=decoding.max_new_tokens, num_return_sequences=batch[0].count,
            pad_token_id=processor.tokenizer.pad_token_id, **ends,
        )[:, inputs["input_ids"].shape[1] :]  # type: ignore[operator]  # fmt: skip
        processor.tokenizer.batch_decode(output, skip_special_tokens=True)
        lengths += ((torch.isin(output, engine.stops).cumsum(1) == 0).sum(1) + 1).clamp(max=output.shape[1]).tolist()
    return lengths


def timed(sample: Callable[..., list[int]], *inputs: object) -> tuple[float, list[int]]:
    start = time.perf_counter()
    lengths = sample(*inputs)
    return len(lengths) / (time.perf_counter() - start), lengths


BARS = {"llava-qwen2-7b": 5.0, "llava-qwen2-0.5b": 10.0}
"""Times `generate`, on one H100."""
AIM = {"llava-qwen2-7b": 14_000}
"""Tokens per second."""
SIDES: dict[str, Callable[..., list[int]]] = {"static cache": ours, "growing cache": ours, "generate": generate}


def of_shape(shape: str, requests: Sequence[Request], options: argparse.Namespace, results: Results) -> None:
    """Our two ways and `generate` on a model that never ends an answer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, processor = shaped_model(shape, device)
    model.generation_config.eos_token_id = None
    results.say(f"\n## {shape}\n\n{options.images} images x {options.candidates}, {options.batch} images a batch, "
                f"{options.max_new_tokens} new tokens, T {options.temperature}, top-p {options.top_p}, median of "
                f"{options.rounds}\n\n| | tokens/s | times generate | peak GB | notes |\n" + 5 * "|---" + "|")
    found: dict[str, tuple[float, str]] = {}
    for side in reversed(SIDES):  # ratios follow when generate is known
        found[side] = of_side(side, model, processor, device, requests, options)
        rate, notes = found[side]
        results.say(f"| {side} | {rate:,.0f} | {rate / found['generate'][0]:.2f} | {notes} |")
    rate = found["static cache"][0]
    if shape in BARS:
        results.say("\n" + verdict("times generate", rate / found["generate"][0], BARS[shape]))
    if shape in AIM:
        results.say(verdict("tokens/s, the aim", rate, AIM[shape]))


def of_side(side: str, model: Any, processor: Any, device: str, requests: Sequence[Request],
            options: argparse.Namespace) -> tuple[float, str]:  # fmt: skip
    """(new tokens per second, the cells behind them); no number where memory is short."""
    engine = TransformersEngine(model, processor, device, static_cache=side == "static cache")
    engine.stops = torch.tensor(NEVER, device=device)
    free_memory()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rates, notes = [], ""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        try:
            for i in range(options.rounds + 1):
                decoding = Decoding(options.temperature, options.top_p, options.max_new_tokens, SEED + i, options.batch)
                wait(device)
                rates.append(tokens_per_second(SIDES[side], engine, requests, decoding))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            rates, notes = [], "out of memory"
    notes = "; ".join([*filter(None, [notes, f"{engine.halved} halvings" if engine.halved else ""]),
                       *(str(w.message) for w in warned if "static_cache" in str(w.message))])  # fmt: skip
    peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if device == "cuda" else ""
    return statistics.median(rates[1:]) if rates[1:] else float("nan"), f"{peak} | {notes}"


def tokens_per_second(sample: Callable[..., list[int]], *inputs: object) -> float:
    start = time.perf_counter()
    tokens = sum(sample(*inputs))  # both end with texts on this side of the GPU, so nothing is still computed
    return tokens / (time.perf_counter() - start)


def main() -> None:
    options = arguments()
    if options.threads or not torch.cuda.is_available():
        torch.set_num_threads(options.threads or 1)
    with tempfile.TemporaryDirectory() as name:
        if not options.shapes:
            return of_model(Path(name), options)
        requests, results = make_requests(Path(name), options), Results("sampling", options.write)
        for shape in options.shapes:
            of_shape(shape, requests, options, results)
            free_memory()


def of_model(folder: Path, options: argparse.Namespace) -> None:
    """Candidates per second of a taught model, whose answers end."""
    source = options.model or (SHIPPED if SHIPPED.exists() else random_model(folder / "model"))
    engine = TransformersEngine.from_path(source)
    requests = make_requests(folder, options)
    sides = {"ours": ours, "generate": generate}
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for i in range(options.rounds + 1):
        # another seed each round, so that one long straggler does not decide
        decoding = Decoding(options.temperature, options.top_p, options.max_new_tokens, SEED + i, options.batch)
        torch.manual_seed(SEED + i)
        for side, sample in sides.items():
            rate, lengths = timed(sample, engine, requests, decoding)
            if i:  # the first round warms up
                rates[side].append(rate)
            else:
                print(f"{side:9s} mean {np.mean(lengths):.1f}, longest {max(lengths)} new tokens")
    ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates["generate"], strict=True))
    print(f"model {source}, {options.images} images x {options.candidates}, batch {options.batch}")
    for side, values in rates.items():
        print(f"{side:9s} {statistics.median(values):8.1f} candidates/s")
    print(f"ratio     {ratio:8.2f}")


if __name__ == "__main__":
    main()
