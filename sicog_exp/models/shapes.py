"""Models by their shape alone: what a plan needs, from a configuration, without weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sicog_exp.models.loading import ModelError, Work, image_tokens_of, part_parameters, work_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DEFAULT_IMAGE_TOKENS = 576
"""Tokens of an image whose model makes more of a larger one: those of CLIP-ViT-L/14-336."""


@dataclass(frozen=True)
class Shape:
    """Sizes of an image-text-to-text model. Widths are numbers of features."""

    name: str
    work: Work
    parts: Mapping[str, int]
    """vision, projector, language -> parameters."""
    image_tokens: int
    """Tokens of one image in the language model."""
    width: int
    layers: int
    cached: int
    """Numbers kept for one token in the key/value cache."""
    vocabulary: int
    vision_width: int
    vision_layers: int

    @property
    def parameters(self) -> int:
        return sum(self.parts.values())


def read_shape(name: str, trust_remote_code: bool = False) -> Shape:
    """The shape of a published name, or of a folder or hub name with a config.json; no weights are read.

    Raises ModelError for what is none of them.
    """
    from transformers import AutoConfig

    if name in PUBLISHED:
        return shape_of(PUBLISHED[name](), name)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{name}: no config.json there and no model that the hub gives us ({_first(error)}); set "
                         f"plan.shape to a published shape ({', '.join(PUBLISHED)}) or to a folder with "
                         "config.json") from None  # fmt: skip
    return shape_of(config, name)


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def shape_of(config: PretrainedConfig, name: str) -> Shape:
    """Counted on the meta device, which holds no numbers. Raises ModelError for an architecture we do not know."""
    import torch
    from transformers import AutoModelForImageTextToText

    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
    except (ValueError, KeyError) as error:
        raise ModelError(f"{name}: no image-text-to-text model that transformers knows ({_first(error)})") from None
    counts = {part: sum(p.numel() for p in group) for part, group in part_parameters(model).items()}
    text: Any = config.get_text_config()
    vision: Any = getattr(config, "vision_config", None)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shape(name, work_of(model), counts, image_tokens_of(config) or DEFAULT_IMAGE_TOKENS, text.hidden_size,
                 text.num_hidden_layers, 2 * text.num_hidden_layers * heads * head_width, text.vocab_size,
                 getattr(vision, "hidden_size", text.hidden_size), getattr(vision, "num_hidden_layers", 0))  # fmt: skip


def composed_shape(language: str, vision: str) -> Shape:
    """A LLaVA of a language model (a folder, a hub name or a .gguf file) and a vision tower. Raises ModelError."""
    from transformers import AutoConfig, LlavaConfig

    file = Path(language)
    named: dict[str, Any] = {"gguf_file": file.name} if language.endswith(".gguf") else {}
    try:
        text = AutoConfig.from_pretrained(file.parent if named else language, **named)
        tower: Any = AutoConfig.from_pretrained(vision)
        tower = getattr(tower, "vision_config", tower)
        patches = (tower.image_size // tower.patch_size) ** 2
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise ModelError(f"model.language={language}, model.vision={vision}: no configurations that transformers can "
                         f"read ({_first(error)}); set plan.shape") from None  # fmt: skip
    config = LlavaConfig(vision_config=tower, text_config=text, image_seq_length=patches,  # type: ignore[call-arg]
                         tie_word_embeddings=text.tie_word_embeddings)  # fmt: skip
    return shape_of(config, f"{language} + {vision}")


@lru_cache(maxsize=4)
def encoder_parameters(source: str) -> int:
    """Parameters of a text encoder that multiply each token; 0 where its configuration cannot be read."""
    import torch
    from transformers import AutoConfig, AutoModel

    try:
        with torch.device("meta"):
            model = AutoModel.from_config(AutoConfig.from_pretrained(source))
    except (OSError, ValueError, KeyError):
        return 0
    tables = [module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    return sum(p.numel() for p in model.parameters()) - sum(tables)


# Published shapes.


def _llava(text: PretrainedConfig) -> PretrainedConfig:
    """LLaVA-1.5's vision tower and projector (CLIP-ViT-L/14-336, two layers) before a language model."""
    from transformers import CLIPVisionConfig, LlavaConfig

    vision = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                              image_size=336, patch_size=14)  # fmt: skip
    return LlavaConfig(vision_config=vision, text_config=text, image_seq_length=576)  # type: ignore[call-arg]


def _qwen2_7b() -> PretrainedConfig:
    from transformers import Qwen2Config

    return Qwen2Config(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
                       intermediate_size=18_944, vocab_size=152_064)  # fmt: skip


def _llama3_8b() -> PretrainedConfig:
    from transformers import LlamaConfig

    return LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
                       intermediate_size=14_336, vocab_size=128_256)  # fmt: skip


PUBLISHED: dict[str, Callable[[], PretrainedConfig]] = {
    "llava-qwen2-7b": lambda: _llava(_qwen2_7b()),
    "llava-llama3-8b": lambda: _llava(_llama3_8b()),
}
"""Shapes of the paper's low-resolution models, from the config.json of openai/clip-vit-large-patch14-336,
Qwen/Qwen2-7B-Instruct and meta-llama/Llama-3.1-8B-Instruct."""

