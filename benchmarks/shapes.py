"""Models of published shapes with random weights, with a processor of their picture size: what a GPU is measured with.

A small tokenizer stands before the whole vocabulary: prompts use some hundred of its tokens, answers any.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaProcessor,
    Qwen2Config,
)

from sicog_exp.models.embedded import CHAT_TEMPLATE, build_tokenizer
from sicog_exp.models.loading import plan_no_attention

CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
          "image_size": 336, "patch_size": 14}  # fmt: skip
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "embedded": (
        {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
         "image_size": 72, "patch_size": 12},
        {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
         "intermediate_size": 384, "vocab_size": 1024, "tie_word_embeddings": True}),
    "llava-qwen2-0.5b": (
        CLIP_L,
        {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
         "intermediate_size": 4864, "vocab_size": 151_936, "tie_word_embeddings": True}),
    "llava-qwen2-7b": (
        CLIP_L,
        {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
         "intermediate_size": 18_944, "vocab_size": 152_064}),
}  # fmt: skip
"""Vision and text sizes: of the embedded base, and from the config.json of openai/clip-vit-large-patch14-336 with
Qwen/Qwen2-0.5B-Instruct and Qwen/Qwen2-7B-Instruct."""


def random_model(shape: str, device: str) -> tuple[Any, LlavaProcessor]:
    """Model (bfloat16 on a GPU, else float32) and processor."""
    vision, text = SHAPES[shape]
    tokenizer = build_tokenizer([" ".join(map(str, range(300)))], 400)
    processor = _processor(tokenizer, vision["image_size"], vision["patch_size"])
    image_token: Any = tokenizer.convert_tokens_to_ids("<image>")
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = LlavaConfig(  # type: ignore[call-arg]
        vision_config=CLIPVisionConfig(**vision), text_config=Qwen2Config(**text, **ends, use_sliding_window=False),
        image_token_index=image_token, image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
        tie_word_embeddings=text.get("tie_word_embeddings", False), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    plan_no_attention()
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), processor


def _processor(tokenizer: Any, side: int, patch: int) -> LlavaProcessor:
    pixels = CLIPImageProcessor(size={"height": side, "width": side}, do_center_crop=False, do_convert_rgb=True)
    return LlavaProcessor(image_processor=pixels, tokenizer=tokenizer, patch_size=patch, image_token="<image>",
                          vision_feature_select_strategy="default", num_additional_image_tokens=1,
                          chat_template=CHAT_TEMPLATE)  # fmt: skip


def measured_peak(device: str) -> float:
    """FLOP/s of a large matrix product in the dtype of the models."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    rounds, best = 10, 0.0
    for _ in range(5):
        wait(device)
        started = clock(device)
        for _ in range(rounds):
            left @ right
        wait(device)
        best = max(best, 2 * size**3 * rounds / (clock(device) - started))
    return best


def wait(device: str) -> None:
    """Until the GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def clock(device: str) -> float:
    """Seconds: the clock's on a GPU, the processor's on a CPU, which others may use too."""
    return time.perf_counter() if device == "cuda" else time.process_time()
