"""What would stop a run late is said at its start: device, benchmarks, encoder and tracking store are tried first."""

from __future__ import annotations

from sicog_exp.recipe import ModelConfig, Recipe, RecipeError


def check_ahead(recipe: Recipe) -> None:
    """Raises an error for users naming the key and the fix."""
    check_device(recipe.model)
    check_benchmarks(recipe)
    check_encoder(recipe)
    from sicog_exp.tracking import check_tracking

    check_tracking(recipe.tracking)


def check_device(model: ModelConfig) -> None:
    import torch

    if model.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("model.device=cuda: torch sees no GPU here; use model.device=auto or cpu, or mend the driver "
                          "(`sicog doctor` shows what torch sees)")  # fmt: skip


def check_benchmarks(recipe: Recipe) -> None:
    """That the suite and its tasks for the recipe's split exist, and those that the stop rule decides by."""
    from sicog_exp.evaluation.benchmarks import BenchmarkError, check_suite

    check_suite(recipe.evaluation.suite, recipe.evaluation.split)
    if recipe.stop.no_gain:
        try:
            check_suite(recipe.evaluation.suite, "development")
        except BenchmarkError as error:
            raise RecipeError(f"stop.no_gain=true decides by development tasks, and {error}; or leave stop.no_gain "
                              "out") from None  # fmt: skip


def check_encoder(recipe: Recipe) -> None:
    """That a model named by the user loads; the packaged ones do."""
    from sicog_exp.curation.similarity import build_encoder

    if recipe.self_data and recipe.curation.encoder not in ("lexical", "minilm"):
        build_encoder(recipe.curation.encoder)
