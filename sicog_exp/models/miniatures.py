"""Architectures of transformers as models of a few ten thousand random weights with their real processors, for tests
and for `scale=smoke`: built from their own configuration classes, with one small tokenizer that has the family's
special tokens. Nothing is downloaded, and nothing was learned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from sicog_exp.models.embedded import WORDS

WIDTH, HEADS = 32, 4
SIDE, PATCH = 28, 7
"""Pixels of a picture or tile and of a patch, where a family does not need others: 16 patches."""
CORPUS = ["Is there a red dog? yes no What color is the cat? blue green Describe the image in detail, step by step.",
          "user assistant system Be brief. How many tools are there? 2 a red dog, left of a blue cat."]  # fmt: skip


def chat_template(start: str, image: str, user_end: str, reply: str, reply_end: str, first: str = "") -> str:
    """A template of the common form: `start` opens a user's turn, `reply` the assistant's."""
    parts = ("{% for part in message['content'] %}{% if part['type'] == 'image' %}" + image +
             "{% else %}{{ part['text'] }}{% endif %}{% endfor %}")  # fmt: skip
    return (first + "{% for message in messages %}{% if message['role'] == 'assistant' %}" + reply + parts + reply_end +
            "{% else %}" + start + parts + user_end + "{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}" + reply + "{% endif %}")  # fmt: skip


def chatml(image: str) -> str:
    return chat_template("<|im_start|>{{ message['role'] }}\n", image, "<|im_end|>\n", "<|im_start|>assistant\n",
                         "<|im_end|>\n")  # fmt: skip


def tokenizer(end: str, template: str, specials: tuple[str, ...] = (), bos: str | None = None, **named: str) -> Any:
    """A byte-level BPE with `named` special tokens as attributes (image_token, boi_token, ...)."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    every = dict.fromkeys(["<|endoftext|>", end, *([bos] if bos else []), *specials, *named.values()])
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=360, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=list(every),
        show_progress=False))  # fmt: skip
    made = tf.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end, pad_token="<|endoftext|>", bos_token=bos, padding_side="left",
        clean_up_tokenization_spaces=False, extra_special_tokens=named)  # fmt: skip
    made.chat_template = template
    return made


def text_values(tok: Any, **more: Any) -> dict[str, Any]:
    ends = {"eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id, "bos_token_id": tok.bos_token_id}
    return {"vocab_size": len(tok), "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2,
            "num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": 1024, **ends, **more}


def vision_values(**more: Any) -> dict[str, Any]:
    return {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS,
            "image_size": SIDE, "patch_size": PATCH, **more}  # fmt: skip


Built = tuple[Any, Any]
GRID = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
SQUARE = {"height": SIDE, "width": SIDE}


def llava() -> Built:
    template = chat_template("USER: ", "<image>\n", " ", "ASSISTANT: ", "</s>", "<s>")
    tok = tokenizer("</s>", template, bos="<s>", image_token="<image>")
    images = tf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE)
    processor = tf.LlavaProcessor(images, tok, patch_size=PATCH, vision_feature_select_strategy="default",
                                  num_additional_image_tokens=1, chat_template=template)  # fmt: skip
    config = tf.LlavaConfig(vision_config=tf.CLIPVisionConfig(**vision_values(projection_dim=WIDTH)),
                            text_config=tf.LlamaConfig(**text_values(tok)), image_seq_length=16,
                            image_token_index=tok.image_token_id)  # fmt: skip
    return tf.LlavaForConditionalGeneration(config), processor


def llava_next() -> Built:
    template = chat_template("[INST] ", "<image>\n", " [/INST]", "", "</s>", "<s>")
    tok = tokenizer("</s>", template, bos="<s>", image_token="<image>")
    images = tf.LlavaNextImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=GRID)
    processor = tf.LlavaNextProcessor(images, tok, patch_size=PATCH, vision_feature_select_strategy="default",
                                      num_additional_image_tokens=1, chat_template=template)  # fmt: skip
    config = tf.LlavaNextConfig(vision_config=tf.CLIPVisionConfig(**vision_values(projection_dim=WIDTH)),
                                text_config=tf.LlamaConfig(**text_values(tok)), image_grid_pinpoints=GRID,
                                image_token_index=tok.image_token_id, image_seq_length=16)  # fmt: skip
    return tf.LlavaNextForConditionalGeneration(config), processor


def llava_onevision() -> Built:
    template = chatml("<image>\n")
    tok = tokenizer("<|im_end|>", template, ("<|im_start|>",), image_token="<image>", video_token="<video>")
    images = tf.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=GRID)
    processor = tf.LlavaOnevisionProcessor(
        images, tok, tf.LlavaOnevisionVideoProcessor(size=SQUARE), num_image_tokens=16,
        vision_feature_select_strategy="full", chat_template=template)  # fmt: skip
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**vision_values(vision_use_head=False)),
        text_config=tf.Qwen2Config(**text_values(tok)), image_grid_pinpoints=GRID,
        image_token_index=tok.image_token_id, video_token_index=tok.video_token_id)  # fmt: skip
    return tf.LlavaOnevisionForConditionalGeneration(config), processor


IDEFICS_TOKENS = ("<fake_token_around_image>", "<global-img>", "<|im_start|>",
                  *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)))  # fmt: skip


def _idefics_template() -> str:
    return chat_template("User:", "<image>", "<end_of_utterance>\n", "Assistant:", "<end_of_utterance>\n",
                         "<|im_start|>")  # fmt: skip


def _tiled(kind: Any, processor: Any) -> Any:
    """The configuration of Idefics3 and of SmolVLM, its successor."""
    vision = kind().vision_config.to_dict() | vision_values(image_size=32, patch_size=8)
    tok = processor.tokenizer
    return kind(vision_config=vision, text_config=tf.LlamaConfig(**text_values(tok)), scale_factor=2,
                image_token_id=processor.image_token_id, pad_token_id=tok.pad_token_id)  # fmt: skip


def idefics3() -> Built:
    template = _idefics_template()
    tok = tokenizer("<end_of_utterance>", template, (*IDEFICS_TOKENS, "<image>"))
    images = tf.Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = tf.Idefics3Processor(images, tok, image_seq_len=4, chat_template=template)
    return tf.Idefics3ForConditionalGeneration(_tiled(tf.Idefics3Config, processor)), processor


def smolvlm() -> Built:
    template = _idefics_template()
    tok = tokenizer("<end_of_utterance>", template, (*IDEFICS_TOKENS, "<image>", "<video>"))
    images = tf.SmolVLMImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = tf.SmolVLMProcessor(images, tok, tf.SmolVLMVideoProcessor(), image_seq_len=4, chat_template=template)
    return tf.SmolVLMForConditionalGeneration(_tiled(tf.SmolVLMConfig, processor)), processor


def internvl() -> Built:
    template = chatml("<IMG_CONTEXT>\n")
    tok = tokenizer("<|im_end|>", template, ("<|im_start|>",), start_image_token="<img>", end_image_token="</img>",
                    context_image_token="<IMG_CONTEXT>", video_token="<video>")  # fmt: skip
    images = tf.GotOcr2ImageProcessor(crop_to_patches=True, max_patches=4, size=SQUARE)
    processor = tf.InternVLProcessor(images, tok, tf.InternVLVideoProcessor(size=SQUARE), image_seq_length=4,
                                     chat_template=template)  # fmt: skip
    vision = vision_values(image_size=(SIDE, SIDE), patch_size=(PATCH, PATCH))
    config = tf.InternVLConfig(vision_config=tf.InternVLVisionConfig(**vision), image_seq_length=4,
                               text_config=tf.Qwen2Config(**text_values(tok)),
                               image_token_id=tok.context_image_token_id)  # fmt: skip
    return tf.InternVLForConditionalGeneration(config), processor


def _sections(head: int) -> list[int]:
    """Frequencies of a head for time, height and width: half of them, and a quarter each."""
    return [head // 2 - 2 * (head // 8), head // 8, head // 8]


def _qwen(name: str, vision: dict[str, Any], text: dict[str, Any], videos: Any) -> Built:
    template = chatml("<|vision_start|><|image_pad|><|vision_end|>")
    tok = tokenizer("<|im_end|>", template, ("<|im_start|>", "<|vision_start|>", "<|vision_end|>"),
                    image_token="<|image_pad|>", video_token="<|video_pad|>")  # fmt: skip
    images = tf.Qwen2VLImageProcessor(patch_size=8, size={"shortest_edge": 256, "longest_edge": 4096})
    processor = getattr(tf, f"{name}Processor")(images, tok, videos, chat_template=template)
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": _sections(WIDTH // HEADS)}
    shape = {"depth": 2, "num_heads": HEADS, "patch_size": 8, **vision}
    ids = {f"{part}_token_id": tok.convert_tokens_to_ids(f"<|{part}|>") for part in ("vision_start", "vision_end")}
    config = getattr(tf, f"{name}Config")(
        vision_config=shape, text_config=text_values(tok, rope_parameters=rope, **text), **ids,
        image_token_id=processor.image_token_id, video_token_id=processor.video_token_id)  # fmt: skip
    return getattr(tf, f"{name}ForConditionalGeneration")(config), processor


def qwen2_vl() -> Built:
    return _qwen("Qwen2VL", {"embed_dim": WIDTH, "hidden_size": WIDTH}, {}, tf.Qwen2VLVideoProcessor(patch_size=8))


def qwen2_5_vl() -> Built:
    vision = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "out_hidden_size": WIDTH, "window_size": 32,
              "fullatt_block_indexes": [1]}  # fmt: skip
    return _qwen("Qwen2_5_VL", vision, {}, tf.Qwen2VLVideoProcessor(patch_size=8))


def qwen3_vl() -> Built:
    vision = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "out_hidden_size": WIDTH,
              "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}  # fmt: skip
    return _qwen("Qwen3VL", vision, {"head_dim": WIDTH // HEADS}, tf.Qwen3VLVideoProcessor(patch_size=8))


def gemma3() -> Built:
    template = chat_template("<start_of_turn>user\n", "<start_of_image>", "<end_of_turn>\n", "<start_of_turn>model\n",
                             "<end_of_turn>\n", "<bos>")  # fmt: skip
    tok = tokenizer("<eos>", template, ("<start_of_turn>", "<end_of_turn>"), "<bos>", boi_token="<start_of_image>",
                    eoi_token="<end_of_image>", image_token="<image_soft_token>")  # fmt: skip
    images = tf.Gemma3ImageProcessor(size=SQUARE)
    processor = tf.Gemma3Processor(images, tok, chat_template=template, image_seq_length=4)
    text = text_values(tok, head_dim=WIDTH // HEADS, query_pre_attn_scalar=WIDTH // HEADS, sliding_window=16,
                       layer_types=["sliding_attention", "full_attention"])  # fmt: skip
    config = tf.Gemma3Config(
        vision_config=tf.SiglipVisionConfig(**vision_values(vision_use_head=False)), text_config=text,
        mm_tokens_per_image=4, image_token_index=tok.image_token_id, boi_token_index=tok.boi_token_id,
        eoi_token_index=tok.eoi_token_id, tie_word_embeddings=False)  # fmt: skip
    return tf.Gemma3ForConditionalGeneration(config), processor


def qwen2(**more: Any) -> Built:
    """A causal language model with its tokenizer, whose chat template knows of words alone."""
    template = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
                "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")  # fmt: skip
    tok = tokenizer("<|im_end|>", template, ("<|im_start|>",))
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**text_values(tok, **more))), tok


def llama() -> Built:
    _, tok = qwen2()
    return tf.LlamaForCausalLM(tf.LlamaConfig(**text_values(tok))), tok


def clip() -> Built:
    """A vision tower, its own text model beside it, with its image processor."""
    vision = tf.CLIPVisionConfig(**vision_values(projection_dim=WIDTH))
    text = tf.CLIPTextConfig(hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1, num_attention_heads=HEADS)
    config = tf.CLIPConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), projection_dim=WIDTH)
    return tf.CLIPModel(config), tf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE)


def siglip() -> Built:
    vision = tf.SiglipVisionConfig(**vision_values(vision_use_head=False))
    return tf.SiglipVisionModel(vision), tf.SiglipImageProcessor(size=SQUARE)


FAMILIES: dict[str, Callable[[], Built]] = {
    build.__name__: build for build in (
        llava, llava_next, llava_onevision, idefics3, smolvlm, internvl, qwen2_vl, qwen2_5_vl, qwen3_vl, gemma3)
}  # fmt: skip
"""Image-text-to-text architectures, named as their configuration's `model_type`."""
LANGUAGES: dict[str, Callable[[], Built]] = {build.__name__: build for build in (qwen2, llama)}
TOWERS: dict[str, Callable[[], Built]] = {"clip": clip, "clip_vision_model": clip, "siglip": siglip,
                                          "siglip_vision_model": siglip}  # fmt: skip
SEED = 11


def save(make: Callable[[], Built], folder: Path) -> Path:
    """Model and processor (or tokenizer, or image processor), the same weights each time. These are spread as wide as
    their width allows: every answer depends on its prompt and its picture, so that a small mistake shows."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        made: Any = make()
        model, processor = made
        for weight in model.parameters():
            if weight.ndim == 2:
                torch.nn.init.normal_(weight, std=1.5 * weight.shape[1] ** -0.5)
    tok: Any = getattr(processor, "tokenizer", processor)
    if getattr(tok, "eos_token", None):  # no image processor
        model.generation_config.eos_token_id = tok.eos_token_id
        model.generation_config.pad_token_id = tok.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
