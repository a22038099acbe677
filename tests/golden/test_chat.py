"""The label mask, token by token: committed masks for the embedded template, and other models' templates by rule.

`SICOG_WRITE_GOLDEN=1 pytest tests/golden` writes embedded.json anew; look at its diff before you commit it.
"""

from __future__ import annotations

import json
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sicog_exp.data.chat import IGNORED, ChatEncoder, ChatError, Example
from sicog_exp.data.scenes import make_scene, render
from sicog_exp.models.embedded import build_processor, build_tokenizer
from sicog_exp.prompts import COD_TURNS, COT_STEPS, PROMPTS
from sicog_exp.records import Message, turns_conversation, user

GOLDEN = Path(__file__).parent / "embedded.json"
CORPUS = ["Is there a red dog? yes no What color is the cat? blue green Describe the image in detail, step by step.",
          "user assistant system Be brief. How many tools are there? 2 a red dog, left of a blue cat."]  # fmt: skip
COT = "\n".join(f"{header}\n{part}" for header, part in zip(COT_STEPS, ("find cat", "blue cat", "cat blue", "blue")))
CONVERSATIONS: dict[str, tuple[Message, ...]] = {
    "single turn with an image": (user("Is there a red dog?", 1), Message("assistant", "yes")),
    "multi turn with an image": (user("Is there a red dog?", 1), Message("assistant", "yes"),
                                 user("What color is the cat?"), Message("assistant", "blue"),
                                 user("How many tools?"), Message("assistant", "2")),
    "system message": (Message("system", "Be brief."), user("Is there a dog?", 1), Message("assistant", "no")),
    "text only": (user("What color is the cat?"), Message("assistant", "green")),
    "chain of thought": (user(PROMPTS["cot"].replace("{question}", "What color is the cat?"), 1),
                         Message("assistant", COT)),
    "a caption as turns": turns_conversation(list(zip(COD_TURNS, ("a red dog", "one dog", "dog left of cat", "none",
                                                                  "a red dog, left of a blue cat."))), 1),
    "two images": (user("Is there a dog?", 2), Message("assistant", "yes")),
    "an image in the second turn": (user("Is there a dog?"), Message("assistant", "no"), user("And here?", 1),
                                    Message("assistant", "yes")),
    "unseen words": (user("Où?", 1), Message("assistant", "là-bas ☂")),
}  # fmt: skip
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {% elif message['role'] == 'assistant' %}"
    "ASSISTANT: {% endif %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""LLaVA-1.5's conversation: USER: ... ASSISTANT: ...</s>USER: ..."""
HUB_LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""What llava-hf/llava-1.5-7b-hf ships: it writes no end of turn at all."""
QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><image><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2-VL's ChatML: a default system message, vision markers around an image."""
REWRITING_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif loop.last and message['role'] == 'assistant' and "
    "message != messages[-1] %}...{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""Shortens earlier answers, as templates of thinking models do."""


@lru_cache(maxsize=8)
def encoder(template: str | None = None, end: str | None = None, start: str | None = None) -> ChatEncoder:
    """An encoder over a tiny tokenizer made here; `start` is put before every text, as Llama's tokenizer does."""
    from tokenizers import processors

    tokenizer = build_tokenizer(CORPUS, 400)
    extra = [token for token in (end, start, "<|im_start|>", "<|vision_start|>", "<|vision_end|>") if token]
    tokenizer.add_special_tokens({"additional_special_tokens": extra})
    if end:
        tokenizer.eos_token = end
    if start:
        tokenizer.bos_token = start
        number = tokenizer.convert_tokens_to_ids(start)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, number)])  # fmt: skip
    processor = build_processor(tokenizer, 24, [0.5] * 3, [0.25] * 3)
    if template:
        processor.chat_template = template
    return ChatEncoder(processor)


@lru_cache(maxsize=4)
def pixels(count: int, chat: ChatEncoder) -> Any:
    shown = [render(make_scene(1, "base", i), 1) for i in range(count)]
    return chat.pixels(shown) if count else None


def inputs_of(messages: tuple[Message, ...], chat: ChatEncoder) -> Any:
    return pixels(sum(message.content.count("<image>") for message in messages), chat)


def encode(chat: ChatEncoder, messages: tuple[Message, ...], max_length: int = 4096) -> Example:
    return chat.example(messages, inputs_of(messages, chat), max_length)


def rows(chat: ChatEncoder, example: Example) -> list[list[Any]]:
    """[token text, trained?] of every position; a run of image tokens is one row."""
    shown: list[list[Any]] = []
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (token, IGNORED)
        text = chat.tokenizer.decode([token])
        if text == chat.image_token and shown and shown[-1][0].startswith(text):
            shown[-1][0] = f"{text} x {int(shown[-1][0].rpartition(' x ')[2] or 1) + 1}"
        else:
            shown.append([f"{text} x 1" if text == chat.image_token else text, label != IGNORED])
    return shown


def trained_text(chat: ChatEncoder, example: Example) -> list[str]:
    """The texts of the runs with loss."""
    texts: list[list[int]] = [[]]
    for label in example.labels:
        if label == IGNORED:
            texts.append([])
        else:
            texts[-1].append(label)
    return [chat.tokenizer.decode(ids) for ids in texts if ids]


# The embedded template.


def test_the_embedded_masks_are_the_committed_ones() -> None:
    made = {name: rows(encoder(), encode(encoder(), messages)) for name, messages in CONVERSATIONS.items()}
    if os.environ.get("SICOG_WRITE_GOLDEN"):
        lines = (f" {json.dumps(name)}: [\n" + ",\n".join(f"  {json.dumps(row)}" for row in shown) + "\n ]"
                 for name, shown in made.items())  # fmt: skip
        GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    assert made == json.loads(GOLDEN.read_text())


ALL = {"embedded": (None, None, None), "llava": (LLAVA_TEMPLATE, "</s>", None),
       "llava with a start": (LLAVA_TEMPLATE, "</s>", "<s>"), "hub llava": (HUB_LLAVA_TEMPLATE, "</s>", "<s>"),
       "qwen": (QWEN_TEMPLATE, "<|im_end|>", None)}  # fmt: skip


@pytest.mark.parametrize("name", list(ALL))
@pytest.mark.parametrize("talk", list(CONVERSATIONS))
def test_loss_falls_on_every_response_and_its_end_alone(name: str, talk: str) -> None:
    chat, messages = encoder(*ALL[name]), CONVERSATIONS[talk]
    example = encode(chat, messages)
    answers = [message.content for message in messages if message.role == "assistant"]
    end = chat.tokenizer.eos_token
    assert trained_text(chat, example) == [f"{answer}{end}" for answer in answers]


@pytest.mark.parametrize("name", list(ALL))
@pytest.mark.parametrize("talk", list(CONVERSATIONS))
def test_training_and_generation_see_the_same_prompt_tokens(name: str, talk: str) -> None:
    """Before every response, earlier turns included: `prompt` is a prefix of `example`."""
    chat, messages = encoder(*ALL[name]), CONVERSATIONS[talk]
    example = encode(chat, messages)
    for i, message in enumerate(messages):
        if message.role == "assistant":
            ids = chat.prompt(messages[:i], inputs_of(messages, chat))
            assert example.input_ids[: len(ids)] == ids
            assert example.labels[len(ids)] != IGNORED
            assert example.labels[len(ids) - 1] == IGNORED


@pytest.mark.parametrize("name", ["llava", "llava with a start", "qwen"])
@pytest.mark.parametrize("talk", list(CONVERSATIONS))
def test_tokens_spell_what_the_template_renders(name: str, talk: str) -> None:
    chat, messages = encoder(*ALL[name]), CONVERSATIONS[talk]
    from sicog_exp.data.chat import to_chat

    rendered = chat.processor.apply_chat_template(to_chat(messages), tokenize=False)
    text = chat.tokenizer.decode(encode(chat, messages).input_ids).replace("<image>" * 9, "<image>")
    # The embedded tokenizer puts a space before every word (see build_tokenizer), which shows behind special tokens.
    text = re.sub(r"> (?=\w)", ">", text)
    assert rendered.rstrip().startswith(text.removeprefix("<s>"))
    assert text.endswith(chat.tokenizer.eos_token)


def test_a_start_token_comes_once_and_first() -> None:
    chat = encoder(*ALL["llava with a start"])
    start = chat.tokenizer.bos_token_id
    for messages in CONVERSATIONS.values():
        ids = encode(chat, messages).input_ids
        assert ids[0] == start
        assert ids.count(start) == 1
    assert encoder(None).tokenizer.encode("") == []


def test_image_tokens_are_as_many_as_the_model_fills() -> None:
    chat = encoder()
    for messages in CONVERSATIONS.values():
        image = chat.tokenizer.convert_tokens_to_ids(chat.image_token)
        images = sum(message.content.count("<image>") for message in messages)
        assert encode(chat, messages).input_ids.count(image) == 9 * images


def test_arrays_and_pictures_give_the_same_pixels() -> None:
    """Base training hands over arrays, everything else opened images."""
    from PIL import Image

    chat, array = encoder(), render(make_scene(1, "base", 0), 1)
    one, two = chat.pixels([array])["pixel_values"], chat.pixels([Image.fromarray(array)])["pixel_values"]
    assert (one == two).all()


# What cannot be carried.


def test_a_template_that_rewrites_earlier_turns_is_an_error() -> None:
    chat, messages = encoder(REWRITING_TEMPLATE, "<|im_end|>"), CONVERSATIONS["multi turn with an image"]
    with pytest.raises(ChatError, match="rewrites earlier turns"):
        encode(chat, messages)
    with pytest.raises(ChatError, match="rewrites earlier turns"):
        chat.prompt(messages[:-1], inputs_of(messages, chat))
    assert trained_text(chat, encode(chat, messages[:2])) == ["yes<|im_end|>"]


def test_a_conversation_without_a_response_is_an_error() -> None:
    with pytest.raises(ChatError, match="no response"):
        encode(encoder(), (user("Is there a dog?"),))


@settings(max_examples=80, deadline=None)
@given(talk=st.sampled_from(list(CONVERSATIONS)), length=st.integers(1, 120), name=st.sampled_from(list(ALL)))
def test_image_tokens_are_never_truncated(talk: str, length: int, name: str) -> None:
    """Whatever the limit: all image tokens, a whole prompt and a piece of the response, or an error."""
    chat, messages = encoder(*ALL[name]), CONVERSATIONS[talk]
    image = chat.tokenizer.convert_tokens_to_ids(chat.image_token)
    whole = encode(chat, messages)
    first = next(i for i, label in enumerate(whole.labels) if label != IGNORED)
    last_image = max((i for i, token in enumerate(whole.input_ids) if token == image), default=-1)
    if length <= max(first, last_image):
        with pytest.raises(ChatError, match=str(length)):
            encode(chat, messages, length)
        return
    cut = encode(chat, messages, length)
    assert len(cut) == min(length, len(whole))
    assert cut.input_ids == whole.input_ids[:length]
    assert cut.labels == whole.labels[:length]
    assert cut.input_ids.count(image) == whole.input_ids.count(image)
    assert any(label != IGNORED for label in cut.labels)


ANSWERS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=30).filter(
    lambda text: text == text.strip() and text and "<" not in text
)


@settings(max_examples=60, deadline=None)
@given(first=ANSWERS, second=ANSWERS, asked=ANSWERS, name=st.sampled_from(list(ALL)))
def test_any_words_are_masked_right(first: str, second: str, asked: str, name: str) -> None:
    chat = encoder(*ALL[name])
    messages = (user(asked, 1), Message("assistant", first), user(asked), Message("assistant", second))
    example = encode(chat, messages)
    end = chat.tokenizer.eos_token
    assert trained_text(chat, example) == [f"{first}{end}", f"{second}{end}"]
    for i in (1, 3):
        ids = chat.prompt(messages[:i], inputs_of(messages, chat))
        assert example.input_ids[: len(ids)] == ids


def test_a_processor_that_does_not_say_what_stands_in_an_image_s_place_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unsaid(*args: Any, **kwargs: Any) -> str:
        raise NotImplementedError

    chat = encoder()
    monkeypatch.setattr(chat.processor, "replace_image_token", unsaid)
    with pytest.raises(ChatError, match="LlavaProcessor does not say what stands in an image's place"):
        chat.pixels([render(make_scene(1, "base", 0), 1)])


def test_more_placeholders_than_images_are_an_error() -> None:
    with pytest.raises(ChatError, match="shows 2 images, and 1 came with it"):
        encoder().prompt((user("What is this?", 2),), pixels(1, encoder()))
    with pytest.raises(ChatError, match="shows 1 images, and 0 came with it"):
        encoder().prompt((user("What is this?", 1),), None)
