from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sicog_exp.models.loading import EMBEDDED_BASE
from sicog_exp.models.vllm_names import vllm_folder


def test_the_tower_gets_the_longer_names_and_nothing_else_changes(tmp_path: Path) -> None:
    folder = vllm_folder(EMBEDDED_BASE, tmp_path / "copy")
    before, after = (load_file(path / "model.safetensors") for path in (EMBEDDED_BASE, folder))
    names = {name.replace("vision_tower.", "vision_tower.vision_model."): value for name, value in before.items()}
    assert names.keys() == after.keys()
    assert all(torch.equal(names[name], after[name]) for name in names)
    assert (folder / "config.json").read_bytes() == (EMBEDDED_BASE / "config.json").read_bytes()
    assert vllm_folder(folder, tmp_path / "again") == folder, "names that vllm reads are left alone"


def test_shards_and_their_index(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"vision_config": {"model_type": "siglip_vision_model"}}')
    name = "model.vision_tower.encoder.layers.0.weight"
    save_file({name: torch.ones(3), "lm_head.weight": torch.zeros(2)}, model / "model-1.safetensors")
    index = f'{{"metadata": {{}}, "weight_map": {{"{name}": "model-1.safetensors"}}}}'
    (model / "model.safetensors.index.json").write_text(index)
    folder = vllm_folder(model, tmp_path / "copy")
    longer = "model.vision_tower.vision_model.encoder.layers.0.weight"
    assert load_file(folder / "model-1.safetensors").keys() == {longer, "lm_head.weight"}
    assert longer in (folder / "model.safetensors.index.json").read_text()


def test_other_towers_keep_their_names(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"vision_config": {"model_type": "internvl_vision"}}')
    save_file({"vision_tower.encoder.layer.0.weight": torch.ones(3)}, model / "model.safetensors")
    assert vllm_folder(model, tmp_path / "copy") == model
