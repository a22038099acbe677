"""Where a run's minutes go: by step from the manifests of a finished store, and by operator inside the dearest ones.

    python benchmarks/profile_default.py STORE [--operators]

STORE is read alone and should hold one run. `--operators` computes two micro-batches of training and two batches of
sampled chains of thought with the shipped base under torch's profiler, on one thread: shares, not speeds, and nothing
on a machine that does much else, since an operator's time is the clock's.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from sampling import SEED, SHIPPED, make_requests
from torch.profiler import ProfilerActivity, profile

NOT_WORK = "base", "iterate"
"""Steps that take nothing, or hold all others."""
OPERATORS = 12
Row = dict[str, float]


def steps(store: Path) -> tuple[float, dict[str, Row]]:
    """(seconds of the run as a whole, step -> how often, seconds, seconds in the model, samples, new tokens)."""
    whole, found = 0.0, defaultdict[str, Row](lambda: defaultdict(float))
    for file in sorted(store.glob("*/manifest.json")):
        manifest = json.loads(file.read_text())
        facts = manifest["facts"]
        if manifest["step"] == "iterate":
            whole += facts["seconds"]
        if manifest["step"] not in NOT_WORK:
            row = found[manifest["step"]]
            row["times"] += 1
            for name in ("seconds", "model_seconds", "samples", "new_tokens"):
                row[name] += facts.get(name) or 0
    return whole, dict(found)


def show(whole: float, found: dict[str, Row]) -> None:
    total = sum(row["seconds"] for row in found.values())
    print("| step | times | seconds | share | in the model | samples | new tokens |\n" + "|---" * 7 + "|")
    for name, row in sorted(found.items(), key=lambda pair: -pair[1]["seconds"]):
        print(f"| {name} | {row['times']:.0f} | {row['seconds']:.1f} | {row['seconds'] / total:.0%} "
              f"| {row['model_seconds']:.1f} | {row['samples']:,.0f} | {row['new_tokens']:,.0f} |")  # fmt: skip
    print(f"| all steps | | {total:.1f} | 100% | {sum(row['model_seconds'] for row in found.values()):.1f} | | |")
    print(f"\nThe run: {whole:.1f} s. Steps may run side by side, and then add up to more.")


def training() -> Callable[[], None]:
    """Gradients of two micro-batches of 8 rows."""
    from cores import MICRO

    from sicog_exp.base import SceneTurns, TextTurns
    from sicog_exp.data.chat import ChatEncoder
    from sicog_exp.data.mixture import Mixture
    from sicog_exp.models.loading import ModelSource, load_model
    from sicog_exp.recipe import StageConfig
    from sicog_exp.training.fit import StepBatches
    from sicog_exp.training.modules import SupervisedFineTuning

    model, processor = load_model(ModelSource(str(SHIPPED)))
    encoder, stage = ChatEncoder(processor), StageConfig(batch_size=2 * MICRO, micro_batch_size=MICRO)
    mixture = Mixture([(SceneTurns(0, 8, encoder), 0.7), (TextTurns(0, encoder), 0.3)], 0)
    module, rows = SupervisedFineTuning(model, stage), mixture.rows(0, 2 * MICRO)
    batches = StepBatches(mixture, stage, processor.tokenizer.pad_token_id).micro_batches(rows)

    def run() -> None:
        for batch in batches:
            module.batch_loss(batch)[0].backward()

    return run


def sampling(folder: Path) -> Callable[[], None]:
    """Two batches of 16 questions, 4 chains each."""
    from sicog_exp.generation.engine import Decoding
    from sicog_exp.generation.transformers_engine import TransformersEngine

    options = argparse.Namespace(images=32, candidates=4, kind="cot")
    engine, requests = TransformersEngine.from_path(SHIPPED), make_requests(folder, options)
    decoding = Decoding(1.0, 1.0, 160, SEED, 16)
    batches = [engine._prepare(batch, decoding) for batch in engine.plan(requests, decoding)]

    def run() -> None:
        for batch in batches:
            engine._draw(batch)  # in this thread: the profiler sees no other

    return run


def operators(name: str, run: Callable[[], None]) -> None:
    torch.set_num_threads(1)
    run()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    print(f"\n{name}: {total / 1e6:.2f} s of one core\n\n| operator | share | calls |\n|---|---|---|")
    for event in events[:OPERATORS]:
        print(f"| {event.key} | {event.self_cpu_time_total / total:.1%} | {event.count:,} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--operators", action="store_true")
    options = parser.parse_args()
    show(*steps(options.store))
    if options.operators:
        operators("Training", training())
        with TemporaryDirectory() as name:
            operators("Sampling chains", sampling(Path(name)))


if __name__ == "__main__":
    main()
