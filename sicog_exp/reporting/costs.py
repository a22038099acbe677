"""What a run cost, step by step, and what each generation took to make: its compute, with and without sampling."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SAMPLING = ("generate", "preference-generate", "preference-reject", "embed")
"""Beginnings of the names of stages that sample training data, or embed it to be curated."""
SCORING = ("evaluate",)
"""Those of stages that only measure: a generation could be made without them."""
MEASURES = ("seconds", "samples", "tokens", "flops")


@dataclass(frozen=True)
class CostRow:
    """One step. `cached`: the figures are those of the earlier run that made it. `image_tokens` are among the
    `prompt_tokens`; `new_tokens` were sampled, or predicted in training."""

    generation: int
    stage: str
    seconds: float
    samples: int | None = None
    tokens: int | None = None
    flops: float | None = None
    peak_mb: float | None = None
    cached: bool = False
    prompt_tokens: int | None = None
    image_tokens: int | None = None
    new_tokens: int | None = None
    peak_gpu_mb: float | None = None
    device: str = ""


@dataclass(frozen=True)
class Cost:
    """`orchestration_share`: the share of wall time that was not model compute."""

    rows: tuple[CostRow, ...]
    orchestration_share: float | None = None
    device: str = ""


@dataclass(frozen=True)
class Compute:
    """FLOPs that were spent until a generation was there: all but evaluation, and without those of sampling."""

    generation: int
    flops: float
    trained: float


def cumulative(rows: Sequence[CostRow]) -> list[Compute]:
    """Generation by generation, what it took to make it and those before it."""
    made, flops, trained = [], 0.0, 0.0
    for generation in sorted({row.generation for row in rows}):
        own = [row for row in rows if row.generation == generation and not row.stage.startswith(SCORING)]
        flops += sum(row.flops or 0.0 for row in own)
        trained += sum(row.flops or 0.0 for row in own if not row.stage.startswith(SAMPLING))
        made.append(Compute(generation, flops, trained))
    return made


def metrics(rows: Sequence[CostRow], accuracy: Mapping[int, float]) -> dict[int, dict[str, float]]:
    """Generation -> its costs under the names that every generation uses.

    `cost/<stage>/<measure>` and `cost/added/<measure>` (over all stages) are a generation's own. `cost/flops` is what
    it took until the generation was there, the sum of `cost/training_flops` and `cost/generation_flops` (sampling);
    the last ones are the run's. `accuracy`: generation -> mean accuracy, a share; `gain/per_petaflop` is the gain over
    the first generation, in points, by what was spent since.
    """
    named: dict[int, dict[str, float]] = defaultdict(dict)
    for row in rows:
        for measure in MEASURES:
            value = getattr(row, measure)
            for name in (f"cost/{row.stage}/{measure}", f"cost/added/{measure}") if value is not None else ():
                named[row.generation][name] = named[row.generation].get(name, 0.0) + value
    steps = cumulative(rows)
    for step in steps:
        named[step.generation] |= {"cost/flops": step.flops, "cost/training_flops": step.trained,
                                   "cost/generation_flops": step.flops - step.trained}  # fmt: skip
        named[step.generation] |= _gain(steps[0], step, accuracy)
    return dict(named)


def _gain(first: Compute, step: Compute, accuracy: Mapping[int, float]) -> dict[str, float]:
    if step.flops <= first.flops or not {first.generation, step.generation} <= set(accuracy):
        return {}
    points = 100 * (accuracy[step.generation] - accuracy[first.generation])
    return {"gain/per_petaflop": points / ((step.flops - first.flops) / 1e15)}
