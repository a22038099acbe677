"""LightningModules. One optimizer step is one batch here: its rows come as micro-batches whose losses are summed over
response tokens and divided by the step's number of response tokens, so that accumulation, batch split and padding do
not change the gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import functional as F

from sicog_exp.data.chat import IGNORED
from sicog_exp.models.adapters import MARK, add_adapters
from sicog_exp.models.families import packing_problem, token_types
from sicog_exp.models.loading import part_parameters
from sicog_exp.recipe import StageConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


LOG_EVERY = 10
"""Optimizer steps between logged metrics."""
NOT_THE_MODELS = ("labels", "segments", "sources", "chosen", "rejected", "reference")
"""What a micro-batch holds besides the model's inputs."""


def learning_rate_factor(step: int, steps: int, warmup_ratio: float) -> float:
    """Linear warm-up, then cosine to 0 (paper.md, Training). `step` counts from 0."""
    warmup = max(1, round(steps * warmup_ratio))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def build_optimizer(config: StageConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW, fused, or with moments in 8 bits."""
    if config.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, weight_decay=config.weight_decay, betas=(0.9, 0.98))
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay, betas=(0.9, 0.98), fused=True)


class Stage(LightningModule):
    """What all stages share: part-wise learning rates, the schedule, clipping and the manual optimizer step."""

    threads: ThreadPoolExecutor | None = None
    """Computes micro-batches side by side, where one processor core each is faster than all cores on each."""

    def __init__(self, config: StageConfig) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config = config

    def parameter_groups(self) -> list[dict[str, Any]]:
        raise NotImplementedError

    def batch_loss(self, micro_batch: Mapping[str, Any]) -> tuple[Tensor, int]:
        """(summed loss, number of terms) of a micro-batch."""
        raise NotImplementedError

    def work(self, batch: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """What one optimizer step trained on, summed over its micro-batches: samples, and for a language model its
        tokens: all, those of prompts, those of images (which are prompts'), and the predicted ones (new)."""
        raise NotImplementedError

    def training_step(self, batch: Sequence[Mapping[str, Any]], batch_idx: int) -> None:
        optimizer, scheduler = cast(Any, self.optimizers()), cast(Any, self.lr_schedulers())
        optimizer.zero_grad()
        terms = self._all_terms(sum(self.terms(micro) for micro in batch))
        loss = self._side_by_side(batch, terms) if self.threads else self._one_by_one(batch, terms)
        norm = torch.nn.utils.clip_grad_norm_(self.trained_parameters, self.config.clip_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"step {self.global_step}: loss {float(loss)}, gradient norm {float(norm)}; lower "
                                     "the learning rate; the last checkpoint is untouched")  # fmt: skip
        self.log_dict({"loss": loss, "grad_norm": norm, "learning_rate": scheduler.get_last_lr()[0]})
        optimizer.step()
        scheduler.step()

    def _one_by_one(self, batch: Sequence[Mapping[str, Any]], terms: int) -> Tensor:
        loss = torch.zeros((), device=self.device)
        for micro in batch:
            summed, _ = self.batch_loss(micro)
            # Data-parallel strategies average gradients over ranks, so each rank's share is scaled back up.
            # A micro-batch of text alone reaches no trained parameter where only the projector trains.
            if summed.requires_grad:
                self.manual_backward(summed * self.trainer.world_size / terms)
            loss += summed.detach() / terms
        return loss

    def _side_by_side(self, batch: Sequence[Mapping[str, Any]], terms: int) -> Tensor:
        """Gradients are summed in the micro-batches' order, so that their bits do not depend on the threads' pace."""
        assert self.threads
        parameters = self.trained_parameters
        loss = torch.zeros(())
        for part, gradients in self.threads.map(partial(self._gradients, parameters, terms), batch):
            loss += part
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return loss

    def _gradients(self, parameters: Sequence[Tensor], terms: int,
                   micro_batch: Mapping[str, Any]) -> tuple[Tensor, Sequence[Tensor | None]]:  # fmt: skip
        loss = self.batch_loss(micro_batch)[0] / terms
        if not loss.requires_grad:
            return loss, [None] * len(parameters)
        return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)

    def terms(self, micro_batch: Mapping[str, Any]) -> int:
        """Response tokens of a micro-batch: positions with a label, the first one never being predicted."""
        return int((micro_batch["labels"][:, 1:] != IGNORED).sum())

    def _all_terms(self, count: int) -> int:
        if self.trainer.world_size == 1:
            return count
        return int(cast(Tensor, self.all_gather(torch.tensor(count, device=self.device))).sum())

    @property
    def trained_parameters(self) -> list[torch.nn.Parameter]:
        return [p for group in self.parameter_groups() for p in group["params"]]

    def configure_optimizers(self) -> Any:
        config = self.config
        groups = self.parameter_groups()
        optimizer = build_optimizer(config, groups)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, config.steps, config.warmup_ratio))  # fmt: skip
        return [optimizer], [scheduler]


class SupervisedFineTuning(Stage):
    """Next-token loss on response tokens; each part of the model has its own learning rate, 0 freezes it."""

    def __init__(self, model: PreTrainedModel, config: StageConfig) -> None:
        super().__init__(config)
        problem = packing_problem(model)
        if config.packing and problem:
            raise ValueError(f"packing=true: {model.config.model_type} {problem}; set packing=false for this model")
        self.model = model
        self.rates = {"vision": config.vision_lr, "projector": config.projector_lr, "language": config.language_lr}
        adapted = config.lora_parts if config.lora_rank else ()
        if adapted:
            add_adapters(model, adapted, config.lora_rank, config.lora_alpha or 2 * config.lora_rank)
        adapters = {id(parameter) for name, parameter in model.named_parameters() if MARK in name}
        for part, parameters in part_parameters(model).items():
            for parameter in parameters:
                trains = part not in adapted or id(parameter) in adapters
                # what holds whole numbers, weights in 4 bits, has no gradient
                if parameter.is_floating_point():
                    parameter.requires_grad = self.rates[part] > 0 and trains

    def parameter_groups(self) -> list[dict[str, Any]]:
        trained = {part: [p for p in parameters if p.requires_grad]
                   for part, parameters in part_parameters(self.model).items()}  # fmt: skip
        return [{"params": trained[part], "lr": rate} for part, rate in self.rates.items() if rate > 0]

    def work(self, batch: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        image_id = self.model.config.image_token_id
        tokens = sum(int((micro["segments"] >= 0).sum()) for micro in batch)
        new = sum(Stage.terms(self, micro) for micro in batch)  # a stage of pairs has other terms
        return {
            "samples": sum(len(micro["sources"]) for micro in batch),
            "tokens": tokens,
            "prompt_tokens": tokens - new,
            "image_tokens": sum(int((micro["input_ids"] == image_id).sum()) for micro in batch),
            "new_tokens": new,
        }

    def token_losses(self, micro_batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """(losses of response tokens (tokens,), sample of each (tokens,)); the head sees response positions alone."""
        inputs = {name: value for name, value in micro_batch.items() if name not in NOT_THE_MODELS}
        inputs |= token_types(self.model, micro_batch["input_ids"])
        hidden_BLD = self.model.model(**inputs, use_cache=False).last_hidden_state
        targets_BL = micro_batch["labels"][:, 1:]
        rows, columns = torch.nonzero(targets_BL != IGNORED, as_tuple=True)
        logits = self.model.get_output_embeddings()(hidden_BLD[rows, columns])
        samples = micro_batch["segments"][:, 1:][rows, columns]
        return F.cross_entropy(logits.float(), targets_BL[rows, columns], reduction="none"), samples

    def batch_loss(self, micro_batch: Mapping[str, Any]) -> tuple[Tensor, int]:
        losses, _ = self.token_losses(micro_batch)
        return losses.sum(), losses.numel()


class Means:
    """Means by name of what is added up between two logged steps, from any thread."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}
        self._adding = Lock()

    def add(self, name: str, total: float, count: int) -> None:
        with self._adding:
            sums = self._sums.setdefault(name, [0.0, 0.0])
            sums[0] += total
            sums[1] += count

    def log(self, module: LightningModule) -> None:
        """At every LOG_EVERY-th step: log what there is, and begin anew."""
        if module.logger and module.global_step % LOG_EVERY == 0:
            means = {name: total / max(count, 1) for name, (total, count) in self._sums.items()}
            module.logger.log_metrics(means, step=module.global_step)
            self._sums.clear()


class MultimodalPretraining(SupervisedFineTuning):
    """Pre-training on the self-generated mixture (paper.md, stage 1.5); reports the loss of each source by itself,
    which shows a source that the others drown."""

    def __init__(self, model: PreTrainedModel, config: StageConfig) -> None:
        super().__init__(model, config)
        self.means = Means()

    def batch_loss(self, micro_batch: Mapping[str, Any]) -> tuple[Tensor, int]:
        losses, samples = self.token_losses(micro_batch)
        for sample, source in enumerate(micro_batch["sources"]):
            own = losses.detach()[samples == sample]
            self.means.add(f"loss_{source}", float(own.sum()), own.numel())
        return losses.sum(), losses.numel()

    def on_train_batch_end(self, *args: Any) -> None:
        self.means.log(self)
