"""Training on two devices: the step is the one of a single process, and so are its account and its checkpoints."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_fit import folder  # noqa: F401 - a fixture

from sicog_exp.interruption import Terminated
from sicog_exp.recipe import ModelConfig, StageConfig
from sicog_exp.store import Artifact, Progress, Step, Store
from sicog_exp.training.launch import LaunchError
from sicog_exp.training.stages import TrainingTask, fine_tune

STEPS = 4
COUNTED = ("samples", "tokens", "prompt_tokens", "image_tokens", "new_tokens", "steps")


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


def check_same(found: Artifact, alone: Artifact, model: Path, flops: float = 1.0) -> None:
    before, wanted = load_file(model / "model.safetensors"), weights(alone)
    assert max(float((wanted[name] - before[name]).abs().max()) for name in wanted) > 1e-3
    assert weights(found).keys() == wanted.keys()
    for name, value in weights(found).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=2e-5, msg=lambda text, name=name: name + text)
    assert {name: found.facts[name] for name in COUNTED} == {name: alone.facts[name] for name in COUNTED}
    assert found.facts["flops"] == flops * alone.facts["flops"]
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
    check_same(store.run(sharded), alone, tiny_model, flops=8 / 6)  # activations are computed twice
    assert not checkpoint.exists()


def stopping() -> Progress:
    """Stands for a signal that arrives while ranks train."""

    def progress(done: int, total: int) -> None:
        raise Terminated("now")

    return progress


SRUN = """#!/bin/sh
# Stands for SLURM's: one task a node, here all on one machine.
echo "$@" >> "$0.said"
while [ "${1#--}" != "$1" ]; do shift; done
exec 3<&0
"$@" <&3 & first=$!
"$@" <&3 & second=$!
wait $first && wait $second
"""


def test_two_machines_train_adapters_as_one_process(tiny_model: Path, folder: Path, tmp_path: Path,  # noqa: F811
                                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Two torchruns meet, with one rank each; no cluster was at hand, so that `srun` itself is not tried here."""
    srun = tmp_path / "srun"
    srun.write_text(SRUN)
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    changes = {"lora_rank": 2, "vision_lr": 0.0, "language_lr": 1e-2}
    machines = ModelConfig(device="cpu", threads=1, nodes=2, strategy="fsdp")
    found = Store(tmp_path / "two").run(step(tiny_model, folder, machines, **changes))
    one = step(tiny_model, folder, ModelConfig(device="cpu", threads=1), **changes)
    check_same(found, Store(tmp_path / "one").run(one), tiny_model)
    (said,) = (tmp_path / "srun.said").read_text().splitlines()
    assert said.startswith("--nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=1 ")


def test_what_a_rank_says_is_what_the_step_says(tiny_model: Path, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """The rows of the step that broke are kept by every rank."""
    wild = step(tiny_model, folder, two("ddp"), language_lr=1e30, clip_norm=1e30)
    with pytest.raises(LaunchError, match=r"training step [1-3]: loss (nan|inf).*nothing of it is applied; its rows"):
        Store(tmp_path).run(wild)
    kept = sorted(tmp_path.glob("*.partial/scratch/diverged-*.json"))
    assert [path.stem[-1] for path in kept] == ["0", "1"]
    rows = [json.loads(path.read_text())["rows"] for path in kept]
    assert all(len(own) == 2 and {name[0] for name in own} <= {"a", "t"} for own in rows)
