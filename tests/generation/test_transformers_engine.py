from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import chi2_contingency, chisquare

from sicog_exp.generation.decoder import GROWTH
from sicog_exp.generation.drawing import LIKELY_TOKENS, draw, noise, nucleus
from sicog_exp.generation.engine import Decoding, Request
from sicog_exp.generation.requests import keys_of
from sicog_exp.generation.transformers_engine import TransformersEngine
from sicog_exp.prompts import prompt
from sicog_exp.records import user


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> TransformersEngine:
    torch.set_num_threads(1)
    return TransformersEngine.from_path(tiny_model)


@pytest.fixture(scope="module")
def requests_36(world_images: list[Path]) -> list[Request]:
    """36 prompts of 12 lengths over 12 images."""
    made = []
    for i in range(36):
        question = f"Where is the {'red ' * (i % 12)}dog number {i}?"
        made.append(Request(f"s{i}", "cot", (user(prompt("cot", question), 1),), (world_images[i % 12],), 1))
    return made


def chat_text(engine: TransformersEngine, request: Request) -> str:
    from sicog_exp.data.chat import to_chat

    return engine.encoder.processor.apply_chat_template(
        to_chat(request.messages), add_generation_prompt=True, tokenize=False
    )


def reference(engine: TransformersEngine, batch: list[Request], **options) -> torch.Tensor:
    """New tokens that transformers' own `generate` makes for a batch."""
    processor = engine.encoder.processor
    images = [Image.open(path).convert("RGB") for request in batch for path in request.images]
    texts = [chat_text(engine, request) for request in batch]
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    pad = processor.tokenizer.pad_token_id
    output = engine.model.generate(**inputs, eos_token_id=engine.stops.tolist(), pad_token_id=pad, **options)
    return output[:, inputs["input_ids"].shape[1] :]


def trimmed(row: list[int], stops: list[int]) -> list[int]:
    ends = [i for i, token in enumerate(row) if token in stops]
    return row[: ends[0] + 1] if ends else row


def sampled_tokens(engine: TransformersEngine, requests: list[Request], decoding: Decoding, monkeypatch) -> dict:
    """Each key's token ids, which candidates themselves don't carry."""
    found: dict[tuple[str, str, int], list[int]] = {}

    def spy(prepared, drawn):
        keys = [key for request in prepared.batch for key in keys_of(request)]
        for key, row, length in zip(keys, drawn.tokens.tolist(), drawn.lengths.tolist(), strict=True):
            found[key] = row[:length]
        return TransformersEngine._candidates(engine, prepared, drawn)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_candidates", spy)
        list(engine.sample(requests, decoding))
    return found


@pytest.fixture(scope="module")
def wild(tiny_model: Path) -> TransformersEngine:
    """Sharpened weights: greedy text differs with every prompt and wanders, so that a small mistake shows at once."""
    engine = TransformersEngine.from_path(tiny_model)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in engine.model.model.language_model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight.copy_(torch.randn_like(weight) * 3 * weight.shape[1] ** -0.5)
    engine.stops = torch.cat([engine.stops, torch.arange(40, 47)])
    return engine


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("shared", [True, False], ids=["features", "pixels"])
def test_greedy_equals_generate(wild, requests_36, monkeypatch, batch_size, shared):
    """Token for token, over prompts and answers of many lengths, past the key/value buffer's first growth."""
    monkeypatch.setattr(wild, "_shares_features", shared)
    decoding = Decoding(0.0, 1.0, 100, 0, batch_size)
    ours = sampled_tokens(wild, requests_36, decoding, monkeypatch)
    theirs = {}
    for batch in wild.plan(requests_36, decoding):
        rows = reference(wild, batch, do_sample=False, max_new_tokens=100).tolist()
        theirs |= {
            (r.sample_id, "cot", 0): trimmed(row, wild.stops.tolist()) for r, row in zip(batch, rows, strict=True)
        }
    assert ours == theirs
    assert len({tuple(row) for row in ours.values()}) > 20
    assert len({len(row) for row in ours.values()}) > 10
    assert max(map(len, ours.values())) > GROWTH


def test_a_tokenwise_pass_over_the_output_gives_its_logprob(engine, requests_36, monkeypatch):
    """The sum of untempered log-probabilities, end token included, from one pass without cache or padding."""
    decoding = Decoding(0.7, 0.9, 40, 3, 8)
    requests = requests_36[:8]
    tokens = sampled_tokens(engine, requests, decoding, monkeypatch)
    for batch in engine.sample(requests, decoding):
        for candidate in batch:
            request = next(r for r in requests if r.sample_id == candidate.sample_id)
            image = Image.open(request.images[0])
            inputs = engine.encoder.processor(text=chat_text(engine, request), images=image, return_tensors="pt")
            new = torch.tensor([tokens[candidate.key]])
            ids = torch.cat([inputs["input_ids"], new], dim=1)
            with torch.inference_mode():
                logits = engine.model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits
            scores = logits.log_softmax(-1)[0, inputs["input_ids"].shape[1] - 1 : -1]
            assert float(scores.gather(1, new.T).sum()) == pytest.approx(candidate.logprob, abs=2e-3)
            assert candidate.tokens == new.shape[1]


@pytest.fixture(scope="module")
def unsure(tiny_model: Path) -> TransformersEngine:
    """Flattened logits: a model that knows its first word has no distribution to follow."""
    engine = TransformersEngine.from_path(tiny_model)
    with torch.no_grad():
        engine.model.model.language_model.norm.weight.mul_(0.4)
    return engine


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (1.5, 0.6)])
def test_first_tokens_follow_the_filtered_distribution(unsure, requests_36, monkeypatch, temperature, top_p):
    """4,000 first tokens against the analytic probabilities (chi-square) and against `generate` (two samples)."""
    engine, request = unsure, requests_36[5]
    many = [Request(request.sample_id, "cot", request.messages, request.images, 4000)]
    tokens = sampled_tokens(engine, many, Decoding(temperature, top_p, 1, 1, 1), monkeypatch)
    ours = Counter(row[0] for row in tokens.values())
    expected = analytic(engine, request, temperature, top_p)
    assert (expected > 0.005).sum() > 3
    assert set(ours) <= set(expected.nonzero()[0].tolist())
    assert chisquare(*binned(np.array([ours[t] for t in range(len(expected))]), expected * 4000)).pvalue > 1e-3
    torch.manual_seed(0)
    theirs = Counter(reference(engine, [request], do_sample=True, temperature=temperature, top_p=top_p, top_k=0,
                               max_new_tokens=1, num_return_sequences=4000)[:, 0].tolist())  # fmt: skip
    table = np.array([[ours[t], theirs[t]] for t in ours.keys() | theirs.keys()])
    table = np.vstack([table[table.sum(1) >= 10], table[table.sum(1) < 10].sum(0)])
    assert chi2_contingency(table[table.sum(1) > 0]).pvalue > 1e-3


def analytic(engine: TransformersEngine, request: Request, temperature: float, top_p: float) -> np.ndarray:
    image = Image.open(request.images[0])
    inputs = engine.encoder.processor(text=chat_text(engine, request), images=image, return_tensors="pt")
    with torch.inference_mode():
        logits = engine.model(**inputs).logits[0, -1].double().numpy() / temperature
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    order = np.argsort(-probabilities)
    before = probabilities[order].cumsum() - probabilities[order]
    kept = np.zeros_like(probabilities)
    kept[order[before < top_p]] = probabilities[order[before < top_p]]
    return kept / kept.sum()


def binned(observed: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cells expected below 5 are pooled; the pool is left out where it is empty."""
    rare = expected < 5
    columns = [(observed[~rare], expected[~rare]), ([observed[rare].sum()], [expected[rare].sum()])]
    observed, expected = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    return observed[expected > 0], expected[expected > 0]


def test_noise_belongs_to_the_seed_alone():
    alone, among = noise([7], 9), noise([3, 7, 5], 40)
    assert torch.equal(alone[0], among[1, :9])
    assert bool(((among >= 0) & (among < 1)).all())


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_draw_depends_on_its_own_row_alone(top_p):
    torch.manual_seed(0)
    logits, uniforms = torch.randn(64, 300) * 3, torch.rand(64)
    decoding = Decoding(0.8, top_p, 1, 0, 1)
    together, scores = draw(logits, uniforms, decoding)
    alone = [draw(logits[i : i + 1], uniforms[i : i + 1], decoding)[0].item() for i in range(64)]
    assert together.tolist() == alone
    assert scores.tolist() == pytest.approx(logits.log_softmax(-1)[range(64), together].tolist(), abs=1e-5)


def test_nucleus_with_a_flat_distribution_sorts_everything():
    """More tokens are needed than the fast path looks at."""
    probabilities = torch.full((1, 10 * LIKELY_TOKENS), 1 / (10 * LIKELY_TOKENS)).repeat(500, 1)
    tokens = nucleus(probabilities, torch.linspace(0, 1 - 2**-24, 500), 0.9)
    assert len(set(tokens.tolist())) > 5 * LIKELY_TOKENS


@pytest.mark.parametrize("top_p", [1.0, 0.5, 1e-6])
def test_the_ends_of_the_noise_draw_possible_tokens(top_p):
    logits = torch.tensor([[-200.0, 1.0, 0.0, -200.0]]).repeat(2, 1)
    tokens, _ = draw(logits, torch.tensor([0.0, 1 - 2**-24]), Decoding(1.0, top_p, 1, 0, 1))
    assert tokens[0] == 1
    assert tokens[1] == (2 if top_p == 1.0 else 1)


def test_defect_n_candidates_from_one_prefill(engine, world_images):
    """Authors' defect: batch 1 and the image encoded again for each candidate.

    12 prompts about 3 images, 8 candidates each: the vision tower sees 3 images, the decoder each prompt token once.
    """
    requests = [Request(f"s{i}", "cot", (user(prompt("cot", f"Question {i}?"), 1),), (world_images[i % 3],), 8)
                for i in range(12)]  # fmt: skip
    seen: list[int] = []
    prefills: list[torch.Size] = []

    def note(_, args, given) -> None:
        if given["inputs_embeds"].shape[1] > 1:
            prefills.append(given["inputs_embeds"].shape[:2])

    vision, language = engine.model.model.vision_tower, engine.model.model.language_model
    hooks = [
        vision.register_forward_hook(lambda _, inputs, output: seen.append(len(inputs[0]))),
        language.register_forward_pre_hook(note, with_kwargs=True),
    ]
    (sampled,) = engine.sample_batches([requests], Decoding(1.0, 1.0, 12, 0, 12))
    for hook in hooks:
        hook.remove()
    assert len(sampled.candidates) == 96
    assert seen == [3]
    assert len(prefills) == 1
    assert prefills[0][0] == 12
    assert 0 < sampled.prompt_tokens <= prefills[0].numel()
    per_image = engine.model.config.image_seq_length
    assert (sampled.image_tokens, sampled.encoded_tokens) == (12 * per_image, 3 * per_image)


def test_what_is_computed_is_counted(engine, world_images):
    """Sampling and scoring alike: evaluation reports what its engine counted."""
    request = Request("s", "direct", (user("Which thing?", 1),), (world_images[0],), 2)
    before = Counter(engine.counted)
    (sampled,) = engine.sample_batches([[request]], Decoding(1.0, 1.0, 4, 0, 8))
    drawn = engine.counted - before
    assert drawn["prompt_tokens"] == sampled.prompt_tokens
    assert drawn["new_tokens"] == sum(candidate.tokens for candidate in sampled.candidates)
    before, busy = Counter(engine.counted), engine.busy_seconds
    engine.log_likelihood([request, request], ["red dog", "cat"])
    scored = engine.counted - before
    assert scored["prompt_tokens"] == 2 * sampled.prompt_tokens
    assert scored["encoded_tokens"] == sampled.encoded_tokens == sampled.image_tokens
    assert scored["new_tokens"] == sum(len(engine.tokenizer.encode(text)) for text in ("red dog", "cat"))
    assert engine.busy_seconds > busy


def test_several_stop_tokens(engine, requests_36, monkeypatch):
    comma = engine.tokenizer.encode(",")
    monkeypatch.setattr(engine, "stops", torch.tensor(sorted({*engine.stops.tolist(), *comma})))
    candidates = [c for b in engine.sample(requests_36, Decoding(1.0, 1.0, 40, 0, 8)) for c in b]
    assert not any("," in c.text[:-1] for c in candidates)
    assert any(c.text.endswith(",") and c.finish_reason == "stop" for c in candidates)


@settings(max_examples=60, deadline=None)
@given(words=st.lists(st.integers(1, 30), max_size=40), batch_size=st.integers(1, 9))
def test_defect_partition_is_exact(engine, words, batch_size):
    """Authors' defect: splitting into chunks drops the remainder."""
    requests = [Request(f"s{i}", "text", (user("dog " * count),), (), 1) for i, count in enumerate(words)]
    decoding = Decoding(0.0, 1.0, 1, 0, batch_size)
    batches = engine.plan(requests, decoding)
    assert Counter(r for batch in batches for r in batch) == Counter(requests)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert all(batches)
    for batch in batches:
        assert list(engine.plan(batch, decoding)) == [batch]


def test_a_batch_alone_is_bit_identical(engine, requests_36):
    decoding = Decoding(0.7, 0.9, 30, 2, 7)
    requests = [Request(r.sample_id, r.kind, r.messages, r.images, 3) for r in requests_36]
    whole = list(engine.sample(requests, decoding))
    for batch, candidates in zip(engine.plan(requests, decoding), whole, strict=True):
        assert list(engine.sample(batch, decoding)) == [candidates]


def test_batches_side_by_side_are_bit_identical(tiny_model, requests_36):
    decoding = Decoding(0.7, 0.9, 30, 2, 7)
    one, two = (TransformersEngine.from_path(tiny_model, threads=threads) for threads in (1, 2))
    assert list(two.sample(requests_36, decoding)) == list(one.sample(requests_36, decoding))
    assert two.busy_seconds > 0


def test_a_batch_is_not_computed_before_its_turn_is_near(tiny_model, requests_36, monkeypatch):
    """Whoever stops reading early has paid for few batches more."""
    engine, drawn = TransformersEngine.from_path(tiny_model, threads=2), []
    draw_one = engine._draw
    monkeypatch.setattr(engine, "_draw", lambda prepared: drawn.append(1) or draw_one(prepared))
    batches = engine.sample(requests_36, Decoding(0.0, 1.0, 2, 0, 3))
    next(batches)
    batches.close()
    assert 1 <= len(drawn) <= 3
