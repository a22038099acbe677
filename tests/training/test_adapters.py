# ruff: noqa: F811 - fixtures are named as they are imported
"""A stage with adapters: what it saves is a plain model, the same for the same seed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from test_fit import folder  # noqa: F401 - the data set of the stages' tests

from sicog_exp.models.loading import ModelSource, load_model
from sicog_exp.recipe import ModelConfig, StageConfig
from sicog_exp.store import Artifact, Workplace, checksums
from sicog_exp.training.stages import TrainingTask, fine_tune

HAS_GPU = torch.cuda.is_available()


def trained(model: Path, data: Path, out: Path, device: str = "cpu", **changes: object) -> Path:
    """One stage of four steps, by adapters beside the language model."""
    values = {"steps": 4, "batch_size": 4, "micro_batch_size": 4, "max_length": 512, "lora_rank": 4, **changes}
    task = TrainingTask(StageConfig(**values), ModelConfig(device=device, threads=1), {"annotated": 1.0}, 3)  # type: ignore[arg-type]
    inputs = {name: Artifact(path, {"fingerprint": name}, True) for name, path in (("model", model), ("data", data))}
    (out / "scratch").mkdir(parents=True)
    fine_tune(task, inputs, Workplace(out, out / "scratch"))
    shutil.rmtree(out / "scratch")  # as the store does
    return out


def test_a_stage_saves_a_plain_model(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    """Vision and projector train in full, the language model by its adapters: its embeddings stay."""
    out = trained(tiny_model, folder, tmp_path / "out")
    before, after = (load_model(ModelSource(str(path)))[0].state_dict() for path in (tiny_model, out))
    assert list(before) == list(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("vision_tower" in name for name in changed)
    assert "model.language_model.layers.0.mlp.down_proj.weight" in changed
    assert "model.language_model.embed_tokens.weight" not in changed


def test_the_same_seed_gives_the_same_bits(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    runs = [checksums(trained(tiny_model, folder, tmp_path / name)) for name in ("one", "two")]
    assert runs[0] == runs[1]


def test_another_alpha_is_another_model(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    """Twice the rank, if nothing is said."""
    weights = [checksums(trained(tiny_model, folder, tmp_path / str(alpha), lora_alpha=alpha))["model.safetensors"]
               for alpha in (8.0, 1.0, None)]  # fmt: skip
    assert weights[0] == weights[2] != weights[1]


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="weights in 4 bits need an NVIDIA GPU")
def test_adapters_beside_weights_in_4_bits(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    """What is saved is in full precision, changed where adapters were."""
    pytest.importorskip("bitsandbytes", reason="weights in 4 bits need bitsandbytes")
    out = trained(tiny_model, folder, tmp_path / "out", "cuda", lora_4bit=True)
    before, after = (load_model(ModelSource(str(path)))[0].state_dict() for path in (tiny_model, out))
    assert {name: value.dtype for name, value in before.items()} == {name: v.dtype for name, v in after.items()}
    assert not torch.equal(*(d["model.language_model.layers.0.mlp.down_proj.weight"] for d in (before, after)))
