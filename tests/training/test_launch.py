"""Training on two devices: the step is the one of a single process, and so are its account and its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_fit import folder  # noqa: F401 - a fixture

from sicog_exp.interruption import Terminated
from sicog_exp.recipe import ModelConfig, StageConfig
from sicog_exp.store import Artifact, Progress, Step, Store
from sicog_exp.training.stages import TrainingTask, fine_tune

STEPS = 4
COUNTED = ("samples", "tokens", "prompt_tokens", "image_tokens", "new_tokens", "steps", "flops")


def step(model: Path, data: Path, machine: ModelConfig, **changes: Any) -> Step:
    """A stage that starts as a new model does, so that a wrong gradient shows; half of its rows are text alone."""
    config = StageConfig(steps=STEPS, batch_size=4, micro_batch_size=1, max_length=512, checkpoint_every=2,
                         **{"vision_lr": 1e-3, "projector_lr": 1e-3, "language_lr": 1e-3, **changes})  # fmt: skip
    task = TrainingTask(config, machine, {"annotated": 0.5, "text": 0.5}, 3)
    inputs = {name: Artifact(path, {"fingerprint": name}, True) for name, path in (("model", model), ("data", data))}
    return Step("develop", fine_tune, task, inputs, 3)


def two(strategy: Any, **changes: Any) -> ModelConfig:
    return ModelConfig(device="cpu", threads=1, devices=2, strategy=strategy, **changes)


def weights(artifact: Artifact) -> dict[str, torch.Tensor]:
    return load_file(artifact / "model.safetensors")


@pytest.fixture(scope="module")
def alone(tiny_model: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:  # noqa: F811
    store = Store(tmp_path_factory.mktemp("alone"))
    return store.run(step(tiny_model, folder, ModelConfig(device="cpu", threads=1)))


def check_same(found: Artifact, alone: Artifact, model: Path) -> None:
    before, wanted = load_file(model / "model.safetensors"), weights(alone)
    assert max(float((wanted[name] - before[name]).abs().max()) for name in wanted) > 1e-3
    assert weights(found).keys() == wanted.keys()
    for name, value in weights(found).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=2e-5, msg=lambda text, name=name: name + text)
    assert {name: found.facts[name] for name in COUNTED} == {name: alone.facts[name] for name in COUNTED}
    assert found.device == f"2 x {alone.device}"


def test_ddp_trains_as_one_process(tiny_model: Path, folder: Path, alone: Artifact, tmp_path: Path) -> None:  # noqa: F811
    shown: list[tuple[int, int]] = []
    found = Store(tmp_path).run(step(tiny_model, folder, two("auto")), lambda *at: shown.append(at))
    check_same(found, alone, tiny_model)
    assert shown[-1] == (STEPS, STEPS)


def test_fsdp_trains_as_one_process_over_an_interruption(tiny_model: Path, folder: Path, alone: Artifact,  # noqa: F811
                                                         tmp_path: Path) -> None:  # fmt: skip
    store, sharded = Store(tmp_path), step(tiny_model, folder, two("fsdp", gradient_checkpointing=True))
    with pytest.raises(Terminated):
        store.run(sharded, stopping())
    (checkpoint,) = tmp_path.glob("*.partial/scratch/step-*.ckpt")
    check_same(store.run(sharded), alone, tiny_model)
    assert not checkpoint.exists()


def stopping() -> Progress:
    """Stands for a signal that arrives while ranks train."""

    def progress(done: int, total: int) -> None:
        raise Terminated("now")

    return progress
