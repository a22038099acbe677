"""THE prompt table: one wording per data kind for training, generation and evaluation, with its parser.

Kinds (paper.md, section 3 of arXiv 2503.12303): `cod` Chain-of-Description caption, `dd` detailed-description
caption, `cot` structured chain-of-thought answer, `direct` short answer, `text` ordinary text-only instruction.
The step headers are those of the authors' data.
"""

from __future__ import annotations

import re
from typing import Literal

Kind = Literal["cod", "dd", "cot", "direct", "text"]
KINDS: tuple[Kind, ...] = ("cod", "dd", "cot", "direct", "text")
CAPTION_KINDS: tuple[Kind, ...] = ("cod", "dd")
REASONING_KINDS: tuple[Kind, ...] = ("cot", "direct")

COD_STEPS = (
    "Step 1: Extract salient content",
    "Step 2: Analyze detailed information",
    "Step 3: Consider relational-level attributes",
    "Step 4: Examine marginal or peripheral content",
    "Step 5: Organize all observations",
)
COT_STEPS = (
    "Step 1: Clarify the task objective",
    "Step 2: Extract the crucial visual information",
    "Step 3: Generate detailed reasoning",
    "Step 4: Conclude the task with an answer",
)
STEPS: dict[str, tuple[str, ...]] = {"cod": COD_STEPS, "cot": COT_STEPS}
_STEP = re.compile(r"(?m)^\s*\**Step (\d+):")
_NUMBERED = {kind: list(range(1, len(headers) + 1)) for kind, headers in STEPS.items()}
_WORDINGS = {header: header.split(": ", 1)[1] for headers in STEPS.values() for header in headers}

COD_TURNS = (
    "What stands out in the image?",
    "What do you see in detail?",
    "How are these things related and arranged?",
    "What lies at the margins or in the background?",
    "Put it all together in one description.",
)
"""What the user asks for, a Chain-of-Description step a turn, where a caption becomes a conversation."""

PROMPTS: dict[Kind, str] = {
    "cod": "Describe the image in detail, step by step.",
    "dd": "Describe the image as descriptively as possible.",
    "cot": "{question}\nAnswer step by step.",
    "direct": "{question}\nAnswer with a word, phrase or option letter.",
    "text": "{question}",
}


def prompt(kind: Kind, question: str = "") -> str:
    """The user's words for one example of a kind; `question` is ignored by the caption kinds."""
    return PROMPTS[kind].replace("{question}", question)


def question_of(kind: Kind, prompt_text: str) -> str:
    """The question inside a prompt built by `prompt` (the prompt itself where it was worded otherwise)."""
    suffix = PROMPTS[kind].removeprefix("{question}")
    return prompt_text.removesuffix(suffix) if suffix != PROMPTS[kind] else prompt_text


def structured(kind: Kind, parts: tuple[str, ...]) -> str:
    """A whole `cod` or `cot` response from its steps' contents."""
    return "\n".join(f"{header}\n{part}" for header, part in zip(STEPS[kind], parts, strict=True))


def steps_of(kind: Kind, response: str) -> tuple[str, ...] | None:
    """The contents of a structured response's steps, or None where a header is missing, doubled or out of order.

    A header counts by its "Step k:" beginning, so that longer wordings of the same step still parse.
    """
    pieces = _STEP.split(response)
    if pieces[0].strip() or list(map(int, pieces[1::2])) != _NUMBERED[kind]:
        return None
    return tuple(map(_content, STEPS[kind], pieces[2::2]))


def _content(header: str, body: str) -> str:
    """A step's text without the rest of its header line, whatever that line's wording."""
    first, newline, rest = body.strip().partition("\n")
    wording = _WORDINGS[header]
    if newline and first == wording:  # as nearly always
        return rest.strip()
    tail = first.removeprefix(wording)
    if tail != first and (not newline or (tail and re.match(r"\**[.:]\**\s*\w", tail))):
        # our wording, with the content behind it on the same line
        return f"{tail.lstrip(' .:*')}{newline}{rest}".strip()
    return rest.strip() if newline else first


def final_text(kind: Kind, response: str) -> str | None:
    """What curation compares: the last step of a structured response, else the whole (paper.md, Curation).

    None where the format is broken or nothing is left.
    """
    if kind in STEPS:
        steps = steps_of(kind, response)
        return (steps[-1] or None) if steps else None
    return response.strip() or None


_ARTICLES = {"a", "an", "the"}
_NUMBERS = {"zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
            "eight": "8", "nine": "9", "ten": "10"}  # fmt: skip


def normalize_answer(text: str) -> str:
    """Lower case, no punctuation at word ends, no articles, number words as digits (after VQAv2's evaluation)."""
    words = [word.strip(".,;:!?\"'()[]") for word in text.lower().split()]
    # An article that stands alone is no article: it is the option letter A.
    content = [_NUMBERS.get(word, word) for word in words if word and word not in _ARTICLES]
    return " ".join(content or filter(None, words))
