"""Load and save a model with its processor; find its parts; count its work."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sicog_exp.hub import silence
from sicog_exp.models.resolution import ResolutionError, cap_pixels

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from sicog_exp.recipe import ModelConfig

HUB_NAME = r"\w[\w.-]*/\w[\w.-]*"
EMBEDDED_BASE = Path(__file__).parent / "base"
PARTS = {
    "vision": ("vision_tower", "vision_model", "visual"),
    "projector": ("multi_modal_projector", "connector", "embed_vision", "merger", "deepstack_merger_list",
                  "image_newline"),
    "language": ("language_model", "text_model", "lm_head"),
}  # fmt: skip
"""Part -> names in the path of its parameters. The projector comes first: Qwen-VL's lies inside the tower."""


class ModelError(RuntimeError):
    """A model that cannot be used; the message says which and what to do."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from; what is fingerprinted is the hash of its files, never the path."""

    path: str
    trust_remote_code: bool = False
    image_pixels: int | None = None
    attention: str = "sdpa"

    @classmethod
    def of(cls, path: str | Path, config: ModelConfig) -> ModelSource:
        """The model in a folder, as a recipe wants it loaded."""
        return cls(str(path), config.trust_remote_code, config.image_pixels, config.attention)


def resolve_base(name: str) -> str:
    """The folder or hub name behind `model.base`."""
    return str(EMBEDDED_BASE) if name == "embedded" else name


def load_model(source: ModelSource, dtype: str = "float32", **more: Any) -> tuple[PreTrainedModel, Any]:
    """The model (in eval mode, on the CPU) and its processor. Raises ModelError for what transformers can't load.

    `more` goes to transformers: how to quantize, say.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, AutoProcessor

    options = _options(source)
    # transformers' own choice is sdpa for every model that has it
    chosen = {} if source.attention == "sdpa" else {"attn_implementation": source.attention}
    try:
        processor = AutoProcessor.from_pretrained(source.path, **options)
        made: Any = AutoModelForImageTextToText.from_pretrained(
            source.path, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True, **options,
            **chosen, **more,
        )  # fmt: skip
        model, loaded = made
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{source.path}: transformers cannot load it as an image-text-to-text model ({error}). Give a "
                         "folder with config.json, safetensors weights and a processor, or a reachable hub "
                         "name") from error  # fmt: skip
    _check_whole(source.path, processor, loaded)
    _cap(source, model.config, processor)
    plan_no_attention()
    return model.eval(), processor


def _options(source: ModelSource) -> dict[str, Any]:
    """How transformers is to look for a model. Raises ModelError where there is no such folder and no hub to ask; what
    was downloaded before needs none."""
    from huggingface_hub import try_to_load_from_cache

    options = {"trust_remote_code": source.trust_remote_code}
    if Path(source.path).exists():
        return options
    if not re.fullmatch(HUB_NAME, source.path):
        raise ModelError(f"{source.path}: no such folder; correct the path, or give a hub's OWNER/NAME")
    silent = silence()
    if silent and not isinstance(try_to_load_from_cache(source.path, "config.json"), str):
        raise ModelError(f"{source.path}: no such folder, and no hub to ask for it ({silent}); give the model's folder")
    return {**options, "local_files_only": bool(silent)}


def plan_no_attention() -> None:
    """Leaves cuDNN out of torch's own attention on a GPU. On a Hopper it is the first choice of torch 2.14, by its
    source, and plans anew for each new shape: at every step behind growing keys, for every batch padded to another
    length. Not measured here."""
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)


def _cap(source: ModelSource, config: PretrainedConfig, processor: Any) -> None:
    if source.image_pixels:
        try:
            cap_pixels(config, processor, source.image_pixels)
        except ResolutionError as error:
            raise ModelError(f"model.image_pixels={source.image_pixels}: {error}") from None


def load_processor(source: ModelSource) -> Any:
    """The processor alone, without weights. Raises ModelError."""
    from transformers import AutoConfig, AutoProcessor

    options = _options(source)
    try:
        processor = AutoProcessor.from_pretrained(source.path, **options)
        config = AutoConfig.from_pretrained(source.path, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(f"{source.path}: transformers cannot load its processor ({error}). Give a folder with "
                         "config.json, a processor and a tokenizer, or a reachable hub name") from error  # fmt: skip
    _check_processor(source.path, processor)
    _cap(source, config, processor)
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


def part_of(name: str) -> str | None:
    """The part that a parameter or module belongs to, by its dotted name; None outside all parts."""
    path = set(name.split("."))
    return next((part for part in ("projector", "vision", "language") if path.intersection(PARTS[part])), None)


def part_parameters(model: PreTrainedModel) -> dict[str, list[nn.Parameter]]:
    """vision, projector, language -> parameters, each once (tied weights belong to the language model).

    Together they hold every parameter. Raises ModelError otherwise.
    """
    found: dict[str, list[nn.Parameter]] = {part: [] for part in PARTS}
    strays = []
    for name, parameter in model.named_parameters():
        part = part_of(name)
        if part:
            found[part].append(parameter)
        else:
            strays.append(name)
    _check_parts(type(model).__name__, found, strays)
    return found


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of the language model, in order."""
    from torch.nn import ModuleList

    lists = {name: module for name, module in model.named_modules()
             if isinstance(module, ModuleList) and part_of(name) == "language"}  # fmt: skip
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return [layer for name in outermost for layer in cast(Any, lists[name])]


def _check_parts(name: str, found: Mapping[str, Any], strays: list[str]) -> None:
    for part, parameters in found.items():
        if not parameters:
            raise ModelError(f"{name}: no {part} found under {', '.join(PARTS[part])}; this architecture is not "
                             "supported yet")  # fmt: skip
    if strays:
        raise ModelError(f"{name}: parameters outside its known parts: {strays[:3]}")


@dataclass(frozen=True)
class Work:
    """Parameters that multiply each position, by part, and the FLOPs that follow: 2 a parameter and position forward, 2
    for its gradient, 2 to carry gradients on (Kaplan et al. 2020, section 2.1). Attention's quadratic term is left out.
    """

    vision: int
    projector: int
    language: int
    """Without the embedding table, which is looked up, and the head."""
    head: int
    """The output embedding; it sees predicted positions alone."""
    positions: float = 1.0
    """Positions of the vision tower behind one image token of the language model."""

    def training(self, tokens: float, image_tokens: float, new_tokens: float,
                 trained: Collection[str] = tuple(PARTS), adapted: Collection[str] = (), again: bool = False
                 ) -> float:  # fmt: skip
        """FLOPs of training on `tokens` positions, `image_tokens` of them images', `new_tokens` of them predicted.

        `trained` names the parts whose weights have gradients, `adapted` those whose adapters have (which are small and
        left out); parts before all of them run forward alone. `again`: activations are computed a second time.
        """
        products = self._products(tokens, image_tokens, new_tokens)
        return sum(passes * products[part] for part, passes in _passes(trained, adapted, again).items())

    def sampling(self, prompt_tokens: float, encoded_tokens: float, new_tokens: float) -> float:
        """FLOPs of sampling `new_tokens` behind prompts that are read once each; `encoded_tokens`: image tokens that
        the vision tower made, fewer than the prompts show where several show one image."""
        return 2 * sum(self._products(prompt_tokens + new_tokens, encoded_tokens, new_tokens).values())

    def of_sampling(self, counted: Mapping[str, int]) -> dict[str, float]:
        """What a step that samples reports, from what its engine counted."""
        prompt, encoded, new = (counted[name] for name in ("prompt_tokens", "encoded_tokens", "new_tokens"))
        return {"tokens": prompt + new, "prompt_tokens": prompt, "image_tokens": counted["image_tokens"],
                "new_tokens": new, "flops": self.sampling(prompt, encoded, new)}  # fmt: skip

    def _products(self, tokens: float, image_tokens: float, predicted: float) -> dict[str, float]:
        """Part -> multiplications forward."""
        return {"vision": self.vision * self.positions * image_tokens, "projector": self.projector * image_tokens,
                "language": self.language * tokens + self.head * predicted}  # fmt: skip


def _passes(trained: Collection[str], adapted: Collection[str], again: bool) -> dict[str, int]:
    """Part -> FLOPs a multiplication. Gradients reach a part where it trains or one before it does."""
    passes, reached = {}, False
    for part in PARTS:
        reached = reached or part in trained or part in adapted
        passes[part] = 2 + 2 * reached + 2 * (part in trained) + 2 * (again and reached)
    return passes


def work_of(model: PreTrainedModel) -> Work:
    """Of any model whose parts are known, also one on the meta device."""
    parameters = part_parameters(model)
    counts = {part: sum(p.numel() for p in group) for part, group in parameters.items()}
    embedding: Any = cast(Any, model).get_input_embeddings()
    output: Any = cast(Any, model).get_output_embeddings()
    table, head = embedding.weight.numel(), output.weight.numel() if output is not None else 0
    tied = output is None or output.weight is embedding.weight
    language = counts["language"] - table - (0 if tied else head)
    return Work(counts["vision"], counts["projector"], language, head, positions_per_image_token(model.config))


def positions_per_image_token(config: Any) -> float:
    """How many positions of the vision tower a projector joins to one token (1 for LLaVA's)."""
    vision, per_image = getattr(config, "vision_config", None), image_tokens_of(config)
    joined = getattr(vision, "spatial_merge_size", None) or getattr(config, "scale_factor", None)
    joined = joined or 1 / getattr(config, "downsample_ratio", 1)
    size, patch = (getattr(vision, name, None) for name in ("image_size", "patch_size"))
    if joined == 1 and per_image and isinstance(size, int) and isinstance(patch, int):
        return (size // patch) ** 2 / per_image
    return float(joined**2)


def image_tokens_of(config: Any) -> int | None:
    """Tokens of one image of the configured size; None where they depend on the image."""
    return getattr(config, "image_seq_length", None) or getattr(config, "mm_tokens_per_image", None)
