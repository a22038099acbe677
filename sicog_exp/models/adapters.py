"""LoRA: small matrices beside the weights of a model's linear layers train, and are merged into them afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sicog_exp.models.loading import PARTS, part_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MARK = "lora_"
"""In the name of every adapter's parameter."""


def add_adapters(model: PreTrainedModel, parts: Sequence[str], rank: int, alpha: float) -> None:
    """Adapters for every linear layer of some parts, the head apart. They start as zero: the model is unchanged."""
    from peft import LoraConfig, inject_adapter_in_model

    targets = linear_layers(model, parts)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0)  # type: ignore[arg-type]
    inject_adapter_in_model(config, model)


def linear_layers(model: PreTrainedModel, parts: Sequence[str]) -> list[str]:
    """Names of the linear layers that adapters go to."""
    from torch.nn import Linear

    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules()
            if isinstance(module, Linear) and module is not head and part_of(name) in parts]  # fmt: skip


def merge_adapters(model: PreTrainedModel) -> None:
    """Adapters into the weights beside them: afterwards the model is one that knows nothing of adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in adapted:
        module.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def copy_trained(trained: PreTrainedModel, model: PreTrainedModel) -> None:
    """What trained beside weights in 4 bits, adapters and whole parts, to the same model with its weights in full."""
    import torch

    targets = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad:
                targets[name].copy_(parameter)


def layers_kept_whole(parts: Sequence[str]) -> list[str]:
    """Patterns of the modules that stay in full precision where a base is loaded in 4 bits: what trains in full."""
    names = [name for part in PARTS if part not in parts for name in PARTS[part]]
    return [rf"(.*\.)?({'|'.join([*names, 'lm_head'])})"]
