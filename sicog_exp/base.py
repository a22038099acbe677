"""Train the embedded base: vision pre-training, language pre-training, alignment, instruction tuning.

Run once, shipped in the package (`sicog_exp/models/base`); `sicog base experiments/base.yaml` makes it again with the
same steps and store. The base learns to see and to reason over text, never to answer a benchmark family about an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sicog_exp.data import questions
from sicog_exp.data.scenes import IMAGE_SIZE, make_scene, render, rng_for
from sicog_exp.prompts import prompt
from sicog_exp.recipe import ModelConfig, RecipeError, StageConfig
from sicog_exp.records import turns_conversation
from sicog_exp.store import Artifact, Step, Store, Workplace

if TYPE_CHECKING:
    from sicog_exp.data.chat import ChatEncoder, Example
    from sicog_exp.data.mixture import Row

MAX_LENGTH = 512


@dataclass(frozen=True)
class ShapeConfig:
    """The model's size."""

    vocab_size: int = 768
    """Entries of the byte-level BPE, before the step headers."""
    width: int = 128
    """Hidden size of tower and language model."""
    vision_layers: int = 3
    """Layers of the CLIP-ViT."""
    language_layers: int = 4
    """Layers of the Qwen2 decoder."""
    heads: int = 4
    """Attention heads of both."""
    patch_size: int = 24
    """Pixels of a patch's side; a 72 pixel image gives (72 / patch_size)^2 tokens."""

    def __post_init__(self) -> None:
        sizes = asdict(self)
        if min(sizes.values()) < 1:
            raise RecipeError(f"{sizes}: every size must be above 0")
        if self.width % (2 * self.heads):
            raise RecipeError(f"width={self.width}: must be a multiple of 2 * heads = {2 * self.heads}")
        if IMAGE_SIZE % self.patch_size:
            raise RecipeError(f"patch_size={self.patch_size}: must divide the image's {IMAGE_SIZE} pixels")


@dataclass(frozen=True)
class BaseRecipe:
    """The embedded base's training."""

    seed: int = 0
    """Seed of weights, data order and scenes."""
    store: str = "store"
    """Folder of the step store."""
    turns: int = 8
    """Questions asked about each image."""
    text_share: float = 0.4
    """Share of text-only rows in instruction tuning."""
    model: ModelConfig = field(default_factory=ModelConfig)
    shape: ShapeConfig = field(default_factory=ShapeConfig)
    vision: StageConfig = field(default_factory=StageConfig)
    language: StageConfig = field(default_factory=StageConfig)
    align: StageConfig = field(default_factory=StageConfig)
    instruct: StageConfig = field(default_factory=StageConfig)

    def __post_init__(self) -> None:
        if self.turns < 1 or not 0 <= self.text_share <= 1:
            raise RecipeError(f"turns={self.turns}, text_share={self.text_share}: need a turn or more, and a share "
                              "between 0 and 1")  # fmt: skip
        if self.model.ranks > 1:
            raise RecipeError(f"model.devices={self.model.devices}, model.nodes={self.model.nodes}: the embedded base "
                              "trains on one device; leave both out")  # fmt: skip


@dataclass(frozen=True)
class StageTask:
    """What one base stage depends on."""

    stage: StageConfig
    model: ModelConfig
    text_share: float = 0.0
    turns: int = 8


class SceneTurns:
    """An endless stream of scenes, each with several simple questions in one conversation."""

    name, rows = "scenes", None

    def __init__(self, seed: int, turns: int, encoder: ChatEncoder) -> None:
        self._seed, self._turns, self._encoder = seed, turns, encoder
        self._pixels = encoder.pixels([render(make_scene(seed, "base", 0), seed)])

    def row(self, index: int) -> Row:
        from sicog_exp.data.mixture import Row

        scene = make_scene(self._seed, "base", index)
        turns = questions.base_turns(scene, rng_for(self._seed, "base", index, "turns"), self._turns)
        return Row(self.example(turns), self._encoder.pixels([render(scene, self._seed)]), self.name)

    def example(self, turns: Sequence[tuple[str, str]]) -> Example:
        """The encoder's example of the whole conversation: the embedded template writes turns one behind another, so
        that each is encoded once, not once per image."""
        from sicog_exp.data.chat import Example

        parts = [self._turn(*turn, int(i == 0)) for i, turn in enumerate(turns)]
        return Example([x for part in parts for x in part.input_ids], [x for part in parts for x in part.labels])

    @lru_cache(maxsize=100_000)  # noqa: B019 - lives as long as its training stage
    def _turn(self, question: str, answer: str, images: int) -> Example:
        messages = turns_conversation([(question, answer)], images)
        return self._encoder.example(messages, self._pixels if images else None, MAX_LENGTH)


class TextTurns:
    """An endless stream of text-only facts and reasoning over listings."""

    name, rows = "text", None

    def __init__(self, seed: int, encoder: ChatEncoder) -> None:
        self._seed, self._encoder = seed, encoder

    def row(self, index: int) -> Row:
        from sicog_exp.data.mixture import Row

        scene = make_scene(self._seed + 1, "base", index)
        turns = questions.text_turns(scene, rng_for(self._seed + 1, "base", index, "text"))
        return Row(self._encoder.example(turns_conversation(turns, images=0), None, MAX_LENGTH), None, self.name)


def corpus(seed: int, scenes: int = 3000) -> Iterator[str]:
    """Text from which the tokenizer learns its words: all kinds of the world's text, on base scenes."""
    for index in range(scenes):
        scene = make_scene(seed, "base", index)
        rng = rng_for(seed, "base", index, "corpus")
        for question, answer in questions.text_turns(scene, rng) + questions.base_turns(scene, rng, 4):
            yield f"user\n{question}"
            yield f"assistant\n{answer}"
        yield questions.chain_of_description(scene)
        yield f"{prompt('cod')}{prompt('dd')}"
        for asked in questions.questions(scene, rng, 3):
            yield questions.chain_of_thought(scene, asked)
            yield f"{prompt('cot', asked.text)}{prompt('direct', asked.text)}"


def initialise(config: ShapeConfig, inputs: Mapping[str, Artifact], workplace: Workplace, seed: int) -> None:
    """Tokenizer, processor and random weights; pixels are normalised by the mean and spread of base scenes."""
    import numpy as np
    import torch

    from sicog_exp.models import embedded
    from sicog_exp.models.loading import save_model

    torch.manual_seed(seed)
    tokenizer = embedded.build_tokenizer(corpus(seed), config.vocab_size)
    pixels = np.stack([render(make_scene(seed, "base", i), seed) for i in range(256)]).reshape(-1, 3) / 255
    mean, std = ([round(float(x), 4) for x in values] for values in (pixels.mean(0), pixels.std(0)))
    processor = embedded.build_processor(tokenizer, config.patch_size, mean, std)
    model = embedded.build_model(
        tokenizer, width=config.width, vision_layers=config.vision_layers, language_layers=config.language_layers,
        heads=config.heads, patch_size=config.patch_size, max_length=MAX_LENGTH)  # fmt: skip
    save_model(model, processor, workplace.directory)


def _load(artifact: Artifact) -> tuple[Any, Any]:
    from sicog_exp.models.loading import ModelSource, load_model

    return load_model(ModelSource(str(artifact.path)))


def pretrain_vision(task: StageTask, inputs: Mapping[str, Artifact], workplace: Workplace, seed: int) -> None:
    """Dense vision pre-training; the language model is left as it is."""
    import torch

    from sicog_exp.models.loading import save_model
    from sicog_exp.training.fit import StageData, fit
    from sicog_exp.training.vision import SceneCells, VisionPretraining

    torch.manual_seed(seed)
    model, processor = _load(inputs["model"])
    module = VisionPretraining(model.model.vision_tower, task.stage)

    def pixels(images):
        return processor.image_processor(images=images, return_tensors="pt")

    fit(module, StageData(SceneCells(seed, task.stage.batch_size, pixels), workers=1), task.model, workplace, seed)
    save_model(model, processor, workplace.directory)


def train_language(task: StageTask, inputs: Mapping[str, Artifact], workplace: Workplace, seed: int) -> None:
    """Next-token training on scenes' simple turns and text-only rows; `language` takes text alone."""
    from sicog_exp.data.chat import ChatEncoder
    from sicog_exp.data.mixture import Mixture
    from sicog_exp.models.loading import save_model
    from sicog_exp.training.fit import StageData, StepBatches, fit
    from sicog_exp.training.modules import SupervisedFineTuning

    model, processor = _load(inputs["model"])
    if "vision" in inputs:
        seeing, _ = _load(inputs["vision"])
        model.model.vision_tower.load_state_dict(seeing.model.vision_tower.state_dict())
    encoder = ChatEncoder(processor)
    scenes, text = SceneTurns(seed, task.turns, encoder), TextTurns(seed, encoder)
    mixture = Mixture([(scenes, 1 - task.text_share), (text, task.text_share)], seed)
    batches = StepBatches(mixture, task.stage, processor.tokenizer.pad_token_id)
    module = SupervisedFineTuning(model, task.stage)
    fit(module, StageData(batches, workers=1), task.model, workplace, seed)
    save_model(model, processor, workplace.directory)


def _seeded(function, seed: int):
    return lambda config, inputs, workplace: function(config, inputs, workplace, seed)


def base_steps(recipe: BaseRecipe, store: Store, until: str = "instruct") -> dict[str, Artifact]:
    """Run the base's steps up to `until`: initial, vision, language, align, instruct."""
    seed = recipe.seed
    done = {"initial": store.run(Step("base-initial", _seeded(initialise, seed), recipe.shape, seed=seed))}

    one_thread = replace(recipe.model, threads=1)

    def run(name: str, function, task: StageTask, **inputs: Artifact) -> None:
        done[name] = store.run(Step(f"base-{name}", _seeded(function, seed), task, inputs, seed))

    if until != "language":
        run("vision", pretrain_vision, StageTask(recipe.vision, one_thread), model=done["initial"])
    if until != "vision":
        run("language", train_language, StageTask(recipe.language, recipe.model, 1.0), model=done["initial"])
    if until in ("align", "instruct"):
        run("align", train_language, StageTask(recipe.align, recipe.model, 0.0, recipe.turns),
            model=done["language"], vision=done["vision"])  # fmt: skip
    if until == "instruct":
        run("instruct", train_language, StageTask(recipe.instruct, recipe.model, recipe.text_share, recipe.turns),
            model=done["align"])  # fmt: skip
    return done


def publish(artifact: Artifact, folder: Path) -> None:
    """Copy the finished base where the package ships it."""
    import shutil

    folder.mkdir(parents=True, exist_ok=True)
    for name in artifact.manifest["outputs"]:
        shutil.copyfile(artifact / name, folder / name)
