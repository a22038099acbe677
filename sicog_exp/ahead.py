"""What would stop a run late is said at its start: device, benchmarks, encoder and tracking store are tried first."""

from __future__ import annotations

import os
import shutil

from sicog_exp.recipe import EngineConfig, ModelConfig, Recipe, RecipeError


def check_ahead(recipe: Recipe) -> None:
    """Raises an error for users naming the key and the fix."""
    check_device(recipe.model)
    check_engine(recipe.engine)
    check_packages(recipe)
    check_benchmarks(recipe)
    check_encoder(recipe)
    from sicog_exp.tracking import check_tracking

    check_tracking(recipe.tracking)


def check_device(model: ModelConfig) -> None:
    import torch

    if model.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("model.device=cuda: torch sees no GPU here; use model.device=auto or cpu, or mend the driver "
                          "(`sicog doctor` shows what torch sees)")  # fmt: skip
    seen = torch.cuda.device_count()
    if model.torch_device == "cuda" and model.devices > seen:
        raise RecipeError(f"model.devices={model.devices}: torch sees {seen} here; lower it, or set "
                          "CUDA_VISIBLE_DEVICES")  # fmt: skip
    given = int(os.environ.get("SLURM_JOB_NUM_NODES", "0"))
    if model.nodes > 1 and (given < model.nodes or not shutil.which("srun")):
        raise RecipeError(f"model.nodes={model.nodes}: needs `srun` and a SLURM job with as many nodes, and this "
                          + (f"one has {given}" if given else "is none")
                          + "; submit it with `#SBATCH --nodes` (docs/cluster.md), or set model.nodes=1")  # fmt: skip


def check_engine(engine: EngineConfig) -> None:
    """That the packages which the engine needs are there; whether a server serves a generation is asked when it is."""
    from importlib.util import find_spec

    needed = {"vllm": engine.kind == "vllm", "openai": engine.kind == "openai", "ray": engine.workers > 0}
    for package, wanted in needed.items():
        if wanted and find_spec(package) is None:
            key = f"engine.workers={engine.workers}" if package == "ray" else f"engine.kind={package}"
            raise RecipeError(f"{key}: needs the {package} package (`pip install 'sicog-exp[{package}]'`); leave the "
                              "key out elsewhere")  # fmt: skip


def check_packages(recipe: Recipe) -> None:
    """That what keys ask for beyond our dependencies is there."""
    from transformers.utils import is_bitsandbytes_available, is_flash_attn_2_available

    if recipe.model.attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise RecipeError("model.attention=flash_attention_2: needs a GPU and the flash-attn package (`pip install "
                          "flash-attn`); model.attention=sdpa works everywhere")  # fmt: skip
    stages = {name: getattr(recipe, name) for name in ("develop", "preference", "align", "pretrain", "instruct")}
    for name, stage in stages.items():
        key = "optimizer=adamw_8bit" if stage.optimizer == "adamw_8bit" else "lora_4bit=true" * stage.lora_4bit
        usable = is_bitsandbytes_available() and recipe.model.torch_device == "cuda"
        if key and stage.steps and not usable:
            raise RecipeError(f"{name}.{key}: needs a GPU and the bitsandbytes package (`pip install bitsandbytes`); "
                              "leave the key out elsewhere")  # fmt: skip


def check_benchmarks(recipe: Recipe) -> None:
    """That the suite, its tasks for the recipe's split and what they need exist, and what the stop rule decides by."""
    from sicog_exp.evaluation.ready import check_suite
    from sicog_exp.evaluation.suites import BenchmarkError

    suite, judge = recipe.evaluation.suite, recipe.evaluation.judge
    check_suite(suite, recipe.evaluation.split, judge)
    if recipe.stop.no_gain:
        try:
            check_suite(suite, "development", judge)
        except BenchmarkError as error:
            raise RecipeError(f"stop.no_gain=true decides by development tasks, and {error}; or leave stop.no_gain "
                              "out") from None  # fmt: skip


def left_out(recipe: Recipe) -> str:
    """What of the suite the run will not score, in a sentence; empty where that is nothing."""
    from sicog_exp.evaluation.suites import load_suite

    names = load_suite(recipe.evaluation.suite).judged(recipe.evaluation.split)
    if recipe.evaluation.judge or not names:
        return ""
    return f"Left out of suite {recipe.evaluation.suite}: {', '.join(names)}, which a judge model scores; " \
           "evaluation.judge=true asks for it."


def check_encoder(recipe: Recipe) -> None:
    """That a model named by the user loads; the packaged ones do."""
    from sicog_exp.curation.similarity import build_encoder

    if recipe.self_data and recipe.curation.encoder not in ("lexical", "minilm"):
        build_encoder(recipe.curation.encoder)
