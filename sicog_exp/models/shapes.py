"""Models by their shape alone: what a plan needs, from a configuration, without weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sicog_exp.hub import silence
from sicog_exp.models.adapters import linear_layers
from sicog_exp.models.loading import ModelError, Work, image_tokens_of, part_parameters, work_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

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
    sides: Mapping[str, int]
    """Part -> inputs and outputs of its linear layers together: the parameters of its adapters, by their rank."""

    @property
    def parameters(self) -> int:
        return sum(self.parts.values())


def read_shape(name: str, trust_remote_code: bool = False) -> Shape:
    """The shape of a published name, or of a folder or hub name with a config.json; no weights are read.

    Raises ModelError for what is none of them.
    """
    return shape_of(read_config(name, trust_remote_code), name)


def read_config(name: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a published name, of a folder or of a hub name. Raises ModelError for what is none."""
    from transformers import AutoConfig

    if name in PUBLISHED:
        return PUBLISHED[name]()
    silent = "" if Path(name).exists() else silence()
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, local_files_only=bool(silent))
    except (OSError, ValueError, KeyError) as error:
        why = silent or _first(error)
        raise ModelError(f"{name}: no config.json there and no model that the hub gives us ({why}); set "
                         f"plan.shape to a published shape ({', '.join(PUBLISHED)}) or to a folder with "
                         "config.json") from None  # fmt: skip


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
                 getattr(vision, "hidden_size", text.hidden_size), getattr(vision, "num_hidden_layers", 0),
                 {part: _sides(model, part) for part in counts})  # fmt: skip


def _sides(model: PreTrainedModel, part: str) -> int:
    layers: list[Any] = [model.get_submodule(name) for name in linear_layers(model, [part])]
    return sum(layer.in_features + layer.out_features for layer in layers)


def composed_shape(language: str, vision: str) -> Shape:
    """A LLaVA of a language model (a folder, a hub name or a .gguf file) and a vision tower. Raises ModelError."""
    return shape_of(composed_config(language, vision), f"{language} + {vision}")


def composed_config(language: str, vision: str) -> PretrainedConfig:
    """The same model's configuration. Raises ModelError."""
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
    return LlavaConfig(vision_config=tower, text_config=text, image_seq_length=patches,  # type: ignore[call-arg]
                       tie_word_embeddings=text.tie_word_embeddings)  # fmt: skip


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


def _qwen2_5_vl(text: dict[str, Any]) -> PretrainedConfig:
    """A picture gives a token for 28 x 28 pixels, up to what `model.image_pixels` allows."""
    from transformers import Qwen2_5_VLConfig

    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
              "out_hidden_size": text["hidden_size"]}  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    return Qwen2_5_VLConfig(vision_config=vision, text_config={**text, "rope_parameters": rope})  # type: ignore[call-arg]


def _qwen2_5_vl_3b() -> PretrainedConfig:
    text = {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
            "intermediate_size": 11_008, "vocab_size": 151_936, "tie_word_embeddings": True}  # fmt: skip
    config = _qwen2_5_vl(text)
    config.tie_word_embeddings = True
    return config


def _qwen2_5_vl_7b() -> PretrainedConfig:
    return _qwen2_5_vl({"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
                        "num_key_value_heads": 4, "intermediate_size": 18_944, "vocab_size": 152_064,
                        "tie_word_embeddings": False})  # fmt: skip


def _smolvlm2_2b() -> PretrainedConfig:
    """SmolLM2-1.7B behind a SigLIP tower; 81 tokens for each tile of 384 x 384 pixels and for the overview."""
    from transformers import LlamaConfig, SmolVLMConfig

    text = LlamaConfig(hidden_size=2048, num_hidden_layers=24, num_attention_heads=32, num_key_value_heads=32,
                       intermediate_size=8192, vocab_size=49_280)  # fmt: skip
    vision = {"model_type": "smolvlm_vision", "hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16,
              "intermediate_size": 4304, "image_size": 384, "patch_size": 14}  # fmt: skip
    return SmolVLMConfig(vision_config=vision, text_config=text, scale_factor=3,  # type: ignore[call-arg]
                         tie_word_embeddings=False)  # fmt: skip


PUBLISHED: dict[str, Callable[[], PretrainedConfig]] = {
    "llava-qwen2-7b": lambda: _llava(_qwen2_7b()),
    "llava-llama3-8b": lambda: _llava(_llama3_8b()),
    "qwen2.5-vl-3b": _qwen2_5_vl_3b,
    "qwen2.5-vl-7b": _qwen2_5_vl_7b,
    "smolvlm2-2.2b": _smolvlm2_2b,
}
"""Shapes of the paper's low-resolution models, from the config.json of openai/clip-vit-large-patch14-336,
Qwen/Qwen2-7B-Instruct and meta-llama/Llama-3.1-8B-Instruct, and of Qwen/Qwen2.5-VL-3B- and -7B-Instruct and
HuggingFaceTB/SmolVLM2-2.2B-Instruct."""

