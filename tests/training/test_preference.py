"""Preference tuning: DPO's loss with an SFT term, however the pairs are batched; the reference is computed once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_modules import CPU, Notes, load, weights

from sicog_exp.data.chat import IGNORED, ChatEncoder
from sicog_exp.data.mixture import ImageTensors
from sicog_exp.data.pairs import PairSource, collate_pairs
from sicog_exp.prompts import KINDS, Kind, prompt
from sicog_exp.recipe import ModelConfig, PreferenceConfig, RecipeError
from sicog_exp.records import Record, conversation, write_records
from sicog_exp.store import Artifact, Step, Store, Workplace, checksums
from sicog_exp.training import preference
from sicog_exp.training.fit import StageData, fit
from sicog_exp.training.modules import LOG_EVERY
from sicog_exp.training.preference import (
    CHOSEN,
    REFERENCE,
    REJECTED,
    PairBatches,
    PreferenceTask,
    PreferenceTuning,
    _reference_seconds,
    prefer,
    preference_losses,
    read_pairs,
    reference_differences,
)

SAID = (
    ("a red dog top-left, a cat.", "a blue hat"), ("yes", "no it is not"), ("two tools and a green hat", "one tool"),
    ("blue", "red, I think"), ("a fox below a tree, a boat, a red hat", "a fox"), ("no", "yes"),
)  # fmt: skip
"""Chosen and rejected."""


class Plain(PreferenceTuning):
    """Plain gradient descent: the change of the weights is the gradient."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameter_groups())
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)]


def config(**changes: Any) -> PreferenceConfig:
    values: dict[str, Any] = {"steps": 1, "batch_size": 6, "micro_batch_size": 6, "clip_norm": 1e9, "max_length": 512,
                              "vision_lr": 1e-3, "projector_lr": 1e-3, "language_lr": 1e-3}  # fmt: skip
    return PreferenceConfig(**{**values, **changes})


def records() -> list[tuple[Record, Record]]:
    """Pairs about pictures of different lengths; the last one has no picture."""
    pairs = []
    for i, said in enumerate(SAID):
        kind: Kind = "dd" if i % 2 == 0 else "direct"
        images = () if i == len(SAID) - 1 else (f"{i}.png",)
        one, other = (Record(f"p{i}", conversation(prompt(kind, "Is it?"), text, images), images, kind, "preference")
                      for text in said)  # fmt: skip
        pairs.append((one, other))
    return pairs


def source(encoder: ChatEncoder, images: list[Path], max_length: int = 512) -> PairSource:
    return PairSource(records(), ImageTensors(images[0].parent, encoder, 50_000_000), encoder, max_length)


def batch_of(encoder: ChatEncoder, images: list[Path], reference: list[float], **options: Any) -> dict[str, Any]:
    pairs = source(encoder, images)
    made = collate_pairs([pairs.pair(i) for i in range(len(SAID))], encoder.tokenizer.pad_token_id, **options)
    return made | {"reference": reference}


def plain_log_probability(model: Any, encoder: ChatEncoder, record: Record, folder: Path) -> tuple[float, int]:
    """A response's summed log-probability and tokens, by the model's own logits, one row at a time."""
    pixels = ImageTensors(folder, encoder, 50_000_000).of(record.images)
    example = encoder.example(record.messages, pixels, 512)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example.input_ids]), **(pixels or {})).logits[0].double()
    chances = logits.log_softmax(-1)
    terms = [float(chances[i - 1, label]) for i, label in enumerate(example.labels) if label != IGNORED]
    return math.fsum(terms), len(terms)


# The loss.


def test_the_loss_of_hand_computed_numbers() -> None:
    """chosen -2, rejected -3, reference 0.5: margin 0.1 * (1 - 0.5) = 0.05, loss log(1 + e^-0.05) = 0.668460."""
    losses, margins = preference_losses(*(torch.tensor([x, y]) for x, y in ((-2, -4.0), (-3, -1.0), (0.5, -1.0))), 0.1)
    assert margins.tolist() == pytest.approx([0.05, -0.2])
    assert losses.tolist() == pytest.approx([0.668460, 0.798139], abs=1e-6)


@pytest.mark.parametrize(("beta", "sft_weight"), [(0.1, 1.0), (0.5, 0.0), (0.2, 0.3)])
def test_the_loss_equals_a_plain_implementation(beta: float, sft_weight: float, tiny_model: Path,
                                                world_images: list[Path]) -> None:  # fmt: skip
    model, encoder = load(tiny_model)
    reference = [0.5, -1.0, 2.0, 0.0, -0.25, 1.5]
    module = PreferenceTuning(model, config(beta=beta, sft_weight=sft_weight))
    found, count = module.batch_loss(batch_of(encoder, world_images, reference))
    expected = 0.0
    for (chosen, rejected), apart in zip(records(), reference, strict=True):
        one, tokens = plain_log_probability(model, encoder, chosen, world_images[0].parent)
        other, _ = plain_log_probability(model, encoder, rejected, world_images[0].parent)
        expected += math.log1p(math.exp(-beta * (one - other - apart))) + sft_weight * -one / tokens
    assert count == len(SAID)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_only_positions_before_a_response_token_get_a_gradient(tiny_model: Path, world_images: list[Path]) -> None:
    """Of chosen and rejected responses alike; neither prompt nor image tokens nor padding."""
    model, encoder = load(tiny_model)
    hidden: list[torch.Tensor] = []

    def keep(inner: torch.nn.Module, arguments: Any, output: Any) -> None:
        output.last_hidden_state.retain_grad()
        hidden.append(output.last_hidden_state)

    model.model.register_forward_hook(keep)
    batch = batch_of(encoder, world_images, [0.0] * len(SAID))
    PreferenceTuning(model, config()).batch_loss(batch)[0].backward()
    assert hidden[0].grad is not None
    wanted = torch.zeros(batch["labels"].shape, dtype=torch.bool)
    wanted[:, :-1] = batch["labels"][:, 1:] != IGNORED
    assert torch.equal(hidden[0].grad.abs().sum(-1) > 0, wanted)
    texts = [encoder.tokenizer.decode(ids[labels != IGNORED])
             for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)]  # fmt: skip
    for pair, (chosen, rejected) in enumerate(SAID):
        assert texts[batch["chosen"][pair]] == f"{chosen}<|end|>"
        assert texts[batch["rejected"][pair]] == f"{rejected}<|end|>"


def moved(kind: type[PreferenceTuning], folder: Path, images: list[Path], scratch: Path, settings: PreferenceConfig,
          machine: ModelConfig = CPU, logger: Any = None) -> PreferenceTuning:  # fmt: skip
    """The module after its steps, by its own reference."""
    model, encoder = load(folder)
    scratch.mkdir()
    workplace, module = Workplace(scratch, scratch), kind(model, settings)
    batches = PairBatches(source(encoder, images), settings, encoder.tokenizer.pad_token_id, 0)
    batches.reference = reference_differences(module, batches, len(SAID), machine, workplace)
    fit(module, StageData(batches), machine, workplace, 0, logger)
    return module


@pytest.mark.parametrize("changes", [{"micro_batch_size": 1}, {"micro_batch_size": 2}, {"packing": True},
                                     {"packing": True, "max_length": 90, "micro_batch_size": 3}])  # fmt: skip
def test_a_step_does_not_depend_on_the_batch_split_or_packing(changes: dict[str, Any], tiny_model: Path,
                                                              world_images: list[Path], tmp_path: Path) -> None:
    whole = moved(Plain, tiny_model, world_images, tmp_path / "whole", config())
    split = moved(Plain, tiny_model, world_images, tmp_path / "split", config(**changes))
    before = weights(load(tiny_model)[0])
    assert max(float((value - before[name]).abs().max()) for name, value in weights(whole.model).items()) > 1e-5
    for name, value in weights(split.model).items():
        torch.testing.assert_close(value, weights(whole.model)[name], rtol=1e-4, atol=5e-7)


def test_cores_do_not_change_the_bits(tiny_model: Path, world_images: list[Path], tmp_path: Path) -> None:
    settings = config(steps=3, micro_batch_size=2)
    one = moved(PreferenceTuning, tiny_model, world_images, tmp_path / "1", settings)
    two = moved(PreferenceTuning, tiny_model, world_images, tmp_path / "2", settings,
                ModelConfig(device="cpu", threads=2))  # fmt: skip
    assert two.threads
    first, second = ([json.loads(line)["differences"] for line in (tmp_path / name / REFERENCE).open()]
                     for name in ("1", "2"))  # fmt: skip
    assert first == second
    for name, value in weights(two.model).items():
        assert torch.equal(value, weights(one.model)[name]), name


def test_tuning_prefers_the_chosen_response(tiny_model: Path, world_images: list[Path], tmp_path: Path) -> None:
    """Margins begin at 0, where the model is its own reference, and grow; a larger beta holds it closer."""
    notes = Notes()
    settings = config(steps=2 * LOG_EVERY, sft_weight=0.0, clip_norm=1.0)
    module = moved(PreferenceTuning, tiny_model, world_images, tmp_path / "a", settings, logger=notes)
    losses = notes.of("dpo_loss")
    assert list(losses) == [LOG_EVERY, 2 * LOG_EVERY]
    assert losses[2 * LOG_EVERY] < losses[LOG_EVERY] < math.log(2)
    assert notes.of("preferred")[2 * LOG_EVERY] == 1.0
    assert notes.of("margin")[2 * LOG_EVERY] > 0
    assert module.beta == 0.1


def test_the_sft_term_raises_the_chosen_responses(tiny_model: Path, world_images: list[Path], tmp_path: Path) -> None:
    likely = {}
    for weight in (0.0, 5.0):
        settings = config(steps=10, clip_norm=1.0, sft_weight=weight)
        module = moved(PreferenceTuning, tiny_model, world_images, tmp_path / str(weight), settings)
        batch = batch_of(load(tiny_model)[1], world_images, [0.0] * len(SAID))
        with torch.no_grad():
            likely[weight] = float(module.log_probabilities(batch)[0][batch["chosen"]].mean())
    assert likely[5.0] > likely[0.0] + 1


# The reference.


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_an_untuned_model_is_its_own_reference(precision: Any, tiny_model: Path, world_images: list[Path],
                                               tmp_path: Path) -> None:  # fmt: skip
    """In every precision of training: margins stay 0 while nothing is learned."""
    notes, machine = Notes(), ModelConfig(device="cpu", threads=1, precision=precision)
    settings = config(steps=LOG_EVERY, vision_lr=0.0, projector_lr=0.0, language_lr=1e-15)
    moved(PreferenceTuning, tiny_model, world_images, tmp_path / "a", settings, machine, notes)
    assert notes.of("margin")[LOG_EVERY] == pytest.approx(0, abs=1e-6)
    assert notes.of("dpo_loss")[LOG_EVERY] == pytest.approx(math.log(2), abs=1e-6)


def test_a_torn_reference_pass_computes_what_is_missing_alone(tiny_model: Path, world_images: list[Path],
                                                              tmp_path: Path) -> None:  # fmt: skip
    model, encoder = load(tiny_model)
    settings = config(micro_batch_size=2)
    module = PreferenceTuning(model, settings)
    batches = PairBatches(source(encoder, world_images), settings, encoder.tokenizer.pad_token_id, 0)
    workplace = Workplace(tmp_path, tmp_path)
    whole = reference_differences(module, batches, len(SAID), CPU, workplace)
    chosen, rejected = records()[2]
    one, _ = plain_log_probability(model, encoder, chosen, world_images[0].parent)
    other, _ = plain_log_probability(model, encoder, rejected, world_images[0].parent)
    assert whole[2] == pytest.approx(one - other, rel=1e-5)

    lines = (tmp_path / REFERENCE).read_text().splitlines(keepends=True)
    assert len(lines) == 3
    (tmp_path / REFERENCE).write_text(lines[0] + lines[1][: len(lines[1]) // 2])
    computed = []
    plain_batch = batches.batch
    batches.batch = lambda pairs: computed.append(list(pairs)) or plain_batch(pairs)  # type: ignore[method-assign]
    assert reference_differences(module, batches, len(SAID), CPU, workplace) == whole
    assert len(computed) == 2
    assert reference_differences(module, batches, len(SAID), CPU, workplace) == whole
    assert len(computed) == 2
    rows = list(map(json.loads, (tmp_path / REFERENCE).read_text().splitlines()))
    assert rows[0] == json.loads(lines[0])
    assert [row["differences"] for row in rows] == [json.loads(line)["differences"] for line in lines]
    assert _reference_seconds(workplace) == sum(row["seconds"] for row in rows) > 0


# The stage as a step.


@pytest.fixture(scope="module")
def inputs(tiny_model: Path, world_images: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("pairs")
    write_records(folder / CHOSEN, [chosen for chosen, _ in records()])
    write_records(folder / REJECTED, [rejected for _, rejected in records()])
    paths = {"model": tiny_model, "data": world_images[0].parent, "pairs": folder}
    return {name: Artifact(path, {"fingerprint": name}, True) for name, path in paths.items()}


def step(inputs: dict[str, Artifact], kinds: tuple[Kind, ...] = KINDS) -> Step:
    settings = config(steps=9, batch_size=4, micro_batch_size=2, checkpoint_every=2, clip_norm=1.0)
    return Step("preference", prefer, PreferenceTask(settings, CPU, 3, kinds), inputs, 3)


def test_an_interrupted_stage_ends_with_the_bits_and_facts_of_an_undisturbed_one(
    inputs: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preference, "_reference_seconds", lambda place: 1000.0)
    whole = Store(tmp_path / "whole").run(step(inputs))
    assert whole.facts["model_seconds"] > 1000, "the pass over the reference is the model's time"

    def stop(at: int) -> Any:
        def progress(done: int, total: int) -> None:
            if done == at:
                raise OSError("stopped here")

        return progress

    for at in (1, 5, 8):  # before the first checkpoint, then between two
        with pytest.raises(OSError, match="stopped here"):
            Store(tmp_path / "stopped").run(step(inputs), stop(at))
    continued = Store(tmp_path / "stopped").run(step(inputs))
    assert checksums(continued.path) == checksums(whole.path)
    for name in ("pairs", "samples", "tokens", "image_tokens", "steps", "flops"):
        assert continued.facts[name] == whole.facts[name], name
    assert (whole.facts["pairs"], whole.facts["samples"]) == (6, 2 * 4 * 9)


def test_kinds_choose_among_the_pairs(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    assert [chosen.id for chosen, _ in read_pairs(inputs["pairs"].path, ("cod", "dd"), tmp_path)] == ["p0", "p2", "p4"]
    with pytest.raises(RecipeError, match=r"preference\.rejected=low_score: no pair of kind cot: .*preference\.images"):
        Store(tmp_path).run(step(inputs, ("cot",)))


def test_a_pair_that_does_not_fit_is_set_aside_and_named(tiny_model: Path, world_images: list[Path]) -> None:
    _, encoder = load(tiny_model)
    whole = source(encoder, world_images)
    shortest = min(len(example) for i in range(6) for example in whole.examples(i))
    assert (whole.rows, whole.too_long) == (6, [])
    assert source(encoder, world_images, max_length=5).rows == 0
    cut = source(encoder, world_images, max_length=shortest)
    assert cut.rows == 6 - len(cut.too_long) < 6
