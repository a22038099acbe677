"""One SIcog run (arXiv 2503.12303, section 3): develop, generate, curate, pre-train, instruct, evaluate, repeat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field, replace
from typing import Any

from sicog_exp.cleandata import check_step, without_overlaps, without_repeated_texts
from sicog_exp.origins import base_step, data_step
from sicog_exp.preferences import preference_tuned
from sicog_exp.prompts import Kind
from sicog_exp.recipe import EngineConfig, EvaluationConfig, ModelConfig, Recipe, StageConfig
from sicog_exp.runner import Runner
from sicog_exp.selfdata import GROUPS, Group, PoolTask, SelfDataModule, check_truth
from sicog_exp.stopping import decides_by_scores, reason_to_stop
from sicog_exp.store import Artifact, Step, Workplace

EVALUATION_REVISION = 1


@dataclass(frozen=True)
class Generation:
    """A model of the lineage and its scores; on the development split too, where a stop rule decides by them."""

    index: int
    model: Artifact
    scores: Artifact
    development: Artifact | None = None


@dataclass(frozen=True)
class Lineage:
    """What a run made, in order; `curated[i]` is what generation i + 1 was pre-trained on. `stopped` says why it ended
    before its last iteration, "" where it did not."""

    data: Artifact
    generations: list[Generation]
    curated: list[Artifact]
    stopped: str = ""


def iterate(recipe: Recipe, runner: Runner) -> Lineage:
    """Run the whole recipe; a finished step is read from the store, a killed one goes on."""
    data = runner.run(data_step(recipe))
    check_truth(recipe, data)
    checked = runner.run(check_step(recipe, data))
    clean = without_overlaps(recipe, data, checked, runner.run)
    base = runner.run(base_step(recipe))
    parts = raw_parts(runner, recipe, base)
    ready = align(runner, recipe, base, clean) if recipe.model.language else base  # its projector has learned nothing
    model = fine_tune(runner, recipe, "instruct", recipe.instruct, ready, clean, instruction_shares(recipe))
    lineage = Lineage(data, [scored(runner, recipe, 0, model, data)], [])
    pools: list[Artifact] = []
    for index in range(recipe.iterations):
        current = lineage.generations[-1]
        runner.generation = index + 1
        start = current.model if recipe.start == "previous" else parts
        aligned = align(runner, recipe, start, clean)
        if recipe.self_data:
            generators = develop(runner, recipe, current.model, clean)
            generators = preference_tuned(recipe, generators, clean, checked, index, runner.run)
            self_data = self_data_module(recipe, index, aligned, clean, generators, pools, runner)
            self_data.prepare_data()
            pools = self_data.pools if recipe.sampling.pooled else []
            lineage.curated.append(self_data.inputs["curated"])
            self_data.inputs["curated"] = without_repeated_texts(recipe, lineage.curated[-1], checked, runner.run)
            pretrained = pretrain(runner, recipe, self_data)
        else:
            pretrained = pretrain_annotated(runner, recipe, aligned, clean)
        model = fine_tune(runner, recipe, "instruct", closing(recipe), pretrained, clean, instruction_shares(recipe))
        lineage.generations.append(scored(runner, recipe, index + 1, model, data))
        reason = reason_to_stop(recipe, lineage, runner.done)
        if reason:
            return replace(lineage, stopped=reason)
    return lineage


# The stages.


def raw_parts(runner: Runner, recipe: Recipe, base: Artifact) -> Artifact:
    """What every generation is rebuilt from: the base as it is, or with a new projector (`start: parts`)."""
    from sicog_exp.training import stages

    if recipe.start != "parts":
        return base
    task = stages.PartsTask(recipe.seed, recipe.model.trust_remote_code)
    return runner.run(Step("parts", stages.raw_parts, task, {"model": base}, recipe.seed, stages.REVISION))


def develop(runner: Runner, recipe: Recipe, model: Artifact, data: Artifact) -> Mapping[Group, Artifact]:
    """The data generators: the current generation, post-trained on the annotations (paper.md, stage 0)."""
    shares = {"annotated": 1.0}
    if recipe.generators == "mixed":
        generator = fine_tune(runner, recipe, "develop", recipe.develop, model, data, shares)
        return dict.fromkeys(GROUPS, generator)
    names: dict[Group, str] = {"caption": "develop-perception", "reasoning": "develop-reasoning"}
    return {group: fine_tune(runner, recipe, name, recipe.develop, model, data, shares, GROUPS[group])
            for group, name in names.items()}  # fmt: skip


def align(runner: Runner, recipe: Recipe, model: Artifact, data: Artifact) -> Artifact:
    """Fit the projector to captions (paper.md, stage 1)."""
    return fine_tune(runner, recipe, "align", recipe.align, model, data, align_shares(recipe), GROUPS["caption"])


def pretrain(runner: Runner, recipe: Recipe, self_data: SelfDataModule) -> Artifact:
    """Multimodal pre-training on the curated mixture (paper.md, stage 1.5)."""
    from sicog_exp.training import stages

    if recipe.pretrain.steps == 0:
        return self_data.inputs["model"]

    def run(task: Any, inputs: Mapping[str, Artifact], workplace: Workplace) -> None:
        stages.pretrain(self_data, workplace)

    return runner.run(Step("pretrain", run, self_data.task, self_data.inputs, recipe.seed, stages.REVISION))


def pretrain_annotated(runner: Runner, recipe: Recipe, model: Artifact, data: Artifact) -> Artifact:
    """The control's pre-training: annotated and text rows alone, for the same number of steps."""
    from sicog_exp.training import stages

    if recipe.pretrain.steps == 0:
        return model
    inputs = {"model": model, "data": data}
    return runner.run(Step("pretrain", stages.fine_tune, mixture_task(recipe), inputs, recipe.seed, stages.REVISION))


def fine_tune(runner: Runner, recipe: Recipe, name: str, stage: StageConfig, model: Artifact, data: Artifact,
              shares: Mapping[str, float], kinds: tuple[Kind, ...] | None = None) -> Artifact:  # fmt: skip
    """A supervised stage; one of 0 steps is left out."""
    from sicog_exp.training import stages

    if stage.steps == 0:
        return model
    task = training_task(recipe, stage, shares, kinds)
    return runner.run(Step(name, stages.fine_tune, task, {"model": model, "data": data}, recipe.seed, stages.REVISION))


def closing(recipe: Recipe) -> StageConfig:
    """The instruct stage of generations after G0."""
    steps = recipe.closing_steps
    return recipe.instruct if steps is None else replace(recipe.instruct, steps=steps)


def training_task(recipe: Recipe, stage: StageConfig, shares: Mapping[str, float],
                  kinds: tuple[Kind, ...] | None = None) -> Any:  # fmt: skip
    from sicog_exp.prompts import KINDS
    from sicog_exp.training.stages import TrainingTask

    return TrainingTask(stage, recipe.model, dict(shares), recipe.seed, kinds or KINDS, recipe.data.max_pixels)


def align_shares(recipe: Recipe) -> dict[str, float]:
    return {"alignment": 1.0} if recipe.data.alignment else {"annotated": 0.5, "instruction": 0.5}


def instruction_shares(recipe: Recipe) -> dict[str, float]:
    return {"annotated": 1 - recipe.replay, "instruction": recipe.replay * 0.8, "text": recipe.replay * 0.2}


def mixture_shares(recipe: Recipe) -> dict[str, float]:
    """The pre-training mixture; without self-data its share goes to the annotated rows, text keeps its own."""
    mixture = recipe.mixture
    if recipe.self_data:
        return asdict(mixture)
    return {"text": mixture.text, "annotated": sum(astuple(mixture)) - mixture.text}


def mixture_task(recipe: Recipe) -> Any:
    """Pre-training's task: the mixture and its caps."""
    return replace(training_task(recipe, recipe.pretrain, mixture_shares(recipe)), caps=recipe.caps)


def self_data_module(
    recipe: Recipe, iteration: int, model: Artifact, data: Artifact, generators: Mapping[Group, Artifact],
    pools: list[Artifact], runner: Runner,
) -> SelfDataModule:  # fmt: skip
    pool = PoolTask(recipe.sampling, recipe.model, "caption", iteration, recipe.seed, recipe.data.max_pixels,
                    recipe.engine)  # fmt: skip
    return SelfDataModule(pool, recipe.curation, mixture_task(recipe), model, data, generators, pools, runner.run)


@dataclass(frozen=True)
class EvaluationTask:
    """What scores depend on besides model and data; `benchmarks` is what the suite holds now, not its name."""

    evaluation: EvaluationConfig
    model: ModelConfig
    benchmarks: Mapping[str, str]
    max_pixels: int
    engine: EngineConfig = field(default_factory=EngineConfig)


def scored(runner: Runner, recipe: Recipe, index: int, model: Artifact, data: Artifact) -> Generation:
    """A generation with its scores. What the stop rule decides by is never the benchmark."""
    scores = evaluate(runner, recipe, "evaluate", model, data)
    if not decides_by_scores(recipe, index):
        return Generation(index, model, scores)
    if recipe.evaluation.split == "development":
        return Generation(index, model, scores, development=scores)
    own = replace(recipe, evaluation=replace(recipe.evaluation, split="development"))
    return Generation(index, model, scores, evaluate(runner, own, "evaluate-development", model, data))


def evaluate(runner: Runner, recipe: Recipe, name: str, model: Artifact, data: Artifact) -> Artifact:
    """Score a generation through lmms-eval."""
    from sicog_exp.evaluation.suites import suite_state

    benchmarks = suite_state(recipe.evaluation.suite, recipe.evaluation.judge)
    task = EvaluationTask(recipe.evaluation, recipe.model, benchmarks, recipe.data.max_pixels,
                          recipe.engine.of_evaluation)  # fmt: skip
    inputs = {"model": model, "data": data}
    return runner.run(Step(name, run_evaluation, task, inputs, recipe.seed, EVALUATION_REVISION))


def run_evaluation(task: EvaluationTask, inputs: Mapping[str, Artifact], workplace: Workplace) -> None:
    """Score the model; a killed evaluation goes on with the answers that it had."""
    from sicog_exp.evaluation import benchmarks
    from sicog_exp.evaluation.answers import KeptAnswers
    from sicog_exp.evaluation.suites import load_suite
    from sicog_exp.generation.engines import open_engine

    suite = load_suite(task.evaluation.suite)
    with open_engine(inputs["model"].path, task.model, task.engine, task.max_pixels) as opened:
        kept = KeptAnswers(opened.engine, workplace.scratch, inputs["model"].content)
        scores = benchmarks.evaluate(kept, suite, inputs["data"].path, task.evaluation, workplace.directory,
                                     task.evaluation.split, workplace)  # fmt: skip
    workplace.device = opened.device
    workplace.add(samples=sum(score.n for score in scores.tasks.values()),
                  model_seconds=opened.engine.busy_seconds + kept.kept_seconds, **opened.halvings,
                  **opened.work.of_sampling(kept.counted))  # fmt: skip
