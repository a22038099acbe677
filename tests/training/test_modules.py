"""What one optimizer step does: the loss is the response's alone, and no matter how its batch is split or padded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import Logger

from sicog_exp.data.chat import IGNORED, ChatEncoder
from sicog_exp.data.mixture import ImageTensors, Mixture, RecordSource, Rejected, collate, fill_bins, pack
from sicog_exp.models.loading import PARTS, ModelSource, load_model, part_parameters
from sicog_exp.prompts import prompt
from sicog_exp.recipe import ModelConfig, StageConfig
from sicog_exp.records import Record, conversation
from sicog_exp.store import Workplace
from sicog_exp.training.fit import StageData, StepBatches, fit
from sicog_exp.training.modules import (
    LOG_EVERY,
    MultimodalPretraining,
    SupervisedFineTuning,
    learning_rate_factor,
)
from sicog_exp.training.vision import SceneCells, VisionPretraining

CPU = ModelConfig(device="cpu", threads=1)
CAPTIONS = ("a red dog top-left, a cat.", "yes", "two tools and a green hat at the bottom", "blue")


class Notes(Logger):
    """Keeps what Lightning logs."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "notes"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def of(self, name: str) -> dict[int | None, float]:
        return {step: metrics[name] for step, metrics in self.logged if name in metrics}


class Plain(SupervisedFineTuning):
    """Plain gradient descent: the change of the weights is the gradient."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameter_groups())
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)]


def stage(**changes: Any) -> StageConfig:
    values: dict[str, Any] = {"steps": 1, "batch_size": 8, "micro_batch_size": 8, "clip_norm": 1e9, "max_length": 512}
    return StageConfig(**{**values, **changes})


def load(folder: Path) -> tuple[Any, ChatEncoder]:
    model, processor = load_model(ModelSource(str(folder)))
    return model, ChatEncoder(processor)


def make_mixture(encoder: ChatEncoder, images: list[Path], text: bool = True) -> Mixture:
    """Rows with and without an image, of very different lengths."""
    pictured = [Record(f"i{i}", conversation(prompt("dd"), caption, (f"{i}.png",)), (f"{i}.png",), "dd", "x")
                for i, caption in enumerate(CAPTIONS)]  # fmt: skip
    written = [Record(f"t{i}", conversation("What is it?", "animal " * (i + 1), ()), (), "text", "x") for i in range(4)]
    tensors, reject = ImageTensors(images[0].parent, encoder, 50_000_000), Rejected(images[0].parent).add
    sources = [(RecordSource("self_caption", pictured, tensors, encoder, 512, reject), 0.6)]
    return Mixture([*sources, (RecordSource("text", written, tensors, encoder, 512, reject), 0.4 * text)], 0)


def data(encoder: ChatEncoder, images: list[Path], config: StageConfig, **options: Any) -> StageData:
    pad = encoder.tokenizer.pad_token_id
    mixture = make_mixture(encoder, images, **options)
    return StageData(StepBatches(mixture, config, pad))


def train(kind: type, folder: Path, images: list[Path], tmp_path: Path, config: StageConfig,
          logger: Logger | None = None, machine: ModelConfig = CPU, **options: Any) -> Any:  # fmt: skip
    """The module after training, and its workplace."""
    model, encoder = load(folder)
    module = kind(model, config)
    scratch = tmp_path / f"scratch{len(list(tmp_path.iterdir()))}"
    scratch.mkdir()
    workplace = Workplace(tmp_path, scratch)
    fit(module, data(encoder, images, config, **options), machine, workplace, 0, logger)
    return module, workplace


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def one_batch(encoder: ChatEncoder, images: list[Path], rows: int = 8) -> dict[str, Any]:
    return collate(make_mixture(encoder, images).rows(0, rows), encoder.tokenizer.pad_token_id)


def gradients(module: SupervisedFineTuning, batches: list[dict[str, Any]]) -> torch.Tensor:
    module.zero_grad()
    terms = sum(module.terms(batch) for batch in batches)
    for batch in batches:
        (module.batch_loss(batch)[0] / terms).backward()
    return torch.cat([p.grad.flatten() for p in module.trained_parameters if p.grad is not None])


# One step, however it is cut.


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_a_step_does_not_depend_on_the_batch_split(micro: int, tiny_model: Path, world_images: list[Path],
                                                   tmp_path: Path) -> None:  # fmt: skip
    """Accumulating 8, 4 or 2 micro-batches moves the weights as one batch of 8 does."""
    whole, _ = train(Plain, tiny_model, world_images, tmp_path, stage())
    split, _ = train(Plain, tiny_model, world_images, tmp_path, stage(micro_batch_size=micro))
    before = weights(load(tiny_model)[0])
    moved = {name: (value - before[name]).abs().max() for name, value in weights(whole.model).items()}
    assert max(moved.values()) > 1e-5
    for name, value in weights(split.model).items():
        torch.testing.assert_close(value, weights(whole.model)[name], rtol=1e-4, atol=2e-7)


@pytest.mark.parametrize("kind", [SupervisedFineTuning, MultimodalPretraining])
def test_micro_batches_side_by_side_train_the_same_bits(kind: type, tiny_model: Path, world_images: list[Path],
                                                        tmp_path: Path) -> None:  # fmt: skip
    config = stage(steps=3, micro_batch_size=2)
    alone, _ = train(kind, tiny_model, world_images, tmp_path, config)
    two = ModelConfig(device="cpu", threads=2)
    beside, workplace = train(kind, tiny_model, world_images, tmp_path, config, machine=two)
    assert beside.threads
    assert not alone.threads
    assert workplace.facts["samples"] == 24
    for name, value in weights(beside.model).items():
        assert torch.equal(value, weights(alone.model)[name]), name


@pytest.mark.parametrize("changes", [{}, {"micro_batch_size": 4}, {"max_length": 120}])
def test_a_step_does_not_depend_on_packing(changes: dict[str, int], tiny_model: Path, world_images: list[Path],
                                           tmp_path: Path) -> None:  # fmt: skip
    """Samples that share a row move the weights as they do in rows of their own."""
    whole, _ = train(Plain, tiny_model, world_images, tmp_path, stage())
    packed, workplace = train(Plain, tiny_model, world_images, tmp_path, stage(packing=True, **changes))
    assert workplace.facts["samples"] == 8
    for name, value in weights(packed.model).items():
        torch.testing.assert_close(value, weights(whole.model)[name], rtol=1e-4, atol=2e-7)


def test_packed_samples_have_the_losses_they_have_alone(tiny_model: Path, world_images: list[Path]) -> None:
    model, encoder = load(tiny_model)
    module = SupervisedFineTuning(model, stage())
    rows, pad = make_mixture(encoder, world_images).rows(0, 8), encoder.tokenizer.pad_token_id
    bins = fill_bins(rows, 512)
    assert len(bins) < len(rows)
    losses, samples = module.token_losses(pack(bins, pad))
    for i, row in enumerate(row for rows in bins for row in rows):
        alone, _ = module.token_losses(collate([row], pad))
        torch.testing.assert_close(losses[samples == i], alone, rtol=1e-4, atol=1e-5)


def test_packing_is_refused_where_attention_takes_one_row_at_a_time(tiny_model: Path) -> None:
    model, _ = load(tiny_model)
    model.config._attn_implementation = "flash_attention_2"  # as loaded by model.attention, which needs its package
    with pytest.raises(ValueError, match=r"packing=true: .*flash_attention_2.*use sdpa"):
        SupervisedFineTuning(model, stage(packing=True))
    SupervisedFineTuning(model, stage())


def test_packing_is_refused_where_positions_are_not_a_line(tiny_model: Path) -> None:
    model, _ = load(tiny_model)
    model.config.text_config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    with pytest.raises(ValueError, match=r"packing=true: llava .*set packing=false"):
        SupervisedFineTuning(model, stage(packing=True))


def test_padding_changes_neither_loss_nor_gradient(tiny_model: Path, world_images: list[Path]) -> None:
    model, encoder = load(tiny_model)
    module = SupervisedFineTuning(model, stage())
    batch = one_batch(encoder, world_images)
    wide = dict(batch)
    for name, fill in (
        ("input_ids", encoder.tokenizer.pad_token_id),
        ("labels", IGNORED),
        ("attention_mask", 0),
        ("segments", -1),
    ):
        wide[name] = torch.nn.functional.pad(batch[name], (0, 13), value=fill)
    torch.testing.assert_close(module.batch_loss(wide)[0], module.batch_loss(batch)[0])
    torch.testing.assert_close(gradients(module, [wide]), gradients(module, [batch]), rtol=1e-4, atol=1e-7)
    assert module.terms(wide) == module.terms(batch)


def test_the_loss_is_transformers_loss_times_its_tokens(tiny_model: Path, world_images: list[Path]) -> None:
    model, encoder = load(tiny_model)
    batch = one_batch(encoder, world_images)
    summed, terms = SupervisedFineTuning(model, stage()).batch_loss(batch)
    with torch.no_grad():
        reference = model(**{name: batch[name] for name in batch.keys() - {"segments", "sources"}}).loss
    assert terms == int((batch["labels"][:, 1:] != IGNORED).sum())
    torch.testing.assert_close(summed.detach() / terms, reference, rtol=1e-5, atol=1e-6)


def test_only_positions_before_a_response_token_get_a_gradient(tiny_model: Path, world_images: list[Path]) -> None:
    """Neither prompt nor image tokens nor padding are learned."""
    model, encoder = load(tiny_model)
    module = SupervisedFineTuning(model, stage())
    hidden: list[torch.Tensor] = []

    def keep(inner: torch.nn.Module, arguments: Any, output: Any) -> None:
        output.last_hidden_state.retain_grad()
        hidden.append(output.last_hidden_state)

    model.model.register_forward_hook(keep)
    batch = one_batch(encoder, world_images)
    module.batch_loss(batch)[0].backward()
    assert hidden[0].grad is not None
    touched = hidden[0].grad.abs().sum(-1) > 0
    wanted = torch.zeros_like(touched)
    wanted[:, :-1] = batch["labels"][:, 1:] != IGNORED
    assert torch.equal(touched, wanted)
    image = encoder.tokenizer.convert_tokens_to_ids(encoder.image_token)
    assert not (batch["labels"] == image).any()


def test_the_loss_of_a_row_does_not_depend_on_its_neighbours(tiny_model: Path, world_images: list[Path]) -> None:
    model, encoder = load(tiny_model)
    module = SupervisedFineTuning(model, stage())
    rows, pad = make_mixture(encoder, world_images).rows(0, 6), encoder.tokenizer.pad_token_id
    losses, places = module.token_losses(collate(rows, pad))
    for i, row in enumerate(rows):
        alone, _ = module.token_losses(collate([row], pad))
        torch.testing.assert_close(losses[places == i], alone, rtol=1e-4, atol=1e-5)


# What trains.


@pytest.mark.parametrize("frozen", list(PARTS))
def test_a_part_with_learning_rate_0_stays_bit_identical(frozen: str, tiny_model: Path, world_images: list[Path],
                                                         tmp_path: Path) -> None:  # fmt: skip
    before = {part: [p.detach().clone() for p in parameters]
              for part, parameters in part_parameters(load(tiny_model)[0]).items()}  # fmt: skip
    config = stage(steps=2, micro_batch_size=4, weight_decay=0.1, **{f"{frozen}_lr": 0.0})
    module, _ = train(SupervisedFineTuning, tiny_model, world_images, tmp_path, config)
    for part, parameters in part_parameters(module.model).items():
        same = [torch.equal(old, new) for old, new in zip(before[part], parameters, strict=True)]
        assert all(same) if part == frozen else not all(same)
        assert all(parameter.requires_grad == (part != frozen) for parameter in parameters)


def test_each_part_has_its_own_learning_rate(tiny_model: Path) -> None:
    model, _ = load(tiny_model)
    module = SupervisedFineTuning(model, stage(vision_lr=1e-5, projector_lr=0.0, language_lr=1e-3))
    groups = module.parameter_groups()
    assert [group["lr"] for group in groups] == [1e-5, 1e-3]
    parts = part_parameters(model)
    assert groups[0]["params"] == parts["vision"]
    assert groups[1]["params"] == parts["language"]


def test_text_alone_while_only_the_projector_trains(tiny_model: Path, world_images: list[Path],
                                                    tmp_path: Path) -> None:  # fmt: skip
    """A micro-batch that reaches no trained parameter counts in the loss and stops nothing."""
    config = stage(steps=2, micro_batch_size=1, vision_lr=0.0, language_lr=0.0)
    module, workplace = train(SupervisedFineTuning, tiny_model, world_images, tmp_path, config)
    assert workplace.facts["samples"] == 16
    before = part_parameters(load(tiny_model)[0])["projector"]
    assert not all(map(torch.equal, before, part_parameters(module.model)["projector"]))


# Schedule, numbers, logs.


def test_the_learning_rate_rises_linearly_then_falls_as_a_cosine() -> None:
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(101)]
    assert factors[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0.0, abs=1e-12)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[32] == pytest.approx(0.5 * (1 + math.cos(math.pi * 22 / 90)))
    assert learning_rate_factor(0, 1, 0.03) == 1.0
    assert learning_rate_factor(0, 100, 0.0) == 1.0
    assert learning_rate_factor(99, 100, 1.0) == 1.0


def test_the_schedule_reaches_the_optimizer(tiny_model: Path, world_images: list[Path], tmp_path: Path) -> None:
    notes = Notes()
    config = stage(steps=2 * LOG_EVERY, batch_size=2, micro_batch_size=2, vision_lr=3e-4)
    train(SupervisedFineTuning, tiny_model, world_images, tmp_path, config, notes)
    logged = list(notes.of("learning_rate").values())
    assert logged == pytest.approx([3e-4 * learning_rate_factor(step, 20, 0.03) for step in (9, 19)], rel=1e-6)


def test_a_loss_that_is_no_number_stops_the_stage(tiny_model: Path, world_images: list[Path], tmp_path: Path) -> None:
    model, encoder = load(tiny_model)
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] = float("nan")
    config = stage(steps=2)
    module = SupervisedFineTuning(model, config)
    before = weights(model)
    with pytest.raises(FloatingPointError, match=r"step 0: loss nan.*lower the learning rate"):
        fit(module, data(encoder, world_images, config), CPU, Workplace(tmp_path, tmp_path), 0)
    after = weights(model)
    assert all(torch.equal(after[name].nan_to_num(), value.nan_to_num()) for name, value in before.items())


def test_a_few_steps_lower_the_loss(tiny_model: Path, world_images: list[Path], tmp_path: Path) -> None:
    notes = Notes()
    config = stage(steps=30, batch_size=4, micro_batch_size=4, clip_norm=1.0, vision_lr=3e-3, projector_lr=3e-3,
                   language_lr=3e-3)  # fmt: skip
    train(SupervisedFineTuning, tiny_model, world_images, tmp_path, config, notes)
    losses = list(notes.of("loss").values())
    assert losses[-1] < 0.7 * losses[0]


def test_pretraining_reports_the_loss_of_each_source(tiny_model: Path, world_images: list[Path],
                                                     tmp_path: Path) -> None:  # fmt: skip
    notes = Notes()
    config = stage(steps=2 * LOG_EVERY, batch_size=4, micro_batch_size=2)
    train(MultimodalPretraining, tiny_model, world_images, tmp_path, config, notes)
    for source in ("self_caption", "text"):
        found = notes.of(f"loss_{source}")
        assert list(found) == [LOG_EVERY, 2 * LOG_EVERY]
        assert all(0 < loss < 20 for loss in found.values())


def test_a_source_s_loss_is_the_mean_of_its_tokens(tiny_model: Path, world_images: list[Path],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Over several micro-batches, and without a look at a number before it is logged."""
    model, encoder = load(tiny_model)
    module, looks = MultimodalPretraining(model, stage()), []
    rows = make_mixture(encoder, world_images).rows(0, 6)
    wanted: dict[str, list[float]] = {}
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__float__", lambda tensor: looks.append(tensor))
        for part in (rows[:2], rows[2:]):
            module.batch_loss(collate(part, 0))
    assert not looks
    with torch.no_grad():
        for row in rows:
            wanted.setdefault(f"loss_{row.source}", []).extend(module.token_losses(collate([row], 0))[0].tolist())
    found = {name: (total / count, count) for name, (total, count) in module.means._collect().items()}
    assert found == {name: (pytest.approx(sum(of) / len(of), rel=1e-5), len(of)) for name, of in wanted.items()}
    assert len(found) > 1


def test_work_counts_samples_and_tokens(tiny_model: Path, world_images: list[Path]) -> None:
    model, encoder = load(tiny_model)
    module = SupervisedFineTuning(model, stage())
    rows = make_mixture(encoder, world_images).rows(0, 6)
    batches = [collate(rows[:2], 0), collate(rows[2:], 0)]
    pictured = sum(row.image_inputs is not None for row in rows)
    tokens = sum(len(row.example) for row in rows)
    new = sum(label != IGNORED for row in rows for label in row.example.labels[1:])
    assert 0 < new < tokens
    assert module.work(batches) == {"samples": 6, "tokens": tokens, "prompt_tokens": tokens - new,
                                    "image_tokens": 9 * pictured, "new_tokens": new}  # fmt: skip


def test_vision_pretraining_learns_and_leaves_the_language_model(tiny_model: Path, tmp_path: Path) -> None:
    model, encoder = load(tiny_model)
    language = [p.detach().clone() for p in part_parameters(model)["language"]]
    config = stage(steps=20, batch_size=8, vision_lr=3e-3, clip_norm=1.0)
    module, notes = VisionPretraining(model.model.vision_tower, config), Notes()
    cells = SceneCells(0, config.batch_size, encoder.pixels)
    fit(module, StageData(cells), CPU, Workplace(tmp_path, tmp_path), 0, notes)
    first, last = notes.of("loss").values()
    assert last < first
    assert "name_accuracy" in notes.logged[0][1]
    assert all(map(torch.equal, language, part_parameters(model)["language"]))
    batch = next(iter(cells))[0]
    assert batch["pixel_values"].shape == (8, 3, 72, 72)
    assert ((batch["names"] > 0) == (batch["colors"] > 0)).all()
