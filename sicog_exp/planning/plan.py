"""A recipe's steps on paper: rows, tokens, FLOPs, memory, device hours and disk of each, nothing run.

The same formula (`models.loading.Work`) counts FLOPs here and in a run; what differs are the tokens, here expected from
rows that are there. `expected_work` is the same plan for a run's progress display.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sicog_exp import loop
from sicog_exp.curation.scorers import compared_by
from sicog_exp.data.chat import ChatEncoder
from sicog_exp.models.loading import ModelError, ModelSource, load_processor, resolve_base
from sicog_exp.models.shapes import Shape, composed_shape, encoder_parameters, read_shape
from sicog_exp.planning.contents import Contents, Rows, Ruler, read_contents
from sicog_exp.planning.devices import DEVICES, Device
from sicog_exp.planning.tasks import UNKNOWN_QUESTIONS, Asked, read_tasks
from sicog_exp.prompts import COD_TURNS, KINDS, Kind
from sicog_exp.recipe import Recipe, StageConfig
from sicog_exp.selfdata import GROUPS, Group
from sicog_exp.stopping import decides_by_scores

ACTIVATIONS = 17
"""Numbers that training keeps of a token, a layer and a feature: Korthikanti et al. 2022 (arXiv 2205.05198), equation
2, without attention scores, which fused attention does not keep: 34 bytes at 2 bytes a number."""
LOGIT_COPIES = 3
"""Of a predicted token's logits in float32: themselves, their softmax, their gradient."""
QUANTIZED_BYTES = 0.5
"""Of a weight held in 4 bits."""
SAVED_BYTES = 4
"""Of a weight in a saved model: float32, in which stages load it."""
POOL_BYTES, TOKEN_BYTES, POOL_COPIES = 300, 4, 1.5
"""Of a candidate besides its text, of a token's text, and the files of the pool and of curation that hold them."""
SCORED_BYTES = 350
"""Of a benchmark question's result in all files of an evaluation."""


@dataclass(frozen=True)
class PlannedStep:
    """One step. `memory` in bytes on each device, all weights on each; `hours` of one device; `disk` in bytes."""

    generation: int
    step: str
    samples: float = 0.0
    prompt_tokens: float = 0.0
    """Image tokens included."""
    image_tokens: float = 0.0
    new_tokens: float = 0.0
    flops: float = 0.0
    memory: float = 0.0
    state: float = 0.0
    """Of `memory`, the weights, gradients and moments in training, which devices can share out."""
    hours: float = 0.0
    disk: float = 0.0

    @property
    def tokens(self) -> float:
        return self.prompt_tokens + self.new_tokens


@dataclass(frozen=True)
class Pricing:
    """What turns FLOPs into hours."""

    device: str
    devices: int
    utilisation: float
    sampling_utilisation: float

    @property
    def of(self) -> Device:
        return DEVICES[self.device]

    def hours(self, flops: float, sampled: float = 0.0) -> float:
        """Of one device; `sampled`: FLOPs that draw token after token."""
        return (flops / self.utilisation + sampled / self.sampling_utilisation) / self.of.peak / 3600


@dataclass(frozen=True)
class Plan:
    """What a recipe will cost, and what was taken for given to say so."""

    recipe: str
    shape: Shape
    pricing: Pricing
    steps: tuple[PlannedStep, ...]
    assumptions: tuple[str, ...]
    tracked: float
    """Bytes of the models' copies in the tracking store."""

    @property
    def total(self) -> PlannedStep:
        return self.sum_of(self.steps)

    @property
    def sharded(self) -> float:
        """Bytes on the fullest device where all share out weights, gradients and moments."""
        return max(step.memory - step.state * (1 - 1 / self.pricing.devices) for step in self.steps)

    @staticmethod
    def sum_of(steps: Iterable[PlannedStep]) -> PlannedStep:
        """Sums; memory and its state are those of the fullest step."""
        added = list(steps)
        names = ("samples", "prompt_tokens", "image_tokens", "new_tokens", "flops", "hours", "disk")
        sums = {name: sum(getattr(step, name) for step in added) for name in names}
        fullest = max(added, key=lambda step: step.memory)
        return PlannedStep(-1, "all", memory=fullest.memory, state=fullest.state, **sums)


def pricing(device: str, devices: int = 1, utilisation: float | None = None,
            sampling_utilisation: float | None = None) -> Pricing:  # fmt: skip
    """With the device's own utilisations where none is given."""
    own = DEVICES[device]
    return Pricing(device, devices, utilisation or own.utilisation, sampling_utilisation or own.sampling_utilisation)


def expected_work(recipe: Recipe) -> dict[str, float]:
    """Expected work of each step of a run, in hours of some device of the recipe's kind."""
    here = pricing("cpu" if recipe.model.torch_device == "cpu" else "h100")
    return {f"G{step.generation} {step.step}": step.hours for step in make_plan(recipe, here).steps}


def make_plan(recipe: Recipe, price: Pricing) -> Plan:
    """Raises ModelError or DataError for a model or data that cannot be planned with."""
    shape, encoder = base_of(recipe)
    shape = replace(shape, image_tokens=recipe.plan.image_tokens or shape.image_tokens)
    contents = read_contents(recipe, Ruler(encoder, shape.image_tokens, recipe.data.max_pixels), shape.image_tokens)
    planner = _Planner(recipe, shape, contents, price)
    steps = tuple(planner.steps())
    tracked = SAVED_BYTES * shape.parameters * (recipe.iterations + 1) * recipe.tracking.register
    return Plan(recipe.name, shape, price, steps, tuple(planner.assumptions()), tracked)


def base_of(recipe: Recipe) -> tuple[Shape, ChatEncoder | None]:
    """The base model's shape, and what counts its tokens where its processor is at hand. Raises ModelError."""
    model = recipe.model
    if recipe.plan.shape:
        return read_shape(recipe.plan.shape), None
    if model.language and model.vision:
        return composed_shape(model.language, resolve_base(model.vision)), None
    source = ModelSource.of(resolve_base(model.base), model)
    shape = replace(read_shape(source.path, source.trust_remote_code), name=model.base)
    try:
        return shape, ChatEncoder(load_processor(source))
    except ModelError:
        return shape, None


class _Planner:
    """The loop's steps (`loop.iterate`) with their costs."""

    def __init__(self, recipe: Recipe, shape: Shape, contents: Contents, price: Pricing) -> None:
        self.recipe, self.shape, self.contents, self.price = recipe, shape, contents, price
        evaluation, unknown = recipe.evaluation, recipe.plan.benchmark_questions or UNKNOWN_QUESTIONS
        self.tasks = read_tasks(evaluation, evaluation.split, contents.splits, unknown)
        self.decisive = self.tasks
        """What a stop rule decides by."""
        if evaluation.split == "benchmark" and recipe.stop.no_gain:
            self.decisive = read_tasks(evaluation, "development", contents.splits, unknown)
        half = recipe.model.precision != "32-true"
        self.bytes = 2 if half else 4
        """Of a number in generation and in activations."""
        self.weight_bytes = 2 if recipe.model.precision == "bf16-true" else 4

    def steps(self) -> Iterator[PlannedStep]:
        recipe = self.recipe
        yield from self._beginning()
        if recipe.model.language:
            yield from self._aligning(0)
        yield from self._training(0, "instruct", recipe.instruct, loop.instruction_shares(recipe))
        yield from self._scored(0)
        for g in range(1, recipe.iterations + 1):
            if g > 1 and not recipe.self_data and recipe.start != "previous":
                return  # the control's next generation is the same model
            yield from self._iteration(g)

    def _beginning(self) -> Iterator[PlannedStep]:
        contents, base = self.contents, Path(resolve_base(self.recipe.model.base))
        whole = base.is_dir() and not self.recipe.model.language
        weights = sum(path.stat().st_size for path in base.glob("*.safetensors")) if whole else 0
        yield PlannedStep(0, "data", disk=contents.pictures * contents.picture_bytes)
        rows = [*contents.annotated.values(), contents.instruction, contents.alignment, contents.text]
        unlabeled = contents.captions + contents.questions
        yield PlannedStep(0, "contamination", samples=sum(one.count for one in rows) + unlabeled)
        yield PlannedStep(0, "base", disk=weights or 2 * self.shape.parameters)
        if self.recipe.start == "parts":
            yield PlannedStep(0, "parts", disk=SAVED_BYTES * self.shape.parameters)

    def _iteration(self, g: int) -> Iterator[PlannedStep]:
        recipe = self.recipe
        # A later one from the base is the first one's, read from the store, and that of a model made of parts is G0's.
        first = g == 1 and not (recipe.model.language and recipe.start == "base")
        if first or recipe.start == "previous":
            yield from self._aligning(g)
        if recipe.self_data:
            yield from self._developing(g)
            if recipe.preference.steps:
                yield from self._preference(g)
            yield from self._self_data(g)
        yield from self._training(g, "pretrain", recipe.pretrain, loop.mixture_shares(recipe))
        yield from self._training(g, "instruct", loop.closing(recipe), loop.instruction_shares(recipe))
        yield from self._scored(g)

    def _scored(self, g: int) -> Iterator[PlannedStep]:
        yield self._evaluation(g, "evaluate", self.tasks)
        if decides_by_scores(self.recipe, g) and self.decisive is not self.tasks:
            yield self._evaluation(g, "evaluate-development", self.decisive)

    def _aligning(self, g: int) -> Iterator[PlannedStep]:
        recipe = self.recipe
        yield from self._training(g, "align", recipe.align, loop.align_shares(recipe), GROUPS["caption"])

    def _developing(self, g: int) -> Iterator[PlannedStep]:
        shares, stage = {"annotated": 1.0}, self.recipe.develop
        if self.recipe.generators == "mixed":
            yield from self._training(g, "develop", stage, shares)
            return
        yield from self._training(g, "develop-perception", stage, shares, GROUPS["caption"])
        yield from self._training(g, "develop-reasoning", stage, shares, GROUPS["reasoning"])

    # Training.

    def _training(self, g: int, name: str, stage: StageConfig, shares: Mapping[str, float],
                  kinds: tuple[Kind, ...] = KINDS) -> Iterator[PlannedStep]:  # fmt: skip
        if not stage.steps:
            return
        text, image, new = self._mean_row(shares, kinds, stage.max_length)
        rows = stage.steps * stage.batch_size
        flops = self._trained_flops(stage, rows, text, image, new)
        state = self._state(stage)
        yield PlannedStep(g, name, rows, rows * (text + image), rows * image, rows * new, flops,
                          state + self._activations(stage, text + image + new, image, new), state,
                          self.price.hours(flops), SAVED_BYTES * self.shape.parameters)  # fmt: skip

    def _trained_flops(self, stage: StageConfig, rows: float, text: float, image: float, new: float) -> float:
        again = self.recipe.model.gradient_checkpointing
        return self.shape.work.training(rows * (text + image + new), rows * image, rows * new, stage.trained,
                                        stage.adapted, again)  # fmt: skip

    def _mean_row(self, shares: Mapping[str, float], kinds: tuple[Kind, ...], limit: int) -> tuple[float, float, float]:
        """(text, image, response) tokens of a mixture's mean row; sources without rows are left out."""
        sources = [(share, self._source(name, kinds)) for name, share in shares.items() if share > 0]
        usable = [(share, length) for share, length in sources if length]
        total = sum(share for share, _ in usable) or 1.0
        text, image, new = (sum(share * length[i] for share, length in usable) / total for i in range(3))
        return text, image, min(new, max(limit - text - image, 1.0))

    def _source(self, name: str, kinds: tuple[Kind, ...]) -> tuple[float, float, float] | None:
        contents = self.contents
        if name == "annotated":
            return _mixed([(rows, rows.new()) for kind, rows in contents.annotated.items()
                           if kind in kinds and kind != "text"])  # fmt: skip
        if name in ("instruction", "alignment", "text"):
            rows: Rows = getattr(contents, name)
            return _mixed([(rows, rows.new())])
        return self._self_rows(name)

    def _self_rows(self, source: str) -> tuple[float, float, float] | None:
        """Rows of kept candidates (`selfdata.training_rows`): as long as annotated ones, cut at the sampling's limit.

        A kept caption in five steps gives its last step as a plain caption too.
        """
        sampling = self.recipe.sampling
        if source == "self_turns":
            return self._turns() if sampling.cod else None
        if source != "self_caption":
            kind: Kind = "cot" if source == "self_cot" else "direct"
            return _mixed([(replace(self.contents.asked[kind], count=1.0), self._sampled(kind))])
        if not sampling.cod + sampling.dd:
            return None
        counts: dict[Kind, float] = {"cod": sampling.cod / (sampling.cod + sampling.dd), "dd": 1.0}
        return _mixed([(replace(self.contents.asked[kind], count=count), self._sampled(kind))
                       for kind, count in counts.items()])  # fmt: skip

    def _turns(self) -> tuple[float, float, float]:
        """A caption in five steps as a conversation: each turn has a prompt of its own."""
        asked = self.contents.asked["cod"]
        return len(COD_TURNS) * asked.text, asked.image, self._sampled("cod")

    def _state(self, stage: StageConfig) -> float:
        """Bytes of weights and adapters, and of gradients and AdamW's two moments of what trains."""
        trained, adapted = (sum(self.shape.parts[part] for part in parts) for parts in (stage.trained, stage.adapted))
        held = QUANTIZED_BYTES if stage.lora_4bit else self.weight_bytes
        moment = 1 if stage.optimizer == "adamw_8bit" else self.weight_bytes
        beside = stage.lora_rank * sum(self.shape.sides[part] for part in stage.adapted)
        whole = self.weight_bytes * (self.shape.parameters - adapted + beside) + held * adapted
        return whole + (self.weight_bytes + 2 * moment) * (trained + beside)

    def _activations(self, stage: StageConfig, length: float, image: float, new: float) -> float:
        """Bytes that a micro-batch of mean rows leaves for the backward pass."""
        shape = self.shape
        kept = self._kept(shape.layers) * length * shape.width
        if stage.vision_lr > 0:
            kept += self._kept(shape.vision_layers) * image * shape.work.positions * shape.vision_width
        logits = LOGIT_COPIES * 4 * new * shape.vocabulary
        return stage.micro_batch_size * (self.bytes * kept + logits)

    def _kept(self, layers: int) -> float:
        """Numbers kept of a token's feature; computed again, they are those of one layer and the others' inputs."""
        return ACTIVATIONS + layers if self.recipe.model.gradient_checkpointing else ACTIVATIONS * layers

    # Sampling.

    def _sampled(self, kind: Kind) -> float:
        return self.contents.asked[kind].new(self.recipe.sampling.max_new_tokens)

    def _self_data(self, g: int) -> Iterator[PlannedStep]:
        sampled = self._pools(g, "generate")
        yield from sampled.values()
        yield from self._curating(g, "curate", sampled, g if self.recipe.sampling.pooled else 1)

    def _items(self) -> dict[Group, float]:
        return {"caption": self.contents.captions, "reasoning": self.contents.questions}

    def _pools(self, g: int, name: str, share: float = 1.0, most: int | None = None) -> dict[Group, PlannedStep]:
        """Pools of a share of the items, with at most so many candidates of a kind."""
        pools: dict[Group, PlannedStep] = {}
        for group, kinds in GROUPS.items():
            numbers = {kind: getattr(self.recipe.sampling, kind) for kind in kinds}
            counts = {kind: min(count, most or count) for kind, count in numbers.items() if count}
            items = self._items()[group]
            if counts and items:
                per_picture = len(counts) * items / max(self.contents.captions, 1.0)
                pools[group] = self._pool(g, f"{name}-{group}", share * items, per_picture, counts)
        return pools

    def _curating(self, g: int, name: str, sampled: Mapping[Group, PlannedStep], rounds: int = 1,
                  share: float = 1.0) -> Iterator[PlannedStep]:  # fmt: skip
        yield from self._embedding(g, sampled)
        text = sum(POOL_BYTES * step.samples + TOKEN_BYTES * step.new_tokens for step in sampled.values())
        items = share * sum(self._items()[group] for group in sampled)
        yield PlannedStep(g, name, items, disk=POOL_COPIES * rounds * text)

    def _preference(self, g: int) -> Iterator[PlannedStep]:
        """The steps of `preferences.preference_tuned`; every item is taken to give a pair."""
        config, images = self.recipe.preference, self.contents.captions
        share = min(config.images / images, 1.0) if config.images and images else 1.0
        sampled = self._pools(g, "preference-generate", share)
        items = share * sum(self._items()[group] for group in sampled)
        yield PlannedStep(g, "preference-items", items)
        yield from sampled.values()
        yield from self._curating(g, "preference-curate", sampled, share=share)
        if config.rejected == "corrupted":
            yield PlannedStep(g, "preference-corrupt", items, disk=items * self.contents.picture_bytes)
            yield from self._pools(g, "preference-reject", share, 1).values()
        yield PlannedStep(g, "preference-pairs", items)
        if self.recipe.generators == "mixed":
            yield self._preferring(g, "preference", tuple(sampled), share)
        else:
            names: dict[Group, str] = {"caption": "perception", "reasoning": "reasoning"}
            yield from (self._preferring(g, f"preference-{names[group]}", (group,), share) for group in sampled)

    def _preferring(self, g: int, name: str, groups: tuple[Group, ...], share: float) -> PlannedStep:
        """Pairs of two responses each; the reference reads every pair once before."""
        stage, sampling, work = self.recipe.preference, self.recipe.sampling, self.shape.work
        kinds = [(kind, self._items()[group] * getattr(sampling, kind)) for group in groups for kind in GROUPS[group]]
        text, image, new = _mixed([(replace(self.contents.asked[kind], count=count), self._sampled(kind))
                                   for kind, count in kinds]) or (0.0, 0.0, 0.0)  # fmt: skip
        rows, read = 2.0 * stage.steps * stage.batch_size, 2 * share * sum(self._items()[group] for group in groups)
        flops = self._trained_flops(stage, rows, text, image, new)
        flops += work.sampling(read * (text + image), read * image, read * new)
        state = self._state(stage)
        activations = 2 * self._activations(stage, text + image + new, image, new)
        return PlannedStep(g, name, rows, rows * (text + image), rows * image, rows * new, flops, state + activations,
                           state, self.price.hours(flops), SAVED_BYTES * self.shape.parameters)  # fmt: skip

    def _pool(self, g: int, name: str, items: float, per_picture: float, counts: Mapping[Kind, int]) -> PlannedStep:
        """`per_picture`: requests about a picture."""
        asked, sampling = self.contents.asked, self.recipe.sampling
        image = items * sum(asked[kind].image for kind in counts)
        prompt = image + items * sum(asked[kind].text for kind in counts)
        new = items * sum(count * self._sampled(kind) for kind, count in counts.items())
        candidates = items * sum(counts.values())
        longest = max(asked[kind].text + asked[kind].image for kind in counts) + sampling.max_new_tokens
        memory = self._sampling_memory(sampling.batch_size * max(counts.values()), longest)
        share = encoded_share(items * len(counts), per_picture, sampling.batch_size)
        step = PlannedStep(g, name, candidates, prompt, image, new, memory=memory,
                           disk=POOL_BYTES * candidates + TOKEN_BYTES * new)  # fmt: skip
        return self._sampling(step, share * image)

    def _sampling(self, step: PlannedStep, encoded: float) -> PlannedStep:
        """With its FLOPs and hours; `encoded`: image tokens that the vision tower makes."""
        read = self.shape.work.sampling(step.prompt_tokens, encoded, 0)
        drawn = self.shape.work.sampling(0, 0, step.new_tokens)
        return replace(step, flops=read + drawn, hours=self.price.hours(read, drawn))

    def _sampling_memory(self, rows: float, longest: float) -> float:
        """Bytes of the weights, the key/value cache of all rows of a batch at full length, and a step's logits."""
        shape = self.shape
        return self.bytes * (shape.parameters + rows * longest * shape.cached) + 4 * rows * shape.vocabulary

    def _embedding(self, g: int, sampled: Mapping[Group, PlannedStep]) -> Iterator[PlannedStep]:
        """Final texts: a plain caption's or answer's length each, all taken for different."""
        config, plain = self.recipe.curation, {"caption": "dd", "reasoning": "direct"}
        groups = [group for group in sampled if "similarity" in compared_by(config, group)]
        if config.encoder == "lexical":
            return
        for group in groups:
            tokens = sampled[group].samples * self._sampled(plain[group])  # type: ignore[arg-type]
            flops = 2.0 * self._encoder_parameters() * tokens
            yield PlannedStep(g, "embed", sampled[group].samples, tokens, flops=flops,
                              hours=self.price.hours(flops))  # fmt: skip

    def _encoder_parameters(self) -> int:
        from sicog_exp.curation.similarity import encoder_source

        return encoder_parameters(encoder_source(self.recipe.curation.encoder))

    def _evaluation(self, g: int, name: str, tasks: Sequence[Asked]) -> PlannedStep:
        config, asked = self.recipe.evaluation, self.contents.asked
        questions = sum(task.questions for task in tasks)
        image = sum(task.questions * asked[task.kind].image for task in tasks)
        prompt = image + sum(task.questions * asked[task.kind].text for task in tasks)
        new = sum(task.questions * asked[task.kind].new(self._limit(task)) for task in tasks)
        longest = max(asked[task.kind].text + asked[task.kind].image + self._limit(task) for task in tasks)
        shares = [encoded_share(task.questions, task.per_picture, config.batch_size) for task in tasks]
        encoded = sum(share * task.questions * asked[task.kind].image for share, task in zip(shares, tasks))
        step = PlannedStep(g, name, questions, prompt, image, new, disk=SCORED_BYTES * questions,
                           memory=self._sampling_memory(config.batch_size, longest))  # fmt: skip
        return self._sampling(step, encoded)

    def _limit(self, task: Asked) -> int:
        return min(task.max_new_tokens or self.recipe.evaluation.max_new_tokens, self.recipe.evaluation.max_new_tokens)

    # What was taken for given.

    def assumptions(self) -> Iterator[str]:
        shape, price, recipe = self.shape, self.price, self.recipe
        parts = ", ".join(f"{part} {count / 1e6:,.2f} M" for part, count in shape.parts.items())
        yield (f"model {shape.name}: {parts} "
               f"parameters; {shape.image_tokens} tokens an image")  # fmt: skip
        yield from self.contents.notes
        yield ("candidates and answers are as long as annotated responses of their kind, cut at "
               f"sampling.max_new_tokens ({recipe.sampling.max_new_tokens}) and evaluation.max_new_tokens "
               f"({recipe.evaluation.max_new_tokens})")  # fmt: skip
        for task in self.tasks:
            how = "" if task.known else " (assumed; plan.benchmark_questions)"
            yield f"{task.task}: {task.questions:,.0f} questions, answered in the form {task.kind}{how}"
        yield ("FLOPs: 2 a parameter and position forward, 4 more where it trains (Kaplan et al. 2020); a prompt is "
               "read once for all its candidates; attention's quadratic term is left out")  # fmt: skip
        yield (f"device {price.device}: {price.of.peak:.3g} FLOP/s ({price.of.source}); {price.utilisation:.0%} of it "
               f"used in training and to read prompts, {price.sampling_utilisation:.0%} to draw tokens")  # fmt: skip
        yield (f"memory: {recipe.model.precision}, gradients and AdamW's two moments of what trains, activations of "
               f"one micro-batch of mean rows at {ACTIVATIONS} numbers a token, layer and feature (Korthikanti et al. "
               f"2022){', computed again' if recipe.model.gradient_checkpointing else ''}; key/value caches at full "
               "length; no libraries")  # fmt: skip
        if recipe.stop.no_gain or recipe.stop.collapse or recipe.stop.budget_flops:
            yield "all iterations run: no stop rule ends them"
        if recipe.curation.encoder != "lexical" and not self._encoder_parameters():
            yield f"curation.encoder={recipe.curation.encoder} is not at hand: its compute is left out"


def encoded_share(requests: float, per_picture: float, batch: int) -> float:
    """Of the pictures that requests show, the share that is encoded: once a batch for all prompts that show it.

    Requests about one picture fall into batches at random: they are sorted by length.
    """
    if not requests or per_picture <= 1:
        return 1.0
    taken = min(batch / requests, 1.0)
    return (1 - (1 - taken) ** per_picture) / (per_picture * taken)


def _mixed(rows: list[tuple[Rows, float]]) -> tuple[float, float, float] | None:
    """Mean (text, image, response) tokens over (rows, mean response) pairs, by their counts."""
    total = sum(one.count for one, _ in rows)
    if not total:
        return None
    lengths = [(one.count, (one.text, one.image, new)) for one, new in rows]
    text, image, new = (sum(count * length[i] for count, length in lengths) / total for i in range(3))
    return text, image, new
