"""Run one stage: build the Trainer, feed it, checkpoint it, continue it after a kill."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import ClusterEnvironment, LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sicog_exp.data.mixture import Mixture, MixtureError, Row, collate, fill_bins, groups_of_bins, pack
from sicog_exp.interruption import Terminated
from sicog_exp.recipe import ModelConfig, StageConfig
from sicog_exp.store import Workplace
from sicog_exp.training.launch import RANKS, STOP
from sicog_exp.training.modules import LOG_EVERY, Stage

# Lightning's notices about devices and its tips at every stage would bury our progress.
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


class StepBatches(IterableDataset):
    """One item is one optimizer step, from `first_step` to the stage's last: its rows as micro-batches, grouped by
    length, or packed. Both stay inside a step, so that every step keeps the mixture's composition.
    """

    def __init__(self, mixture: Mixture, stage: StageConfig, pad_id: int) -> None:
        self.first_step, self.rank, self.ranks = 0, 0, 1
        self._mixture, self._stage, self._pad_id = mixture, stage, pad_id

    def __iter__(self) -> Iterator[list[dict[str, Any]] | MixtureError]:
        worker, size = get_worker_info(), self._stage.batch_size
        place, stride = (worker.id, worker.num_workers) if worker else (0, 1)  # loaders take turns, in order
        for step in range(self.first_step + place, self._stage.steps, stride):
            try:
                made = self.micro_batches(self._mixture.rows(step * size, size, self.rank, self.ranks))
            except ValueError as error:
                if not worker:
                    raise
                yield MixtureError(str(error))  # a loader's own way would bury these words in two tracebacks
                return
            yield made

    def micro_batches(self, rows: list[Row]) -> list[dict[str, Any]]:
        stage, micro = self._stage, self._stage.micro_batch_size
        if stage.packing:
            # All of a step's rows find their bins together: eight by themselves leave a sixth of theirs empty.
            bins = fill_bins(rows, stage.max_length)
            return [pack(group, self._pad_id) for group in groups_of_bins(bins, micro)]
        # The longest first, so that micro-batches side by side end together.
        rows = sorted(rows, key=lambda row: -len(row.example))
        return [collate(rows[i : i + micro], self._pad_id) for i in range(0, len(rows), micro)]


class Checkpoints(Callback):
    """The newest checkpoint of a stage, replaced atomically; weights never leave this folder as a pickle.

    Also counts what was trained on, over all ranks, so that a continued stage reports the whole of its work; and ends
    training, with a checkpoint, when SIGTERM asks for it, or the process that started the ranks.
    """

    def __init__(self, workplace: Workplace, every: int) -> None:
        self._folder, self._workplace, self._every = workplace.scratch, workplace, every
        self._asked_to_stop = False

    def state_dict(self) -> dict[str, Any]:
        return dict(self._workplace.facts)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._workplace.facts.update(state_dict)

    @staticmethod
    def newest(folder: Path) -> Path | None:
        return max(folder.glob("step-*.ckpt"), default=None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark = time.perf_counter()
        if threading.current_thread() is threading.main_thread():
            # Between steps: a step broken off in the middle would leave other ranks waiting. Lightning, whose own
            # handler waits for ranks that got no signal, puts back what was there before.
            signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, *_: object) -> None:
        self._asked_to_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._count_seconds()

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self._workplace.add(model_seconds=now - self._mark)
        self._mark = now

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any,
                           batch_idx: int) -> None:  # fmt: skip
        step, stop = trainer.global_step, self._counted(cast(Stage, pl_module), batch)
        self._count_seconds()
        if self._workplace.progress:
            self._workplace.progress(step, trainer.max_steps)
        if stop or (step % self._every == 0 and step < trainer.max_steps):
            self._save(trainer, step)
        if stop:
            raise Terminated(f"stopped by SIGTERM behind training step {step}; the same command continues")

    def _counted(self, module: Stage, batch: Any) -> bool:
        """Adds the step's work, and says whether any rank was asked to stop."""
        work = module.work(batch)
        asked = self._asked_to_stop or (self._folder / RANKS / STOP).exists()
        *sums, stop = module.over_ranks(*work.values(), asked)
        self._workplace.add(**{name: int(value) for name, value in zip(work, sums, strict=True)})
        return stop > 0

    def _save(self, trainer: Trainer, step: int) -> None:
        """Every rank takes part; the first one writes."""
        older = list(self._folder.glob("step-*.ckpt"))
        temporary = self._folder / "writing.tmp"
        trainer.save_checkpoint(temporary)
        if not trainer.is_global_zero:
            return
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        newest = temporary.rename(self._folder / f"step-{step:08d}.ckpt")
        for path in older:
            if path != newest:
                path.unlink(missing_ok=True)


class StageData(LightningDataModule):
    """Feeds a stage its optimizer steps, from `first_step` on.

    `workers` above 0 make the rows ahead in processes of their own, for rows that are dear to make; the order stays the
    same. More than 1 need a stream that shares its steps out among them.
    """

    def __init__(self, batches: Any = None, workers: int = 0) -> None:
        super().__init__()
        self.batches, self.workers = batches, workers
        self.first_step, self.rank, self.ranks = 0, 0, 1

    def train_dataloader(self) -> DataLoader:
        self.batches.first_step = self.first_step
        if self.ranks > 1:
            self.batches.rank, self.batches.ranks = self.rank, self.ranks
        ahead: dict[str, Any] = {}
        if self.workers:
            # Persistent ones are those that Lightning ends when training fails.
            ahead = {"prefetch_factor": 4, "worker_init_fn": _begin_loading, "persistent_workers": True}
        return DataLoader(self.batches, batch_size=None, num_workers=self.workers, **ahead)


def _begin_loading(_: int) -> None:
    # SIGTERM to all of a job's processes must leave the loaders to the step that training still finishes.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads did not come along


def fit(module: Stage, data: StageData, model: ModelConfig, workplace: Workplace, seed: int,
        logger: Logger | None = None) -> None:  # fmt: skip
    """Train `module` for its configured steps, from the newest checkpoint in the workplace's scratch if there is one.

    With several devices this process is one rank of several (see `training.launch`), which all call this. Raises
    RuntimeError when fewer steps were done than asked for: a stage never reports success untrained.
    """
    workplace.device = model.device_name
    torch.manual_seed(seed)
    torch.set_num_threads(model.threads)
    if runs_side_by_side(module.config, model):
        torch.set_num_threads(1)
        module.threads = ThreadPoolExecutor(model.threads)
    checkpoint = Checkpoints.newest(workplace.scratch)
    if checkpoint:
        data.first_step = int(checkpoint.stem.removeprefix("step-"))
    strategy, environment = strategy_of(model)
    trainer = Trainer(
        max_steps=module.config.steps, max_epochs=-1, accelerator=model.device, devices=model.devices,
        num_nodes=model.nodes, strategy=strategy, plugins=[environment], precision=model.precision,
        logger=logger or False, log_every_n_steps=LOG_EVERY, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        callbacks=[Checkpoints(workplace, module.config.checkpoint_every)],
    )  # fmt: skip
    module.ranks, module.scratch = model.ranks, workplace.scratch
    data.rank, data.ranks = environment.global_rank(), model.ranks
    module.train()
    # Our own checkpoint, written moments ago by this user: Lightning's optimizer state needs the full loader.
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=False)
    module.eval()
    if module.threads:
        module.threads.shutdown()
    if trainer.global_step == 0 or trainer.global_step != module.config.steps:
        raise RuntimeError(f"trained {trainer.global_step} of {module.config.steps} steps")
    workplace.add(steps=trainer.global_step)


def strategy_of(model: ModelConfig) -> tuple[Strategy | str, ClusterEnvironment]:
    """Lightning's strategy, and how it finds the other ranks: none, or those that torchrun started.

    It is named even for one process, since Lightning would otherwise take a SLURM job's variables for its own.
    """
    if model.ranks == 1:
        return "auto", LightningEnvironment()
    if model.strategy == "fsdp":
        return ModelParallelStrategy(model.ranks, 1, save_distributed_checkpoint=False), TorchElasticEnvironment()
    return DDPStrategy(find_unused_parameters=True), TorchElasticEnvironment()


def runs_side_by_side(stage: StageConfig, model: ModelConfig) -> bool:
    """Whether each CPU core takes a micro-batch of its own.

    Measured at the embedded size: 1.66x the rows/s of one core, where both cores on each micro-batch reach 0.81x
    (benchmarks/2026-11-24-cores.md).
    """
    several = stage.micro_batch_size < stage.batch_size and model.threads > 1 and model.ranks == 1
    return several and model.torch_device == "cpu" and model.precision == "32-true"
