"""The embedded base: a LLaVA small enough for two cores, built from configs with a tokenizer of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sicog_exp.data.scenes import IMAGE_SIZE
from sicog_exp.prompts import COD_STEPS, COT_STEPS

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<image>")
WORDS = r" ?[\w-]+| ?[^\w\s]|\s"


def build_tokenizer(corpus: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE over `corpus`: any text is representable, step headers are one token each.

    A word is the same token at the start of a line as behind a space (a space is put before it, and taken away again by
    the decoder): a small model cannot afford to learn every word twice.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([
        normalizers.Replace(Regex(r"\n(?=\w)"), "\n "), normalizers.Prepend(" "),
        normalizers.Replace(Regex(r"\A (?=\W|\z)"), "")])  # fmt: skip
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace("\n ", "\n"), decoders.Strip(" ", 1, 0)])  # fmt: skip
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=list(SPECIAL_TOKENS),
                                  show_progress=False)  # fmt: skip
    backend.train_from_iterator(corpus, trainer)
    backend.add_tokens([AddedToken(header, normalized=False) for header in COD_STEPS + COT_STEPS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=None, eos_token="<|end|>", pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False, padding_side="left", extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast, *, width: int, vision_layers: int, language_layers: int, heads: int,
                patch_size: int, max_length: int) -> LlavaForConditionalGeneration:  # fmt: skip
    """CLIP-ViT, MLP projector and Qwen2 decoder with random weights; one image gives (IMAGE_SIZE / patch)^2 tokens."""
    import torch
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

    vision = CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=vision_layers, num_attention_heads=heads,
        image_size=IMAGE_SIZE, patch_size=patch_size, projection_dim=width,
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=language_layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=max_length,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None, use_sliding_window=False,
    )  # fmt: skip
    image_token: Any = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(  # type: ignore[call-arg]
        vision_config=vision, text_config=text, image_token_index=image_token,
        image_seq_length=(IMAGE_SIZE // patch_size) ** 2, vision_feature_layer=-1, tie_word_embeddings=True,
        vision_feature_select_strategy="default", pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    # The usual spread of 0.02 suits widths in the thousands. At this width attention hardly starts to differ from
    # uniform: measured three to four times as many samples to the same loss, and words of one class (colors) that never
    # came apart. CLIP's own initialisation already scales with the width.
    for part in (model.model.language_model, model.model.multi_modal_projector):
        for weight in part.parameters():
            if weight.ndim == 2:
                torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def build_processor(tokenizer: PreTrainedTokenizerFast, patch_size: int, mean: list[float], std: list[float]
                    ) -> LlavaProcessor:  # fmt: skip
    """The one image path and chat template of the embedded model; pixels are normalised by the world's own mean."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    image_processor = CLIPImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, do_center_crop=False, image_mean=mean, image_std=std,
        do_convert_rgb=True,
    )  # fmt: skip
    return LlavaProcessor(
        image_processor=image_processor, tokenizer=tokenizer, patch_size=patch_size,
        vision_feature_select_strategy="default", image_token="<image>", num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
