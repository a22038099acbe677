"""Fixtures for all tests: one small model, built once a session."""

from __future__ import annotations

import os
import sys

# before torch starts its threads; the tests also run beside other work
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small LLaVA and its processor that answers in the forms of the built-in world."""
    from tiny import build

    return build(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder, output) of one `mlflow run . -e iterate` of the tiny recipe; the folder holds mlflow.db and store/."""
    from runs import finish

    folder = tmp_path_factory.mktemp("run")
    mlflow = str(Path(sys.executable).with_name("mlflow"))
    overrides = f"model.base={tiny_model} store={folder}/store"
    command = [mlflow, "run", ".", "-e", "iterate", "--env-manager=local", "--experiment-name", "end-to-end",
               "-P", "recipe=tests/tiny.yaml", "-P", f"overrides={overrides}"]  # fmt: skip
    return folder, finish(command, folder)


@pytest.fixture(scope="session")
def world_images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Twelve pictures of the built-in world as PNG files."""
    from PIL import Image

    from sicog_exp.data.scenes import make_scene, render

    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{i}.png" for i in range(12)]
    for i, path in enumerate(paths):
        Image.fromarray(render(make_scene(7, "development", i), 7)).save(path)
    return paths
