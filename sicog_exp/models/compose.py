"""Parts put together: a language model, a vision tower and a fresh projector make a LLaVA (paper.md, stage 1.5)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)

from sicog_exp.models.loading import ModelError, ModelSource, load_model, part_of

IMAGE = "<image>"
TEXT_OF_PARTS = (
    "{% set said = namespace(messages=[]) %}{% for message in messages %}{% set text %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE + "\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% endset %}{% set said.messages = said.messages + [{'role': message['role'], 'content': text}] %}{% endfor %}"
    "{% set messages = said.messages %}"
)
"""Before a language model's own chat template: messages of image and text parts become messages of plain text."""


@dataclass(frozen=True)
class Language:
    """A causal language model that has a chat template."""

    model: PreTrainedModel
    tokenizer: Any


@dataclass(frozen=True)
class Tower:
    """A vision tower, its image processor, and which of its layers' patches the projector reads."""

    model: PreTrainedModel
    image_processor: Any
    layer: int = -2

    @property
    def has_class_token(self) -> bool:
        """Whether a token that is no patch comes first, as in CLIP."""
        return hasattr(getattr(self.model, "vision_model", self.model).embeddings, "class_embedding")


def load_language(path: str) -> Language:
    """From a folder, a hub name or a .gguf file. Raises ModelError."""
    try:
        tokenizer, model = _from_gguf(Path(path)) if path.endswith(".gguf") else (
            AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path, dtype="auto"))  # fmt: skip
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(f"model.language={path}: transformers cannot load it as a causal language model ({error})"
                         ) from error  # fmt: skip
    if not tokenizer.chat_template:
        raise ModelError(f"model.language={path}: its tokenizer has no chat template; take an instruct model")
    if hasattr(model.config, "quantization_config"):
        raise ModelError(f"model.language={path}: its weights are quantized and cannot train; take them in full")
    return Language(model, tokenizer)


def _from_gguf(file: Path) -> tuple[Any, Any]:
    """Tokenizer and model of a file of llama.cpp's format, its weights as numbers again. It needs the package gguf."""
    from transformers import GgufConfig

    named: dict[str, Any] = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **named)
    in_full = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, quantization_config=in_full, **named)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return tokenizer, model


def load_tower(path: str) -> Tower:
    """A CLIP or SigLIP tower from a folder or hub name, or the one inside an image-text-to-text model.

    Raises ModelError.
    """
    try:
        config: Any = AutoConfig.from_pretrained(path)
        if hasattr(config, "text_config") and "ForConditionalGeneration" in str(config.architectures):
            whole, processor = load_model(ModelSource(path))
            return Tower(whole.model.vision_tower, processor.image_processor, config.vision_feature_layer)
        vision = getattr(config, "vision_config", config)
        return Tower(AutoModel.from_pretrained(path, config=vision), AutoImageProcessor.from_pretrained(path))
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ModelError(f"model.vision={path}: no vision tower that transformers can load ({error})") from error


def compose(language: Language, tower: Tower, seed: int) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Both parts as they are, joined by a two-layer projector of random weights, a pure function of `seed`."""
    tokenizer = language.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]}, replace_extra_special_tokens=False)
    table: Any = language.model.get_input_embeddings()
    if len(tokenizer) > len(table.weight):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            language.model.resize_token_embeddings(len(tokenizer))
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(_config(language, tower))
    model.model.vision_tower = tower.model.to(language.model.dtype)  # type: ignore[arg-type]
    model.model.language_model = language.model.base_model
    model.lm_head = language.model.get_output_embeddings()
    model.model.multi_modal_projector.to_empty(device="cpu").to(language.model.dtype)
    fresh_projector(model, seed)
    model.generation_config = language.model.generation_config
    return model.eval(), _processor(language, tower)


def fresh_projector(model: PreTrainedModel, seed: int) -> None:
    """Random weights in the projector's place, as its architecture draws them: a pure function of `seed`."""
    projector = [parameter for name, parameter in model.named_parameters() if part_of(name) == "projector"]
    for parameter in projector:
        parameter._is_hf_initialized = False  # type: ignore[attr-defined]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, module in model.named_modules():
            own = [part_of(f"{name}.{key}") for key, _ in module.named_parameters(recurse=False)]
            if "projector" in own:
                model._init_weights(module)
        for parameter in projector:
            if parameter.ndim > 1 and not parameter.any():  # Gemma 3 leaves its own to the checkpoint
                torch.nn.init.normal_(parameter, std=getattr(model.config, "initializer_range", None) or 0.02)


def _config(language: Language, tower: Tower) -> LlavaConfig:
    text = language.model.config
    return LlavaConfig(  # type: ignore[call-arg]
        vision_config=tower.model.config, text_config=text, vision_feature_layer=tower.layer,
        vision_feature_select_strategy="default" if tower.has_class_token else "full",
        image_token_index=language.tokenizer.convert_tokens_to_ids(IMAGE), image_seq_length=_patches(tower),
        tie_word_embeddings=text.tie_word_embeddings, pad_token_id=language.tokenizer.pad_token_id,
    )  # fmt: skip


def _patches(tower: Tower) -> int:
    config: Any = tower.model.config
    return (config.image_size // config.patch_size) ** 2


def _processor(language: Language, tower: Tower) -> LlavaProcessor:
    config: Any = tower.model.config
    tokenizer = language.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return LlavaProcessor(
        image_processor=tower.image_processor, tokenizer=tokenizer, patch_size=config.patch_size,
        vision_feature_select_strategy="default" if tower.has_class_token else "full", image_token=IMAGE,
        num_additional_image_tokens=int(tower.has_class_token), chat_template=TEXT_OF_PARTS + tokenizer.chat_template,
    )  # fmt: skip
