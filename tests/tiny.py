"""A very small model of the embedded kind, trained for seconds: enough to end its answers, at varying lengths."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from sicog_exp.data.chat import IGNORED, ChatEncoder
from sicog_exp.data.questions import base_turns, chain_of_thought, description, questions
from sicog_exp.data.scenes import Scene, make_scene, render, rng_for
from sicog_exp.models.embedded import build_model, build_processor, build_tokenizer
from sicog_exp.prompts import Kind, prompt
from sicog_exp.records import Message, conversation

SEED = 7
Turn = tuple[Scene, tuple[Message, ...], Kind]


def turns(split: str, count: int) -> Iterator[Turn]:
    """Conversations about `count` scenes: a caption, a chain of thought, a direct answer and a simple question each."""
    for i in range(count):
        scene = make_scene(SEED, split, i)
        rng = rng_for(SEED, split, i, "tiny")
        question = questions(scene, rng, 1)[0]
        simple, answer = base_turns(scene, rng, 1)[0]
        yield scene, conversation(prompt("dd"), description(scene), ("image",)), "dd"
        yield scene, conversation(prompt("cot", question.text), chain_of_thought(scene, question), ("image",)), "cot"
        yield scene, conversation(prompt("direct", question.text), question.answer, ("image",)), "direct"
        yield scene, conversation(prompt("direct", simple), answer, ("image",)), "direct"


def build(folder: Path, width: int = 32, layers: int = 2, steps: int = 60, scenes: int = 24, patch_size: int = 24,
          rate: float = 8e-3) -> Path:  # fmt: skip
    """Save model and processor in `folder`; the same arguments give the same weights."""
    from PIL import Image

    data = list(turns("base", scenes))
    tokenizer = build_tokenizer((message.content for _, messages, _ in data for message in messages), 420)
    processor = build_processor(tokenizer, patch_size, [0.5] * 3, [0.25] * 3)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = build_model(tokenizer, width=width, vision_layers=layers, language_layers=layers, heads=2,
                            patch_size=patch_size, max_length=512)  # fmt: skip
        encoder = ChatEncoder(processor)
        pixels = [encoder.pixels([Image.fromarray(render(scene, SEED))]) for scene, _, _ in data]
        examples = [encoder.example(m, inputs, 512) for (_, m, _), inputs in zip(data, pixels, strict=True)]
        _train(model, [(e.input_ids, e.labels, p["pixel_values"]) for e, p in zip(examples, pixels, strict=True)],
               steps, rate)  # fmt: skip
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _train(model, examples, steps: int, rate: float, batch: int = 16) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    order = torch.randperm(len(examples) * (steps * batch // len(examples) + 1)) % len(examples)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10) * (1 - step / steps)
        rows = [examples[i] for i in order[step * batch : (step + 1) * batch]]
        width = max(len(ids) for ids, _, _ in rows)
        ids = torch.tensor([row + [0] * (width - len(row)) for row, _, _ in rows])
        labels = torch.tensor([row + [IGNORED] * (width - len(row)) for _, row, _ in rows])
        loss = model(input_ids=ids, labels=labels, pixel_values=torch.cat([p for _, _, p in rows])).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
