"""Load and save a model with its processor; find its parts; count its work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

EMBEDDED_BASE = Path(__file__).parent / "base"
PARTS = {
    "vision": ("vision_tower", "vision_model", "visual"),
    "projector": ("multi_modal_projector", "connector", "embed_vision"),
    "language": ("language_model", "text_model"),
}


class ModelError(RuntimeError):
    """A model that cannot be used; the message says which and what to do."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from; what is fingerprinted is the hash of its files, never the path."""

    path: str
    trust_remote_code: bool = False


def resolve_base(name: str) -> str:
    """The folder or hub name behind `model.base`."""
    return str(EMBEDDED_BASE) if name == "embedded" else name


def load_model(source: ModelSource, dtype: str = "float32") -> tuple[PreTrainedModel, Any]:
    """The model (in eval mode, on the CPU) and its processor. Raises ModelError for what transformers can't load."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, AutoProcessor

    options = {"trust_remote_code": source.trust_remote_code}
    try:
        processor = AutoProcessor.from_pretrained(source.path, **options)
        made: Any = AutoModelForImageTextToText.from_pretrained(
            source.path, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True, **options
        )
        model, loaded = made
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{source.path}: transformers cannot load it as an image-text-to-text model ({error}). Give a "
                         "folder with config.json, safetensors weights and a processor, or a reachable hub "
                         "name") from error  # fmt: skip
    _check_whole(source.path, processor, loaded)
    return model.eval(), processor


def load_processor(source: ModelSource) -> Any:
    """The processor alone, without weights. Raises ModelError."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(source.path, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(f"{source.path}: transformers cannot load its processor ({error}). Give a folder with "
                         "config.json, a processor and a tokenizer, or a reachable hub name") from error  # fmt: skip
    _check_processor(source.path, processor)
    return processor


def _check_whole(path: str, processor: Any, loaded: Mapping[str, Any]) -> None:
    """transformers puts random numbers where a checkpoint lacks weights, and a tokenizer where it lacks a processor."""
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise ModelError(f"{path}: the checkpoint lacks {len(missing)} weights of its model, such as {missing[0]}; get "
                         "the whole checkpoint")  # fmt: skip
    _check_processor(path, processor)


def _check_processor(path: str, processor: Any) -> None:
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise ModelError(f"{path}: no processor with an image processor and a tokenizer; copy the model's "
                         "processor_config.json (or preprocessor_config.json) and tokenizer files there")  # fmt: skip


def save_model(model: PreTrainedModel, processor: Any, directory: Path) -> None:
    """Safetensors, config, processor: what `AutoModelForImageTextToText.from_pretrained` reads."""
    model.save_pretrained(directory, safe_serialization=True)
    processor.save_pretrained(directory)


def part_modules(model: PreTrainedModel) -> dict[str, list[nn.Module]]:
    """vision, projector, language -> modules; together they hold every parameter. Raises ModelError otherwise."""
    inner = model.model if hasattr(model, "model") else model
    found: dict[str, list[nn.Module]] = {}
    for part, names in PARTS.items():
        modules = [getattr(inner, name) for name in names if hasattr(inner, name)]
        if not modules:
            raise ModelError(f"{type(model).__name__}: no {part} found under {', '.join(names)}; this architecture is "
                             "not supported yet")  # fmt: skip
        found[part] = modules[:1]
    head = model.get_output_embeddings()
    if head is not None:
        found["language"].append(head)
    known = {id(p) for modules in found.values() for module in modules for p in module.parameters()}
    strays = [name for name, p in model.named_parameters() if id(p) not in known]
    if strays:
        raise ModelError(f"{type(model).__name__}: parameters outside its known parts: {strays[:3]}")
    return found


def part_parameters(model: PreTrainedModel) -> dict[str, list[nn.Parameter]]:
    """vision, projector, language -> parameters, each once (tied weights belong to the language model)."""
    seen: set[int] = set()
    result: dict[str, list[nn.Parameter]] = {}
    for part, modules in part_modules(model).items():
        result[part] = []
        for module in modules:
            for parameter in module.parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    result[part].append(parameter)
    return result


def renew_projector(model: PreTrainedModel, seed: int) -> None:
    """Give the projector the random weights of its layers' own initialisation, drawn by `seed` alone.

    Raises ModelError for a projector with weights that no layer of torch's initialises.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in (part for whole in part_modules(model)["projector"] for part in whole.modules()):
            own = getattr(module, "reset_parameters", None)
            if callable(own):
                own()
            elif next(module.parameters(recurse=False), None) is not None:
                raise ModelError(f"{type(model).__name__}: {type(module).__name__} in its projector has weights that "
                                 "cannot be made anew; use start=base or start=previous for this model")  # fmt: skip


@dataclass(frozen=True)
class Work:
    """Parameters that multiply each token, for FLOPs: 2 a parameter and token forward, 6 with the backward pass
    (Kaplan et al. 2020, section 2.1); attention's quadratic term is left out."""

    vision: int
    language: int

    def flops(self, tokens: int, image_tokens: int, training: bool) -> float:
        """`tokens`: all positions of the language model; `image_tokens`: those that the vision tower made."""
        return (6 if training else 2) * (self.language * float(tokens) + self.vision * float(image_tokens))


def work_of(model: PreTrainedModel) -> Work:
    parameters = part_parameters(model)
    counts = {part: sum(p.numel() for p in group) for part, group in parameters.items()}
    embedding: Any = cast(Any, model).get_input_embeddings()
    head: Any = cast(Any, model).get_output_embeddings()
    table = embedding.weight.numel()
    tied = head is None or head.weight is embedding.weight
    return Work(counts["vision"] + counts["projector"], counts["language"] - (0 if tied else table))
