"""Chat template and label mask: the one way from messages to tokens, for training, generation and evaluation.

The conversation is cut where the assistant begins and ends to speak, and each piece is tokenized by itself, so that a
prompt has the same tokens in training as in generation, whatever the tokenizer would merge across the boundary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sicog_exp.records import IMAGE_PLACEHOLDER, Message

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from PIL.Image import Image

IGNORED = -100
"""Label of a position without loss."""


class ChatError(ValueError):
    """A conversation that this model's template or length limit cannot carry."""


@dataclass(frozen=True)
class Example:
    """One tokenized conversation; `labels` are IGNORED outside responses. Both have the same length."""

    input_ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)


class ImageInputs(dict[str, Any]):
    """What the model takes for one example's images: tensors by name, the first dimension counting images, tiles or
    patches. `places` are the texts that stand where the conversation shows each image: its tokens, and what the model
    expects around them."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], places: Sequence[str]) -> None:
        super().__init__(tensors)
        self.places = tuple(places)


def join_images(inputs: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors of several examples as one batch. Images of fewer tiles, or smaller ones, are padded with zeros at
    their ends, as the processors do themselves."""
    return {name: _joined([tensors[name] for tensors in inputs]) for name in (inputs[0] if inputs else ())}


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    import torch

    shapes = [tensor.shape[1:] for tensor in tensors]
    if len(set(shapes)) == 1:
        return torch.cat(list(tensors))
    shape = [max(sizes) for sizes in zip(*shapes)]
    whole = tensors[0].new_zeros(sum(map(len, tensors)), *shape)
    filled = 0
    for tensor in tensors:
        whole[(slice(filled, filled + len(tensor)), *(slice(size) for size in tensor.shape[1:]))] = tensor
        filled += len(tensor)
    return whole


def to_chat(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages in the form that processors' chat templates take: content as text and image parts."""
    return [{"role": m.role, "content": _parts(m.content)} for m in messages]


def _parts(content: str) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    for i, text in enumerate(content.split(IMAGE_PLACEHOLDER)):
        if i:
            parts.append({"type": "image"})
            text = text.removeprefix("\n")
        if text:
            parts.append({"type": "text", "text": text})
    return parts


class ChatEncoder:
    """Tokens of conversations for one processor."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_token: str = processor.image_token
        self._image_ids = set(processor.image_token_ids)
        start = self.tokenizer.encode("")
        # Llama-like models expect a token in front of every text, which chat templates leave to the tokenizer.
        self._start: list[int] = start if start == [self.tokenizer.bos_token_id] else []

    def pixels(self, images: Sequence[Image | NDArray[np.uint8]]) -> ImageInputs:
        """The processor's tensors for one example's images (for LLaVA: pixel_values (images, 3, H, W)).

        The processor itself says what it puts in each image's place, whatever it counts: tiles, rows, patches.
        Raises ChatError for images that it refuses.
        """
        import torch

        try:
            made = self.processor(images=[list(images)], text=[self.image_token * len(images)],
                                  return_text_replacement_offsets=True, images_kwargs={"return_tensors": "pt"})
            places = [place["replacement"] for place in made.pop("text_replacement_offsets")[0]]
        except (KeyError, NotImplementedError) as error:
            raise ChatError(f"{type(self.processor).__name__} does not say what stands in an image's place "
                            f"({error!r}); this architecture is not supported yet") from None  # fmt: skip
        except ValueError as error:  # Qwen-VL takes no picture more than 200 times as long as wide
            raise ChatError(f"{type(self.processor).__name__} refuses it ({error}); crop the picture, pad it, or leave "
                            "the row out") from None  # fmt: skip
        return ImageInputs({name: value for name, value in made.items() if isinstance(value, torch.Tensor)}, places)

    def image_length(self, image: Image) -> int:
        """Tokens that one image takes in a conversation without others."""
        return len(self.tokenizer.encode(self.pixels([image]).places[0], add_special_tokens=False))

    def prompt(self, messages: Sequence[Message], image_inputs: ImageInputs | None) -> list[int]:
        """Tokens up to where the assistant begins to speak, cut into the same pieces as in `example`."""
        earlier, done = self._pieces(messages)
        text = self._render(messages, generation=True)
        if not text.startswith(done):
            raise ChatError("the chat template rewrites earlier turns: generation would see other tokens than training")
        pieces = [*(piece for piece, _ in earlier), text[len(done) :]]
        return [token for tokens in self._tokens(self._expand(pieces, image_inputs)) for token in tokens]

    def example(self, messages: Sequence[Message], image_inputs: ImageInputs | None, max_length: int) -> Example:
        """A whole conversation with its label mask: loss on every assistant turn and its end, nowhere else.

        Raises ChatError when the prompt alone, image tokens included, does not fit; a longer response is cut at its
        end.
        """
        pieces, _ = self._pieces(messages)
        if not pieces:
            raise ChatError("the conversation has no response to learn from")
        texts = self._expand([text for text, _ in pieces], image_inputs)
        ids: list[int] = []
        labels: list[int] = []
        for tokens, (_, trained) in zip(self._tokens(texts), pieces, strict=True):
            ids += tokens
            labels += tokens if trained else [IGNORED] * len(tokens)
        first_response = next(i for i, label in enumerate(labels) if label != IGNORED)
        if first_response >= max_length:
            raise ChatError(f"the prompt has {first_response} tokens, images included; max_length is {max_length}")
        self._check_images_kept(ids, max_length)
        return Example(ids[:max_length], labels[:max_length])

    def _check_images_kept(self, ids: list[int], max_length: int) -> None:
        if self._image_ids.intersection(ids[max_length:]):
            raise ChatError(f"max_length={max_length} would cut image tokens of a {len(ids)} token conversation")

    def _pieces(self, messages: Sequence[Message]) -> tuple[list[tuple[str, bool]], str]:
        """(text, trained) pieces up to the last response's end of turn, and the rendered text that they cover."""
        pieces: list[tuple[str, bool]] = []
        done = ""
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = self._render(messages[:i], generation=True)
            after = self._render(messages[: i + 1], generation=False)
            if not before.startswith(done) or not after.startswith(before):
                raise ChatError("the chat template rewrites earlier turns: a label mask cannot be made for it")
            response = self._to_end_of_turn(after[len(before) :])
            end = "" if response.endswith(self.tokenizer.eos_token) else self.tokenizer.eos_token
            pieces += [(before[len(done) :], False), (response + end, True)]
            done = before + response
        return pieces, done

    def _to_end_of_turn(self, text: str) -> str:
        """A response up to its end-of-turn token, without what the template writes behind it.

        Some templates write none (LLaVA-1.5's): then up to its last word.
        """
        end = self.tokenizer.eos_token
        return text[: text.rindex(end) + len(end)] if end in text else text.rstrip()

    def _render(self, messages: Sequence[Message], generation: bool) -> str:
        from jinja2.exceptions import TemplateError

        chat = to_chat(messages)
        try:
            return self.processor.apply_chat_template(chat, add_generation_prompt=generation, tokenize=False)
        except TemplateError as error:  # a system message, say, that the model does not know
            raise ChatError(str(error)) from None

    def _expand(self, texts: Sequence[str], image_inputs: ImageInputs | None) -> list[str]:
        """Each image placeholder becomes what the model expects there, counted over all texts."""
        places = image_inputs.places if image_inputs is not None else ()
        shown = sum(text.count(self.image_token) for text in texts)
        if shown > len(places):
            raise ChatError(f"the conversation shows {shown} images, and {len(places)} came with it")
        rest = iter(places)
        expanded = []
        for text in texts:
            head, *parts = text.split(self.image_token)
            expanded.append(head + "".join(next(rest) + part for part in parts))
        return expanded

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each piece of one conversation, the first one with what the model expects in front."""
        pieces = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        if self._start and pieces[0][:1] != self._start:
            pieces[0] = self._start + pieces[0]
        return pieces
