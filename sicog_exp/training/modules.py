"""LightningModules. One optimizer step is one batch here: its rows come as micro-batches whose losses are summed over
response tokens and divided by the step's number of response tokens, so that accumulation, batch split and padding do
not change the gradient."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from sicog_exp.data.chat import IGNORED
from sicog_exp.models.adapters import MARK, add_adapters
from sicog_exp.models.families import packing_problem, token_types
from sicog_exp.models.loading import decoder_layers, part_parameters
from sicog_exp.recipe import StageConfig
from sicog_exp.training.shards import shard

if TYPE_CHECKING:
    from transformers import PreTrainedModel


LOG_EVERY = 10
"""Optimizer steps between logged metrics."""
NOT_THE_MODELS = ("labels", "segments", "sources", "ids", "chosen", "rejected", "reference")
"""What a micro-batch holds besides the model's inputs."""
PICTURED = ("vision", "projector")
"""Parts that rows of text alone do not reach."""


class DivergedError(FloatingPointError):
    """A step whose loss or gradient is no finite number. Nothing of it is applied."""


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
    ranks = 1
    """Processes that share the training; each holds its rows of every step."""
    scratch: Path | None = None
    """Where the rows of a step that cannot be applied are kept."""

    def __init__(self, config: StageConfig) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # of checkpoints, which lack what does not train
        self.config = config

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What does not train is loaded with the model: a checkpoint of adapters is as small as they are."""
        named = self.named_parameters(remove_duplicate=False)
        trained = {name for name, parameter in named if parameter.requires_grad}
        kept = {name: value for name, value in checkpoint["state_dict"].items() if name in trained}
        checkpoint["state_dict"] = kept

    def parameter_groups(self) -> list[dict[str, Any]]:
        raise NotImplementedError

    def batch_loss(self, micro_batch: Mapping[str, Any]) -> tuple[Tensor, int]:
        """(summed loss, number of terms) of a micro-batch."""
        raise NotImplementedError

    def work(self, batch: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """What one optimizer step trained on, summed over its micro-batches: samples, and for a language model its
        tokens: all, those of prompts, those of images (which are prompts'), and the predicted ones (new)."""
        raise NotImplementedError

    def drop_unreached(self, batch: Sequence[Mapping[str, Any]]) -> None:
        """A part that no row of the step reaches has no gradient, as in one process, and not one of zeros."""

    def training_step(self, batch: Sequence[Mapping[str, Any]] | Exception, batch_idx: int) -> None:
        """One optimizer step; raises what a process that makes rows sent in place of them."""
        if isinstance(batch, Exception):
            raise batch
        optimizer, scheduler = cast(Any, self.optimizers()), cast(Any, self.lr_schedulers())
        optimizer.zero_grad()
        terms = int(self.over_ranks(sum(self.terms(micro) for micro in batch))[0])
        loss = self._side_by_side(batch, terms) if self.threads else self._one_by_one(batch, terms)
        if self.ranks > 1:
            loss = loss.new_tensor(self.over_ranks(float(loss))[0])
            self.drop_unreached(batch)
        norm = torch.nn.utils.clip_grad_norm_(self.trained_parameters, self.config.clip_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not torch.isfinite(norm):
            raise self._diverged(batch, float(loss), float(norm))
        self.log_dict({"loss": loss, "grad_norm": norm, "learning_rate": scheduler.get_last_lr()[0]})
        optimizer.step()
        scheduler.step()

    def _one_by_one(self, batch: Sequence[Mapping[str, Any]], terms: int) -> Tensor:
        loss = torch.zeros((), device=self.device)
        for number, micro in enumerate(batch):
            with self._exchange(last=number == len(batch) - 1):
                summed, _ = self.batch_loss(micro)
                # Data-parallel strategies average gradients over ranks, so each rank's share is scaled back up.
                # A micro-batch of text alone reaches no trained parameter where only the projector trains.
                if summed.requires_grad:
                    self.manual_backward(summed * self.ranks / terms)
            loss += summed.detach() / terms
        return loss

    def _exchange(self, last: bool) -> AbstractContextManager[None]:
        """Ranks exchange a step's gradients once, with its last micro-batch. Shards exchange theirs each time, so that
        no rank ever holds the whole gradient."""
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, DDPStrategy) and not last else nullcontext()

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

    def over_ranks(self, *numbers: float) -> list[float]:
        """Each number's sum over all ranks, which must all ask at once."""
        if self.ranks == 1:
            return list(numbers)
        summed = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(summed)
        return summed.tolist()

    def _diverged(self, batch: Sequence[Mapping[str, Any]], loss: float, norm: float) -> DivergedError:
        """What is raised for a step that cannot be applied, its rows kept for a look at them."""
        ids = [name for micro in batch for name in micro.get("ids", [])]
        kept = f"; its rows ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''}) are in {self._keep(batch, ids)}" \
            if self.scratch else ""  # fmt: skip
        return DivergedError(f"training step {self.global_step}: loss {loss}, gradient norm {norm}; nothing of it is "
                             f"applied{kept}. Look at them, or lower the learning rate; {self._checkpoint()}")

    def _keep(self, batch: Sequence[Mapping[str, Any]], ids: Sequence[str]) -> Path:
        from safetensors.torch import save_file

        assert self.scratch
        file = self.scratch / f"diverged-{self.global_step:08d}-{self.global_rank}.safetensors"
        tensors = {f"{number}.{name}": value.detach().cpu().contiguous() for number, micro in enumerate(batch)
                   for name, value in micro.items() if isinstance(value, Tensor)}  # fmt: skip
        save_file(tensors, file)
        file.with_suffix(".json").write_text(json.dumps({"step": self.global_step, "rows": list(ids)}, indent=1))
        return file

    def _checkpoint(self) -> str:
        newest = max(self.scratch.glob("step-*.ckpt"), default=None) if self.scratch else None
        return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint before it"

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

    def configure_model(self) -> None:
        """Where the strategy shards: each layer of the language model by itself, all else together. Every micro-batch
        runs all layers; what only pictures reach is gathered for each, so that ranks never wait for one another."""
        strategy = self.trainer.strategy
        if not isinstance(strategy, ModelParallelStrategy):
            return
        from torch.distributed.fsdp import register_fsdp_forward_method

        # Else a micro-batch of text alone would skip layers' gradients where those before them are frozen, and their
        # exchange with them: ranks would exchange different things at once.
        self.model.enable_input_require_grads()
        shard(self, decoder_layers(self.model), strategy.device_mesh["data_parallel"])
        register_fsdp_forward_method(self, "token_losses")

    def token_losses(self, micro_batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """(losses of response tokens (tokens,), sample of each (tokens,)); the head sees response positions alone."""
        inputs = {name: value for name, value in micro_batch.items() if name not in NOT_THE_MODELS}
        inputs |= token_types(self.model, micro_batch["input_ids"])
        hidden_BLD = self.model.model(**inputs, use_cache=False).last_hidden_state
        targets_BL = micro_batch["labels"][:, 1:]
        rows, columns = torch.nonzero(targets_BL != IGNORED, as_tuple=True)
        logits = self.model.get_output_embeddings()(hidden_BLD[rows, columns])
        samples = micro_batch["segments"][:, 1:][rows, columns]
        losses = F.cross_entropy(logits.float(), targets_BL[rows, columns], reduction="none")
        return losses + self._nothing() if self.ranks > 1 else losses, samples

    def _nothing(self) -> Tensor:
        """0, by way of all parameters that only pictures reach: ranks exchange the same gradients whatever rows each
        of them has."""
        parts = part_parameters(self.model)
        return sum(parameter.sum() * 0 for part in PICTURED for parameter in parts[part] if parameter.requires_grad)  # type: ignore[return-value]

    def drop_unreached(self, batch: Sequence[Mapping[str, Any]]) -> None:
        image_id = self.model.config.image_token_id
        if not self.over_ranks(sum(int((micro["input_ids"] == image_id).sum()) for micro in batch))[0]:
            for part, parameters in part_parameters(self.model).items():
                for parameter in parameters:
                    parameter.grad = None if part in PICTURED else parameter.grad

    def batch_loss(self, micro_batch: Mapping[str, Any]) -> tuple[Tensor, int]:
        losses, _ = self.token_losses(micro_batch)
        return losses.sum(), losses.numel()


class Means:
    """Means by name of what is added up between two logged steps, from any thread."""

    def __init__(self) -> None:
        self._added: list[tuple[Sequence[str], Tensor]] = []
        self._adding = Lock()

    def add(self, names: Sequence[str], sums: Tensor) -> None:
        """(total, count) of each name, (names, 2), which stay where they were computed until they are logged."""
        with self._adding:
            self._added.append((names, sums))

    def _collect(self) -> dict[str, list[float]]:
        """Sums by name of what was added since the last time, by one transfer."""
        names = [name for names, _ in self._added for name in names]
        rows = torch.cat([sums for _, sums in self._added]).tolist() if self._added else []
        self._added.clear()
        sums = {name: [0.0, 0.0] for name in names}
        for name, (total, count) in zip(names, rows, strict=True):
            sums[name] = [sums[name][0] + total, sums[name][1] + count]
        return sums

    def log(self, module: Stage) -> None:
        """At every LOG_EVERY-th step: log what there is, over all ranks, and begin anew."""
        if module.global_step % LOG_EVERY:
            return
        sums = _over_ranks(self._collect(), module.ranks)
        if module.logger:
            means = {name: total / max(count, 1) for name, (total, count) in sums.items()}
            module.logger.log_metrics(means, step=module.global_step)


def _over_ranks(sums: dict[str, list[float]], ranks: int) -> dict[str, list[float]]:
    if ranks == 1:
        return sums
    gathered: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(gathered, sums)
    names = sorted({name for sums in gathered for name in sums})
    own = {name: [sums[name] for sums in gathered if name in sums] for name in names}
    return {name: [sum(column) for column in zip(*values, strict=True)] for name, values in own.items()}


class MultimodalPretraining(SupervisedFineTuning):
    """Pre-training on the self-generated mixture (paper.md, stage 1.5); reports the loss of each source by itself,
    which shows a source that the others drown."""

    def __init__(self, model: PreTrainedModel, config: StageConfig) -> None:
        super().__init__(model, config)
        self.means = Means()

    def batch_loss(self, micro_batch: Mapping[str, Any]) -> tuple[Tensor, int]:
        losses, samples = self.token_losses(micro_batch)
        sources = micro_batch["sources"]
        terms = torch.stack([losses.detach(), torch.ones_like(losses)], dim=1)
        # Nothing of it is looked at here: each look would wait for the GPU.
        self.means.add([f"loss_{source}" for source in sources],
                             terms.new_zeros(len(sources), 2).index_add_(0, samples, terms))  # fmt: skip
        return losses.sum(), losses.numel()

    def on_train_batch_end(self, *args: Any) -> None:
        self.means.log(self)
