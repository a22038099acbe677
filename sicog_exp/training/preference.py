"""Preference tuning of a generator: DPO with an SFT term on pairs of its own responses (paper.md, Curation).

The reference is the generator as it comes in. Its log-probabilities are computed once, before the first step, and kept
in scratch; no second model stands in memory while the first one trains.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import IterableDataset

from sicog_exp.data.chat import IGNORED, ChatEncoder
from sicog_exp.data.mixture import ImageTensors, Mixture
from sicog_exp.data.pairs import PairSource, collate_pairs
from sicog_exp.data.table import Pairs, RecordTable, Subset
from sicog_exp.models.loading import ModelSource, load_model, save_model, work_of
from sicog_exp.prompts import Kind
from sicog_exp.recipe import ModelConfig, PreferenceConfig, RecipeError
from sicog_exp.store import Artifact, Workplace
from sicog_exp.training.fit import StageData, fit
from sicog_exp.training.launch import launch
from sicog_exp.training.modules import Means, SupervisedFineTuning
from sicog_exp.training.stages import in_4bit, loaded, step_logger, trained_flops, trained_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHOSEN, REJECTED = "chosen.parquet", "rejected.parquet"
"""Files of a `pairs` artifact: the same ids in the same order, prompts alike, responses not."""
REFERENCE = "reference.jsonl"
"""In scratch: the reference's log-probabilities, a line a finished batch."""


def preference_losses(chosen: Tensor, rejected: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(DPO's loss, its margin) of each pair (Rafailov et al. 2023, equation 7).

    `chosen`, `rejected`: the responses' summed log-probabilities (nats); `reference`: their difference under the
    reference. All have the shape (pairs,).
    """
    margin = beta * (chosen - rejected - reference)
    return -F.logsigmoid(margin), margin


class PreferenceTuning(SupervisedFineTuning):
    """DPO with an SFT term. A step's loss is the mean over its pairs; the SFT term is the chosen response's negative
    log-likelihood a token, so that a long response does not outweigh the preference (Pang et al. 2024)."""

    def __init__(self, model: PreTrainedModel, config: PreferenceConfig) -> None:
        super().__init__(model, config)
        self.beta, self.sft_weight = config.beta, config.sft_weight
        self.means = Means()

    def terms(self, micro_batch: Mapping[str, Any]) -> int:
        """Pairs of a micro-batch."""
        return len(micro_batch["chosen"])

    def log_probabilities(self, micro_batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """(summed log-probability in nats, response tokens) of each sample of a micro-batch, both (samples,)."""
        losses, samples = self.token_losses(micro_batch)
        count = len(micro_batch["sources"])
        summed = losses.new_zeros(count).index_add(0, samples, -losses)
        return summed, torch.bincount(samples, minlength=count)

    def batch_loss(self, micro_batch: Mapping[str, Any]) -> tuple[Tensor, int]:
        """(summed loss, pairs). `chosen` and `rejected` number the pairs' samples, `reference` holds the difference of
        their log-probabilities under the reference."""
        summed, tokens = self.log_probabilities(micro_batch)
        places = micro_batch["chosen"]
        chosen, rejected = summed[places], summed[micro_batch["rejected"]]
        dpo, margin = preference_losses(chosen, rejected, summed.new_tensor(micro_batch["reference"]), self.beta)
        sft = -chosen / tokens[places]
        self._report(dpo, sft, margin)
        return (dpo + self.sft_weight * sft).sum(), len(places)

    def _report(self, dpo: Tensor, sft: Tensor, margin: Tensor) -> None:
        found = {"dpo_loss": dpo, "sft_loss": sft, "margin": margin, "preferred": (margin > 0).float()}
        sums = torch.stack([values.detach().float().sum() for values in found.values()])
        self.means.add(list(found), torch.stack([sums, torch.full_like(sums, len(dpo))], dim=1))

    def on_train_batch_end(self, *args: Any) -> None:
        self.means.log(self)


class PairBatches(IterableDataset):
    """One item is one optimizer step: its pairs as micro-batches, grouped by length. Each pair comes once an epoch."""

    def __init__(self, source: PairSource, config: PreferenceConfig, pad_id: int, seed: int) -> None:
        self.first_step, self.rank, self.ranks = 0, 0, 1
        self.reference: Sequence[float] = [0.0] * (source.rows or 0)
        self._source, self._config, self._pad_id = source, config, pad_id
        self._order = Mixture([(source, 1.0)], seed)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        step, size = self.first_step, self._config.batch_size
        while True:
            slots = range(step * size + self.rank, (step + 1) * size, self.ranks)
            pairs = [index for _, index in map(self._order.locate, slots)]
            yield [self.batch(part) for part in self.parts(pairs)]
            step += 1

    def parts(self, pairs: Sequence[int]) -> list[list[int]]:
        """Pairs by number, cut into micro-batches of like length, the longest first."""
        micro = self._config.micro_batch_size
        ordered = sorted(pairs, key=lambda index: -self._source.lengths[index])
        return [ordered[i : i + micro] for i in range(0, len(ordered), micro)]

    def batch(self, pairs: Sequence[int]) -> dict[str, Any]:
        packed = self._config.max_length if self._config.packing else None
        batch = collate_pairs([self._source.pair(index) for index in pairs], self._pad_id, packed)
        # No tensor: a low precision would round it.
        return batch | {"reference": [self.reference[index] for index in pairs]}


# The reference.


def reference_differences(module: PreferenceTuning, batches: PairBatches, count: int, model: ModelConfig,
                          workplace: Workplace) -> list[float]:  # fmt: skip
    """Each pair's difference of log-probabilities (chosen - rejected) under the model as it is now.

    Every batch is written to scratch when it is done: a killed pass continues, a finished one is only read.
    """
    parts = batches.parts(range(count))
    done = _read_reference(workplace.scratch / REFERENCE)
    missing = [number for number in range(len(parts)) if number not in done]
    if missing:
        module.to(torch.device(model.torch_device)).eval()
        if model.precision == "bf16-true":
            module.to(torch.bfloat16)
    started = time.perf_counter()
    with (workplace.scratch / REFERENCE).open("a") as file:
        for number, found in _scored(module, batches, {i: parts[i] for i in missing}, model):
            done[number], now = found, time.perf_counter()
            file.write(json.dumps({"batch": number, "differences": found, "seconds": now - started}) + "\n")
            file.flush()
            os.fsync(file.fileno())
            started = now
    by_pair = {pair: value for number, part in enumerate(parts) for pair, value in zip(part, done[number], strict=True)}
    return [by_pair[pair] for pair in range(count)]


def _read_reference(path: Path) -> dict[int, list[float]]:
    """The finished batches; a last line that a kill tore is dropped from the file."""
    if not path.exists():
        return {}
    whole, newline, torn = path.read_text().rpartition("\n")
    if torn:
        path.write_text(whole + newline)
    return {row["batch"]: row["differences"] for row in map(json.loads, whole.splitlines())}


def _reference_seconds(workplace: Workplace) -> float:
    """What all batches of the finished pass took, those of killed attempts too."""
    rows = map(json.loads, (workplace.scratch / REFERENCE).read_text().splitlines())
    return sum(row.get("seconds", 0.0) for row in rows)


def _scored(module: PreferenceTuning, batches: PairBatches, parts: Mapping[int, Sequence[int]], model: ModelConfig
            ) -> Iterator[tuple[int, list[float]]]:  # fmt: skip
    """Some batches at once, a CPU core each, as in training; their bits do not depend on how many."""
    side_by_side = model.threads if model.torch_device == "cpu" and model.precision == "32-true" else 1
    if model.torch_device == "cpu":
        torch.set_num_threads(1)
    numbers = list(parts)
    with ThreadPoolExecutor(side_by_side) as threads:
        for start in range(0, len(numbers), side_by_side):
            group = numbers[start : start + side_by_side]
            made = [batches.batch(parts[number]) for number in group]
            yield from zip(group, threads.map(lambda batch: _differences(module, batch, model), made), strict=True)


@torch.no_grad()
def _differences(module: PreferenceTuning, batch: Mapping[str, Any], model: ModelConfig) -> list[float]:
    device = torch.device(model.torch_device)
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    for name, value in moved.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            moved[name] = value.to(module.model.dtype)
    with torch.autocast(device.type, torch.bfloat16, enabled=model.precision == "bf16-mixed"):
        summed, _ = module.log_probabilities(moved)
    return (summed[moved["chosen"]] - summed[moved["rejected"]]).tolist()


# The stage as a step.


@dataclass(frozen=True)
class PreferenceTask:
    """What the stage depends on besides its input artifacts (`model`, `pairs`, and `data` with the images)."""

    stage: PreferenceConfig
    model: ModelConfig
    seed: int
    kinds: tuple[Kind, ...]
    """Kinds of the pairs used; two generators take one half each."""
    max_pixels: int = 50_000_000


def prefer(task: PreferenceTask, inputs: Mapping[str, Artifact], workplace: Workplace) -> None:
    """Tune the input model on its pairs. Raises RecipeError when there is none."""
    if task.model.ranks == 1:
        return train(task, inputs, workplace)
    _keep_reference(task, inputs, workplace)
    launch("prefer", task, inputs, workplace)


def _keep_reference(task: PreferenceTask, inputs: Mapping[str, Artifact], workplace: Workplace) -> None:
    """One device reads all pairs before several train on them: it holds the model for sampling too."""
    model, processor = load_model(ModelSource.of(inputs["model"].path, task.model), **in_4bit(task.stage))
    source = _pairs(task, inputs, ChatEncoder(processor), workplace.scratch)
    batches = PairBatches(source, task.stage, processor.tokenizer.pad_token_id, task.seed)
    torch.manual_seed(task.seed)
    reference_differences(PreferenceTuning(model, task.stage), batches, source.rows or 0, task.model, workplace)


def train(task: PreferenceTask, inputs: Mapping[str, Artifact], workplace: Workplace) -> None:
    """The stage in this process, which may be one rank of several, the reference being known then."""
    origin = ModelSource.of(inputs["model"].path, task.model)
    model, processor = loaded(origin, task.stage, task.model)
    torch.manual_seed(task.seed)  # adapters start at random
    source = _pairs(task, inputs, ChatEncoder(processor), workplace.scratch)
    batches = PairBatches(source, task.stage, processor.tokenizer.pad_token_id, task.seed)
    module = PreferenceTuning(model, task.stage)
    count = source.rows or 0
    batches.reference = reference_differences(module, batches, count, task.model, workplace)
    fit(module, StageData(batches), task.model, workplace, task.seed, step_logger(workplace))
    whole = trained_model(module, origin, task.stage)
    if whole is None:
        return
    work, again = work_of(whole), task.model.gradient_checkpointing
    workplace.add(model_seconds=_reference_seconds(workplace))
    workplace.add(pairs=count, flops=trained_flops(workplace.facts, work, task.stage, again)
                  + work.sampling(*_size(source, module)))  # fmt: skip
    save_model(whole, processor, workplace.directory)


def _size(source: PairSource, module: PreferenceTuning) -> tuple[int, int, int]:
    """(prompt, image, response) tokens of all pairs: what the reference read."""
    image = module.model.config.image_token_id
    rows = [example for index in range(source.rows or 0) for example in source.examples(index)]
    new = sum(label != IGNORED for row in rows for label in row.labels[1:])
    return sum(map(len, rows)) - new, sum(row.input_ids.count(image) for row in rows), new


def _pairs(task: PreferenceTask, inputs: Mapping[str, Artifact], encoder: ChatEncoder, scratch: Path) -> PairSource:
    images = ImageTensors(inputs["data"].path, encoder, task.max_pixels)
    source = PairSource(read_pairs(inputs["pairs"].path, task.kinds, scratch), images, encoder, task.stage.max_length)
    if source.too_long:
        print(f"preference: {len(source.too_long)} pairs are longer than {task.stage.max_length} tokens and set aside, "
              f"for example {source.too_long[0]}")  # fmt: skip
    if not source.rows:
        raise RecipeError(f"preference.rejected={task.stage.rejected}: no pair of kind {', '.join(task.kinds)}: "
                          "nothing is kept, or nothing else is said to reject. Raise preference.images or "
                          "sampling's candidates, lower curation's thresholds, or set preference.steps=0")  # fmt: skip
    return source


def read_pairs(folder: Path, kinds: Sequence[Kind], scratch: Path) -> Pairs:
    """(chosen, rejected) of each pair of these kinds."""
    chosen, rejected = (RecordTable([folder / name], scratch / "rows") for name in (CHOSEN, REJECTED))
    positions = np.flatnonzero(np.isin(chosen.column("kind"), kinds))
    return Pairs(Subset(chosen, positions), Subset(rejected, positions))
