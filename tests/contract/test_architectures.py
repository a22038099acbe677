"""What every architecture promises: one class of tests over models of random weights with their real processors.

`SICOG_WRITE_GOLDEN=1 pytest tests/contract/test_architectures.py -k golden` writes tests/golden/<family>.json anew.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captured import Replayed, emulate
from families import Family, build
from PIL import Image
from torch.utils.data import IterableDataset

from sicog_exp.data.chat import IGNORED, ChatEncoder, ChatError, to_chat
from sicog_exp.data.mixture import Row, collate, fill_bins, pack
from sicog_exp.generation.engine import Decoding, Request
from sicog_exp.generation.fixed import fixed_problem
from sicog_exp.generation.requests import keys_of
from sicog_exp.generation.transformers_engine import TransformersEngine
from sicog_exp.models.adapters import linear_layers, merge_adapters
from sicog_exp.models.loading import (
    PARTS,
    ModelError,
    ModelSource,
    load_model,
    load_processor,
    part_parameters,
    save_model,
)
from sicog_exp.models.miniatures import FAMILIES
from sicog_exp.recipe import ModelConfig, StageConfig
from sicog_exp.records import Message, user
from sicog_exp.store import Workplace
from sicog_exp.training.fit import StageData, fit
from sicog_exp.training.modules import SupervisedFineTuning

GOLDEN = Path(__file__).parent.parent / "golden"
SIZES = ((40, 56), (72, 40), (30, 90), (24, 24))
"""Height and width of the test's pictures: tall and wide ones, more and less tiles."""
MODELS = ModelConfig(device="cpu", threads=1)
INSIDE_THE_PROJECTOR = {
    "llava_next": "image_newline", "llava_onevision": "image_newline", "qwen2_vl": "visual.merger",
    "qwen2_5_vl": "visual.merger", "qwen3_vl": "visual.deepstack_merger_list",
}  # fmt: skip

NO_PACKING = {"qwen2_vl": "M-RoPE", "qwen2_5_vl": "M-RoPE", "qwen3_vl": "M-RoPE", "gemma3": "both ways inside an image"}

NO_STATIC_CACHE = {"gemma3": "do not attend to all that came before"}

ONE_SIZE = ("llava", "gemma3")
FEWER_PIXELS = 1600


@dataclass(frozen=True)
class Talk:
    """A conversation about pictures, by their number."""

    messages: tuple[Message, ...]
    pictures: tuple[int, ...] = ()


TALKS = (
    Talk((user("Is there a red dog?", 1), Message("assistant", "yes")), (0,)),
    Talk((user("What color is the cat?", 1), Message("assistant", "blue"), user("And here?", 1),
          Message("assistant", "a red dog, left of a blue cat")), (1, 2)),
    Talk((user("How many tools are there?"), Message("assistant", "2"))),
    Talk((user("Is there a cat?", 1), Message("assistant", "no")), (3,)),
    Talk((user("Is there a dog here or here?", 2), Message("assistant", "green")), (2, 0)),
)  # fmt: skip


@dataclass
class Subject:
    """A family's saved model, opened once."""

    family: Family
    pictures: list[Path]

    @cached_property
    def opened(self) -> tuple[Any, Any]:
        return load_model(ModelSource(str(self.family.folder)))

    @property
    def model(self) -> Any:
        return self.opened[0]

    @cached_property
    def encoder(self) -> ChatEncoder:
        return ChatEncoder(self.opened[1])

    @cached_property
    def engine(self) -> TransformersEngine:
        return TransformersEngine(self.model, self.opened[1])

    def images(self, numbers: Sequence[int]) -> list[Image.Image]:
        return [Image.open(self.pictures[number]).convert("RGB") for number in numbers]

    def pixels(self, talk: Talk) -> Any:
        return self.encoder.pixels(self.images(talk.pictures)) if talk.pictures else None

    def row(self, talk: Talk, max_length: int = 4096) -> Row:
        inputs = self.pixels(talk)
        return Row(self.encoder.example(talk.messages, inputs, max_length), inputs, "test")

    def processed(self, messages: Sequence[Message], pictures: Sequence[int]) -> Any:
        """What the processor itself makes of a prompt."""
        text = self.opened[1].apply_chat_template(to_chat(messages), add_generation_prompt=True, tokenize=False)
        given = {"images": [self.images(pictures)]} if pictures else {}
        return self.opened[1](text=[text], add_special_tokens=False, return_tensors="pt", **given)

    def request(self, sample: str, words: str, pictures: tuple[int, ...], count: int = 1) -> Request:
        paths = tuple(self.pictures[number] for number in pictures)
        return Request(sample, "direct", (user(words, len(pictures)),), paths, count)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(3)
    paths = [folder / f"{i}.png" for i in range(len(SIZES))]
    for path, (height, width) in zip(paths, SIZES, strict=True):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture(scope="module", params=list(FAMILIES))
def subject(request: pytest.FixtureRequest, pictures: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Subject:
    if request.param == "smolvlm":
        pytest.importorskip("num2words", reason="SmolVLM's processor needs num2words, which pyproject.toml names")
    torch.set_num_threads(1)
    return Subject(build(request.param, tmp_path_factory.mktemp(request.param) / "model"), pictures)


class Same(IterableDataset):
    """One optimizer step's micro-batches, again and again."""

    def __init__(self, micro_batches: list[Any]) -> None:
        self.first_step, self._micro_batches = 0, micro_batches

    def __iter__(self) -> Iterator[list[Any]]:
        return repeat(self._micro_batches)


def loss(module: SupervisedFineTuning, batch: Any) -> float:
    with torch.no_grad():
        summed, count = module.batch_loss(batch)
    return float(summed) / count


class TestArchitecture:
    def test_parts_hold_every_parameter_once(self, subject: Subject) -> None:
        parts = part_parameters(subject.model)
        assert list(parts) == list(PARTS)
        every = [id(parameter) for group in parts.values() for parameter in group]
        assert len(set(every)) == len(every)
        assert set(every) == {id(parameter) for parameter in subject.model.parameters()}
        projector = {id(parameter) for parameter in parts["projector"]}
        names = [name for name, parameter in subject.model.named_parameters() if id(parameter) in projector]
        assert any(INSIDE_THE_PROJECTOR.get(subject.family.name, "") in name for name in names)

    @pytest.mark.parametrize("numbers", [(0,), (1,), (2, 3), ()], ids=str)
    def test_prompt_tokens_are_the_processor_s_own(self, subject: Subject, numbers: tuple[int, ...]) -> None:
        talk = Talk((user("What color is the cat?", len(numbers)),), numbers)
        theirs = subject.processed(talk.messages, numbers)
        inputs = subject.pixels(talk)
        assert subject.encoder.prompt(talk.messages, inputs) == theirs["input_ids"][0].tolist()
        assert set(inputs or ()) == set(theirs) - {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
        assert all(torch.equal(inputs[name], theirs[name]) for name in inputs or ())

    def test_the_label_mask_is_the_golden_one(self, subject: Subject) -> None:
        made = [shown(subject, subject.row(talk)) for talk in TALKS]
        file = GOLDEN / f"{subject.family.name}.json"
        if os.environ.get("SICOG_WRITE_GOLDEN"):
            rows = (" [\n" + ",\n".join(f"  {json.dumps(row)}" for row in talk) + "\n ]" for talk in made)
            file.write_text("[\n" + ",\n".join(rows) + "\n]\n")
        assert made == json.loads(file.read_text())

    def test_image_tokens_are_never_cut(self, subject: Subject) -> None:
        """The second picture comes after an answer: whatever the limit, all of its tokens, or an error."""
        talk = TALKS[1]
        whole = subject.row(talk).example
        image = subject.model.config.image_token_id
        last = max(i for i, token in enumerate(whole.input_ids) if token == image)
        for length in range(last - 3, last + 1):
            with pytest.raises(ChatError, match=str(length)):
                subject.row(talk, length)
        for length in range(last + 3, len(whole)):  # markers of an image's end may follow its tokens
            assert subject.row(talk, length).example.input_ids.count(image) == whole.input_ids.count(image)

    def test_a_batch_has_each_row_s_own_losses(self, subject: Subject) -> None:
        """Rows with one picture, two and none, of different sizes: padding and neighbours change nothing."""
        module = SupervisedFineTuning(subject.model, StageConfig())
        rows = [subject.row(talk) for talk in TALKS]
        with torch.no_grad():
            together, samples = module.token_losses(collate(rows, 0))
            for number, row in enumerate(rows):
                alone, _ = module.token_losses(collate([row], 0))
                torch.testing.assert_close(together[samples == number], alone, atol=2e-4, rtol=1e-4)

    def test_packed_rows_lose_what_they_lose_alone(self, subject: Subject) -> None:
        """Loss and gradients; where packing would be wrong, it is refused."""
        refusal = NO_PACKING.get(subject.family.name)
        if refusal:
            with pytest.raises(ValueError, match=refusal):
                SupervisedFineTuning(subject.model, StageConfig(packing=True))
            return
        module = SupervisedFineTuning(subject.model, StageConfig(packing=True))
        rows = [subject.row(talk) for talk in TALKS]
        lengths = [len(row.example) for row in rows]
        one, several = fill_bins(rows, sum(lengths)), fill_bins(rows, max(lengths) + min(lengths))
        assert len(one) == 1 < len(several) < len(rows)
        padded, gradients = self.learned(module, collate(rows, 0))
        for bins in (one, several):
            packed, same = self.learned(module, pack(bins, 0))
            torch.testing.assert_close(packed, padded, atol=1e-3, rtol=1e-5)
            torch.testing.assert_close(same, gradients, atol=1e-2, rtol=1e-3)

    @staticmethod
    def learned(module: SupervisedFineTuning, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch's loss and all its gradients."""
        module.zero_grad()
        summed, _ = module.batch_loss(batch)
        summed.backward()
        gradients = torch.cat([p.grad.flatten() for p in module.trained_parameters if p.grad is not None])
        module.zero_grad()
        return summed.detach(), gradients

    def test_training_lowers_the_loss(self, subject: Subject, tmp_path: Path) -> None:
        model, _ = load_model(ModelSource(str(subject.family.folder)))
        batch = collate([subject.row(talk) for talk in TALKS], 0)
        stage = StageConfig(steps=6, batch_size=5, micro_batch_size=5, vision_lr=3e-3, projector_lr=3e-3,
                            language_lr=3e-3)  # fmt: skip
        module = train(model, stage, [batch], tmp_path)
        assert loss(module, batch) < 0.7 * loss(SupervisedFineTuning(subject.model, stage), batch)

    @pytest.mark.parametrize("part", list(PARTS))
    def test_a_part_trains_alone(self, subject: Subject, part: str, tmp_path: Path) -> None:
        model, _ = load_model(ModelSource(str(subject.family.folder)))
        rates = {f"{name}_lr": 1e-3 * (name == part) for name in PARTS}
        train(model, StageConfig(steps=1, batch_size=1, micro_batch_size=1, **rates),
              [collate([subject.row(TALKS[0])], 0)], tmp_path)  # fmt: skip
        before = part_parameters(subject.model)
        changed = {name: [not torch.equal(*pair) for pair in zip(before[name], after, strict=True)]
                   for name, after in part_parameters(model).items()}  # fmt: skip
        assert any(changed[part])
        assert not any(flag for name, flags in changed.items() if name != part for flag in flags)

    def test_adapters_train_and_are_merged_away(self, subject: Subject, tmp_path: Path) -> None:
        """LoRA beside the language model: the saved model has its old names and shapes, and says what the trained one
        said."""
        from transformers import AutoModelForImageTextToText

        model, processor = load_model(ModelSource(str(subject.family.folder)))
        names = [(name, weight.shape) for name, weight in model.state_dict().items()]
        batch = collate([subject.row(talk) for talk in TALKS], 0)
        stage = StageConfig(steps=4, batch_size=5, micro_batch_size=5, vision_lr=0.0, projector_lr=0.0,
                            language_lr=2e-2, lora_rank=4)  # fmt: skip
        module = train(model, stage, [batch], tmp_path)
        trained = loss(module, batch)
        assert trained < 0.9 * loss(SupervisedFineTuning(subject.model, StageConfig()), batch)
        merge_adapters(model)
        save_model(model, processor, tmp_path / "saved")
        again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
        assert [(name, weight.shape) for name, weight in again.state_dict().items()] == names
        assert loss(SupervisedFineTuning(again, StageConfig()), batch) == pytest.approx(trained, rel=1e-4)
        before, after = dict(subject.model.named_parameters()), dict(again.named_parameters())
        changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
        assert changed == {f"{name}.weight" for name in linear_layers(subject.model, ("language",))}

    def test_checkpointed_gradients_are_the_same(self, subject: Subject) -> None:
        batch = collate([subject.row(talk) for talk in TALKS], 0)
        found = []
        for checkpointing in (False, True):
            model, _ = load_model(ModelSource(str(subject.family.folder)))
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            module = SupervisedFineTuning(model, StageConfig()).train()
            module.batch_loss(batch)[0].backward()
            found.append([p.grad for p in module.trained_parameters if p.grad is not None])
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))

    def test_eager_attention_gives_the_same_losses(self, subject: Subject) -> None:
        model, _ = load_model(ModelSource(str(subject.family.folder), attention="eager"))
        assert model.config._attn_implementation == "eager"
        batch = collate([subject.row(talk) for talk in TALKS], 0)
        losses = [loss(SupervisedFineTuning(one, StageConfig()), batch) for one in (model, subject.model)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)

    def test_fewer_pixels_give_fewer_image_tokens(self, subject: Subject, tmp_path: Path) -> None:
        """The cap is saved with the model, and the processor's tokens still are as many as the model fills."""
        source = ModelSource(str(subject.family.folder), image_pixels=FEWER_PIXELS)
        if subject.family.name in ONE_SIZE:
            load_model(source)  # its size is below the cap
            with pytest.raises(ModelError, match="shows every image at one size, 784 pixels"):
                load_model(ModelSource(str(subject.family.folder), image_pixels=783))
            return
        with pytest.raises(ModelError, match=r"model\.image_pixels=9: the least .* is \d+ pixels"):
            load_model(ModelSource(str(subject.family.folder), image_pixels=9))
        save_model(*load_model(source), tmp_path)
        capped = Subject(Family(subject.family.name, tmp_path), subject.pictures)
        counts = []
        for each in (subject, capped):
            row = each.row(TALKS[0])
            counts.append(row.example.input_ids.count(each.model.config.image_token_id))
            loss(SupervisedFineTuning(each.model, StageConfig()), collate([row], 0))
        assert counts[1] < counts[0]
        uncapped = ModelSource(str(subject.family.folder), image_pixels=10**9)
        tall = Subject(Family(subject.family.name, subject.family.folder), subject.pictures)
        tall.opened = load_model(uncapped)
        assert tall.row(TALKS[0]).example == subject.row(TALKS[0]).example

    def test_a_processor_alone_shows_as_many_pixels_as_with_its_model(self, subject: Subject) -> None:
        """As a plan reads it, without weights."""
        if subject.family.name in ONE_SIZE:
            with pytest.raises(ModelError, match="shows every image at one size"):
                load_processor(ModelSource(str(subject.family.folder), image_pixels=100))
            return
        source = ModelSource(str(subject.family.folder), image_pixels=FEWER_PIXELS)
        picture = Image.new("RGB", (300, 200))
        made = (load_processor(source), load_model(source)[1], load_processor(ModelSource(source.path)))
        alone, whole, uncapped = (ChatEncoder(processor).image_length(picture) for processor in made)
        assert alone == whole < uncapped

    @pytest.mark.parametrize("batch_size", [1, 8])
    @pytest.mark.parametrize("shared", [True, False], ids=["features", "pixels"])
    def test_greedy_equals_generate(self, subject: Subject, batch_size: int, shared: bool,
                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
        """Token for token: pictures of all sizes, one shared by two prompts, two in one prompt, none."""
        engine = subject.engine
        if not shared:
            monkeypatch.setattr(engine, "_shares_features", False)
        asked = {"a": ("Is there a dog?", (0,)), "b": ("What color is the cat?", (0,)), "c": ("How many?", (1,)),
                 "d": ("Describe the image in detail, step by step.", (2, 3)), "e": ("Be brief.", ()),
                 "f": ("Is there a red dog? Is there?", (2,))}  # fmt: skip
        requests = [subject.request(name, *talk, count=1 + (name == "c")) for name, talk in asked.items()]
        ours = tokens(engine, requests, Decoding(0.0, 1.0, 12, 0, batch_size), monkeypatch)
        theirs = {name: generated(subject, words, numbers) for name, (words, numbers) in asked.items()}
        assert ours == {**{(name, 0): row for name, row in theirs.items()}, ("c", 1): theirs["c"]}
        assert len({tuple(row) for row in theirs.values()}) > 3

    @pytest.mark.parametrize("captured", [False, True], ids=["computed", "captured"])
    def test_buffers_of_fixed_size_say_the_same(self, subject: Subject, captured: bool,
                                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
        """Prompts of several lengths and of 0 to 2 pictures, some with several candidates; a model that cannot says why
        and decodes as usual. `captured`: in steps that are recorded once and replayed, which wait for nothing."""
        asked = [("Is there a dog?", (0,), 2), ("Be brief.", (), 1), ("Describe the image in detail.", (2, 3), 3)]
        requests = [subject.request(str(i), *talk) for i, talk in enumerate(asked)]
        problem = fixed_problem(subject.model)
        assert (problem is not None) == (subject.family.name in NO_STATIC_CACHE), problem
        warned = pytest.warns(UserWarning, match=NO_STATIC_CACHE[subject.family.name]) if problem else nullcontext()
        with warned:
            engine = TransformersEngine(subject.model, subject.opened[1], static_cache=True)
        for decoding in (Decoding(0.0, 1.0, 12, 0, 8), Decoding(1.0, 0.9, 12, 0, 2)):
            wanted = tokens(subject.engine, requests, decoding, monkeypatch)
            with monkeypatch.context() as patch, warnings.catch_warnings():
                if captured:
                    emulate(patch)
                    warnings.filterwarnings("error", message=".*cannot be captured")
                assert tokens(engine, requests, decoding, monkeypatch) == wanted
                assert (Replayed.made > 0) == (captured and not problem)
            assert len(wanted) == 6

    def test_the_harness_scores_what_the_model_says(self, subject: Subject) -> None:
        """lmms-eval's two kinds of request, answered through the engine in a batch, against the model alone."""
        from sicog_exp.evaluation.lmms_model import EngineModel

        asked = [("Is there a dog?", (0,), "yes"), ("What color is the cat?", (1,), "blue green"), ("How?", (2,), "no")]
        harness = EngineModel(subject.engine, 4, 8)
        harness.task_dict = {"task": {"test": [{"number": i} for i in range(len(asked))]}}
        plain = [instance(i, (words, {}), subject, numbers) for i, (words, numbers, _) in enumerate(asked)]
        texts = [subject.encoder.tokenizer.decode(generated(subject, words, numbers, 8), skip_special_tokens=True)
                 for words, numbers, _ in asked]  # fmt: skip
        assert harness.generate_until(plain) == [text.strip() for text in texts]
        choices = [instance(i, (words, answer), subject, numbers) for i, (words, numbers, answer) in enumerate(asked)]
        for result, (words, numbers, answer) in zip(harness.loglikelihood(choices), asked, strict=True):
            assert result.text[0] == pytest.approx(mean_loss(subject, words, numbers, answer), abs=1e-3)

    def test_saved_it_is_the_same_model(self, subject: Subject, tmp_path: Path) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        save_model(subject.model, subject.encoder.processor, tmp_path)
        again = Subject(Family(subject.family.name, tmp_path), subject.pictures)
        again.opened = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
        ours, theirs = (each.processed(TALKS[0].messages[:1], (1,)) for each in (subject, again))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        with torch.no_grad():
            assert torch.equal(subject.model(**ours).logits, again.model.eval()(**theirs).logits)


def shown(subject: Subject, row: Row) -> list[list[Any]]:
    """[token text, trained?] of every position; a run of one token is one row."""
    found: list[list[Any]] = []
    for token, label in zip(row.example.input_ids, row.example.labels, strict=True):
        assert label in (token, IGNORED)
        text, trained = subject.encoder.tokenizer.decode([token]), label != IGNORED
        if found and found[-1][:2] == [text, trained]:
            found[-1][2] += 1
        else:
            found.append([text, trained, 1])
    return found


def train(model: Any, stage: StageConfig, micro_batches: list[Any], folder: Path) -> SupervisedFineTuning:
    module = SupervisedFineTuning(model, stage)
    fit(module, StageData(Same(micro_batches)), MODELS, Workplace(folder, folder), seed=0)
    return module


def tokens(engine: TransformersEngine, requests: list[Request], decoding: Decoding,
           monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], list[int]]:  # fmt: skip
    """Each candidate's token ids, which candidates themselves don't carry."""
    found: dict[tuple[str, int], list[int]] = {}
    plain = engine._candidates

    def spy(prepared: Any, drawn: Any) -> Any:
        keys = [key for request in prepared.batch for key in keys_of(request)]
        for (sample, _, index), row, length in zip(keys, drawn.tokens.tolist(), drawn.lengths.tolist(), strict=True):
            found[sample, index] = row[:length]
        return plain(prepared, drawn)

    monkeypatch.setattr(engine, "_candidates", spy)
    list(engine.sample(requests, decoding))
    return found


def generated(subject: Subject, words: str, numbers: tuple[int, ...], count: int = 12) -> list[int]:
    """New tokens that transformers' own `generate` makes of one prompt."""
    inputs = subject.processed((user(words, len(numbers)),), numbers)
    row = subject.model.generate(**inputs, do_sample=False, max_new_tokens=count)[0, inputs["input_ids"].shape[1] :]
    return row.tolist()


def mean_loss(subject: Subject, words: str, numbers: tuple[int, ...], answer: str) -> float:
    """Mean negative log-likelihood of an answer, by the model's own forward pass over prompt and answer."""
    inputs = dict(subject.processed((user(words, len(numbers)),), numbers))
    target = torch.tensor([subject.encoder.tokenizer.encode(answer, add_special_tokens=False)])
    for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            more = {"input_ids": target, "attention_mask": torch.ones_like(target)}.get(name, torch.zeros_like(target))
            inputs[name] = torch.cat([inputs[name], more], dim=1)
    with torch.no_grad():
        logits = subject.model(**inputs).logits[0, -target.shape[1] - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits, target[0]))


def instance(number: int, words: tuple[Any, ...], subject: Subject, numbers: tuple[int, ...]) -> Any:
    from lmms_eval.api.instance import Instance

    kind = "loglikelihood" if isinstance(words[1], str) else "generate_until"
    metadata = {"task": "task", "doc_id": number, "repeats": 1, "split": "test"}
    visuals = [str(subject.pictures[i]) for i in numbers]
    arguments = (*words, lambda doc: visuals, number, "task", "test")
    return Instance(request_type=kind, arguments=arguments, idx=0, metadata=metadata)
