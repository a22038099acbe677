"""What a run begins with, as steps: its data set and its base model, whose identity is its files, never its path."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sicog_exp.hub import silence
from sicog_exp.recipe import DataConfig, Recipe, RecipeError
from sicog_exp.store import Artifact, Step, Workplace, file_checksum

MODEL_FILES = (".safetensors", ".json", ".jinja", ".txt", ".model")
"""What makes up a model: weights, configuration, tokenizer and processor; a card can be edited freely."""
DATA_REVISION = 3


@dataclass(frozen=True)
class DataTask:
    """The data set's configuration and what its sources hold now."""

    data: DataConfig
    state: Mapping[str, str]


def data_step(recipe: Recipe) -> Step:
    from sicog_exp.data.sources import build_dataset, source_state

    def run(task: DataTask, inputs: Mapping[str, Artifact], workplace: Workplace) -> None:
        build_dataset(task.data, workplace.directory, workplace.progress)

    config = replace(recipe.data, exclude_contaminated=True)  # which rows train is decided afterwards
    return Step("data", run, DataTask(config, source_state(recipe.data)), revision=DATA_REVISION)


def base_step(recipe: Recipe) -> Step:
    """The base model's files under the store's care; its identity is their content, never their path."""
    if recipe.model.language:
        return composed_step(recipe)
    files = model_files(base_folder(recipe))

    def run(task: Any, inputs: Mapping[str, Artifact], workplace: Workplace) -> None:
        import shutil

        for path in files:
            shutil.copyfile(path, workplace.directory / path.name)

    return Step("base", run, {"weights": digest(files)})


def composed_step(recipe: Recipe) -> Step:
    """A base made of a language model, a vision tower and a fresh projector."""
    language, vision = base_folders(recipe)

    def run(task: Any, inputs: Mapping[str, Artifact], workplace: Workplace) -> None:
        from sicog_exp.models.compose import compose, load_language, load_tower
        from sicog_exp.models.loading import save_model

        parts = load_language(str(language)), load_tower(str(vision))
        save_model(*compose(*parts, recipe.seed), workplace.directory)

    weights = {"language": digest(model_files(language)), "vision": digest(model_files(vision))}
    return Step("base", run, {"weights": weights}, seed=recipe.seed)


def model_files(place: Path) -> list[Path]:
    """What makes up a model in a folder, or the one file that holds it."""
    return [place] if place.is_file() else sorted(path for path in place.iterdir() if path.suffix in MODEL_FILES)


def digest(files: Sequence[Path]) -> str:
    return hashlib.sha256("".join(f"{p.name}:{file_checksum(p)};" for p in files).encode()).hexdigest()


def base_folders(recipe: Recipe) -> list[Path]:
    """Where the base comes from: its folder, or its parts' (a .gguf file stands for itself). Raises RecipeError."""
    model = recipe.model
    if not model.language:
        return [base_folder(recipe)]
    return [_folder(f"model.{key}", str(getattr(model, key))) for key in ("language", "vision")]


def base_folder(recipe: Recipe) -> Path:
    """The folder that holds the base model; a hub name is downloaded. Raises RecipeError."""
    return _folder("model.base", recipe.model.base)


def _folder(key: str, named: str) -> Path:
    from sicog_exp.models.loading import resolve_base

    name = resolve_base(named)
    if Path(name).is_dir() or (Path(name).is_file() and name.endswith(".gguf")):
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    silent = silence()
    try:
        return Path(snapshot_download(name, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack"],
                                      local_files_only=bool(silent)))  # fmt: skip
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        why = silent or error
        raise RecipeError(f"{key}={name}: neither a folder nor a model that the hub gave us ({why})") from None
