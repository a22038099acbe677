"""The loop's training stages as steps: what each one reads, mixes and trains."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.loggers import Logger
from transformers import PreTrainedModel

from sicog_exp.data.chat import ChatEncoder
from sicog_exp.data.mixture import (
    CACHE_BYTES,
    ImageTensors,
    Mixture,
    RecordSource,
    Rejected,
    capped,
    read_rejected,
)
from sicog_exp.data.table import RecordTable, Subset
from sicog_exp.models.adapters import copy_trained, layers_kept_whole, merge_adapters
from sicog_exp.models.compose import fresh_projector
from sicog_exp.models.loading import ModelSource, Work, load_model, save_model, work_of
from sicog_exp.prompts import COD_TURNS, KINDS, Kind, steps_of
from sicog_exp.recipe import CapsConfig, ModelConfig, StageConfig
from sicog_exp.records import Record, read_jsonl, turns_conversation, write_jsonl
from sicog_exp.store import REJECTED, Artifact, Workplace
from sicog_exp.training.fit import StageData, StepBatches, fit
from sicog_exp.training.launch import launch
from sicog_exp.training.modules import MultimodalPretraining, SupervisedFineTuning
from sicog_exp.training.shards import gather

REVISION = 3
SELF_SOURCES = ("self_caption", "self_cot", "self_direct")
REJECTED_ROWS = "rejected"
"""In scratch: rows that cannot train, a file a process."""
WEIGHTS = "weights.jsonl"
"""Of a curation artifact whose rows are not all drawn alike: self-generated row -> how often it is drawn."""


@dataclass(frozen=True)
class TrainingTask:
    """What one stage depends on besides its input artifacts (`model`, `data` and, for pre-training, `curated`)."""

    stage: StageConfig
    model: ModelConfig
    shares: Mapping[str, float]
    """Shares of the mixture by source: annotated, instruction, alignment, text, SELF_SOURCES and
    self_turns."""
    seed: int
    kinds: tuple[Kind, ...] = KINDS
    """Kinds of the annotated rows used; two generators take one half each."""
    max_pixels: int = 50_000_000
    caps: CapsConfig = field(default_factory=CapsConfig)
    """The most distinct rows by source and kind."""


def training_table(inputs: Mapping[str, Artifact], scratch: Path) -> RecordTable:
    """All rows that a stage may train on."""
    data = inputs["data"]
    files = [data / f"{name}.parquet" for name in ("instruction", "annotated", "alignment")]
    own = [inputs["curated"] / "self.parquet"] if "curated" in inputs else []
    return RecordTable([path for path in files if path.is_file()] + own, scratch / "rows")


def rows_by_source(task: TrainingTask, inputs: Mapping[str, Artifact], scratch: Path) -> dict[str, Subset]:
    """source -> its records, for every source to which the task's shares give one, at most as many as its caps say."""
    table = training_table(inputs, scratch)
    file, kind, source = table.files, table.column("kind"), table.column("source")
    text = kind == "text"
    chosen = {
        "annotated": (file == "annotated") & ~text & np.isin(kind, task.kinds),
        "instruction": (file == "instruction") & ~text,
        "alignment": file == "alignment",
        "text": np.isin(file, ("instruction", "annotated")) & text,
        **{name: (file == "self") & (source == name) for name in SELF_SOURCES},
        "self_turns": (file == "self") & (source == "self_caption") & (kind == "cod"),
    }
    shared = [name for name, share in task.shares.items() if share > 0]
    whole = {name: Subset(table, np.flatnonzero(chosen[name])) for name in shared}
    if "self_turns" in whole:
        whole["self_turns"] = conversations(whole["self_turns"])
    return {name: within_caps(name, rows, task) for name, rows in whole.items()}


def within_caps(source: str, rows: Subset, task: TrainingTask) -> Subset:
    """What the task's caps leave of a source."""
    if task.caps == CapsConfig():
        return rows
    kinds = rows.table.column("kind")[rows.positions].tolist()
    return rows.part(capped(rows.ids, kinds, source, task.caps, task.seed))


def conversations(captions: Subset) -> Subset:
    """Each Chain-of-Description caption as a conversation, a turn a step; one with an empty step is left out."""
    whole = [number for number, record in enumerate(captions) if caption_turns(record)]
    return captions.part(whole, lambda record: caption_turns(record) or record)


def caption_turns(record: Record) -> Record | None:
    """A Chain-of-Description caption as a conversation, a turn a step; None where a step is empty."""
    steps = steps_of("cod", record.response or "")
    if not steps or not all(steps):
        return None
    messages = turns_conversation(list(zip(COD_TURNS, steps, strict=True)), len(record.images))
    return replace(record, id=f"{record.id}:turns", messages=messages, source="self_turns")


def build_mixture(task: TrainingTask, inputs: Mapping[str, Artifact], encoder: ChatEncoder, scratch: Path) -> Mixture:
    """The task's rows, on disk until they are drawn. Raises MixtureError when no source has one."""
    kept = CACHE_BYTES // max(task.model.loader_processes, 1)
    length, images = task.stage.max_length, ImageTensors(inputs["data"].path, encoder, task.max_pixels, kept)
    rejected, rows = Rejected(scratch / REJECTED_ROWS), rows_by_source(task, inputs, scratch)
    sources = [(RecordSource(name, records, images, encoder, length, rejected.add), task.shares[name])
               for name, records in rows.items()]  # fmt: skip
    drawn = row_weights(inputs)
    own = [name for name in SELF_SOURCES if name in rows] if drawn else []
    return Mixture(sources, task.seed, {name: [drawn[id] for id in rows[name].ids] for name in own})


def row_weights(inputs: Mapping[str, Artifact]) -> dict[str, float]:
    """Self-generated row -> how often it is drawn, where curation says so; empty where all are drawn alike."""
    file = inputs["curated"] / WEIGHTS if "curated" in inputs else None
    return {row["id"]: row["weight"] for row in read_jsonl(file)} if file and file.is_file() else {}


class MixtureData(StageData):
    """A stage's mixture behind a LightningDataModule. `processor` and `scratch`, a folder for what training reads again
    and again, are set when the stage's model is loaded."""

    def __init__(self, task: TrainingTask, inputs: Mapping[str, Artifact]) -> None:
        super().__init__(workers=task.model.loader_processes)
        self.task, self.inputs = task, dict(inputs)
        self.processor: Any = None
        self.scratch = Path()

    def setup(self, stage: str) -> None:
        mixture = build_mixture(self.task, self.inputs, ChatEncoder(self.processor), self.scratch)
        self.batches = StepBatches(mixture, self.task.stage, self.processor.tokenizer.pad_token_id)


def fine_tune(task: TrainingTask, inputs: Mapping[str, Artifact], workplace: Workplace) -> None:
    """Develop, align or instruct: supervised fine-tuning of the input model on the task's mixture."""
    run_stage("fine_tune", MixtureData(task, inputs), workplace)


def pretrain(data: MixtureData, workplace: Workplace) -> None:
    """Multimodal pre-training on a mixture that holds self-generated data."""
    run_stage("pretrain", data, workplace)


MODULES: Mapping[str, type[SupervisedFineTuning]] = {"fine_tune": SupervisedFineTuning,
                                                     "pretrain": MultimodalPretraining}  # fmt: skip


def run_stage(stage: str, data: MixtureData, workplace: Workplace) -> None:
    """The stage in this process or on several devices, and what it could not use."""
    if data.task.model.ranks > 1:
        training_table(data.inputs, workplace.scratch)  # once, before several processes map it
        launch(stage, data.task, data.inputs, workplace)
    else:
        train(stage, data, workplace)
    keep_rejected(workplace)


def keep_rejected(workplace: Workplace) -> None:
    """Rows that were drawn and could not train: into the artifact, counted, and said."""
    rows = read_rejected(workplace.scratch / REJECTED_ROWS)
    if rows:
        write_jsonl(workplace.directory / REJECTED, rows)
        workplace.add(rejected=len(rows))
        first = rows[0]
        print(f"training: {len(rows)} rows that were drawn cannot train and were set aside ({REJECTED}), such as "
              f"{first['id']} of {first['source']}: {first['reason']}")  # fmt: skip


def train(stage: str, data: MixtureData, workplace: Workplace) -> None:
    """The stage in this process, which may be one rank of several."""
    task, data.scratch = data.task, workplace.scratch
    source = ModelSource.of(data.inputs["model"].path, task.model)
    model, data.processor = loaded(source, task.stage, task.model)
    torch.manual_seed(task.seed)  # adapters start at random
    module = MODULES[stage](model, task.stage)
    fit(module, data, task.model, workplace, task.seed, step_logger(workplace))
    whole = trained_model(module, source, task.stage)
    if whole is None:
        return
    again = task.model.gradient_checkpointing
    workplace.add(flops=trained_flops(workplace.facts, work_of(whole), task.stage, again))
    save_model(whole, data.processor, workplace.directory)


def loaded(source: ModelSource, stage: StageConfig, machine: ModelConfig) -> tuple[PreTrainedModel, Any]:
    """A stage's model, as this process holds it before training, and its processor. Of ranks that train in shards the
    first one alone reads weights."""
    shapes_alone = machine.strategy == "fsdp" and int(os.environ["RANK"]) > 0
    model, processor = load_model(source, **({"device_map": "meta"} if shapes_alone else in_4bit(stage)))
    if machine.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, processor


def trained_model(module: SupervisedFineTuning, source: ModelSource, stage: StageConfig) -> PreTrainedModel | None:
    """The model behind training, whole and without adapters; None on every rank but the first. All ranks must ask."""
    gather(module)
    if module.global_rank:
        return None
    return merged(module.model, source, stage) if stage.lora_rank else module.model


def trained_flops(facts: Mapping[str, float], work: Work, stage: StageConfig, again: bool) -> float:
    """FLOPs of the tokens that a stage counted; `again`: activations were computed twice."""
    tokens, image, new = (facts[name] for name in ("tokens", "image_tokens", "new_tokens"))
    return work.training(tokens, image, new, stage.trained, stage.adapted, again)


@dataclass(frozen=True)
class PartsTask:
    """What raw parts depend on besides the base model."""

    seed: int
    trust_remote_code: bool = False


def raw_parts(task: PartsTask, inputs: Mapping[str, Artifact], workplace: Workplace) -> None:
    """The base's vision tower and language model with a projector that has learned nothing yet."""
    model, processor = load_model(ModelSource(str(inputs["model"].path), task.trust_remote_code))
    fresh_projector(model, task.seed)
    save_model(model, processor, workplace.directory)


def in_4bit(stage: StageConfig) -> dict[str, Any]:
    """How transformers loads a base for QLoRA; nothing for any other stage."""
    if not stage.lora_4bit:
        return {}
    from transformers import BitsAndBytesConfig

    kept = layers_kept_whole(stage.lora_parts)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
                                llm_int8_skip_modules=kept)  # fmt: skip
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}


def merged(model: PreTrainedModel, source: ModelSource, stage: StageConfig) -> PreTrainedModel:
    """The trained model without adapters. Those trained beside weights in 4 bits go to the weights in full."""
    if stage.lora_4bit:
        quantized, (model, _) = model, load_model(source)
        copy_trained(quantized, SupervisedFineTuning(model, stage).model)
    merge_adapters(model)
    return model


def step_logger(workplace: Workplace) -> Logger | None:
    """Lightning's metrics go to the step's own MLflow run; Lightning ends that run when training ends."""
    if not workplace.tracked_run:
        return None
    from lightning.pytorch.loggers import MLFlowLogger
    from mlflow import get_tracking_uri

    return MLFlowLogger(run_id=workplace.tracked_run, tracking_uri=get_tracking_uri(), log_model=False)
