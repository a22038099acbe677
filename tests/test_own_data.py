"""A user's own photographs and annotations through the whole command, bad rows included."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from families import build
from PIL import Image
from runs import finish, start

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket", "camera", "page", "text", "coins", "moon", "cell")
SMALL = ("develop.steps=2", "pretrain.steps=2", "instruct.steps=2", "model.threads=1", "model.device=cpu",
         "sampling.max_new_tokens=12", "sampling.batch_size=4", "evaluation.max_new_tokens=8",
         "evaluation.bootstrap=50", "curation.require_format=false", "curation.caption_threshold=0",
         "curation.reasoning_threshold=0", "data.max_bad_share=0.5")  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real photographs (those that scikit-image ships) and two annotation files with some bad rows."""
    import skimage.data

    folder = tmp_path_factory.mktemp("own")
    (folder / "photos").mkdir()
    names = []
    for name in PHOTOGRAPHS:
        try:
            pixels = np.asarray(getattr(skimage.data, name)())
        except Exception:  # a photograph that this release of scikit-image downloads
            continue
        Image.fromarray(pixels).save(folder / "photos" / f"{name}.png")
        names.append(f"photos/{name}.png")
    assert len(names) >= 6
    pools = folder / "unlabeled"
    pools.mkdir()
    for name in names[:3]:
        Image.open(folder / name).convert("RGB").rotate(90, expand=True).save(pools / f"turned-{Path(name).name}")
    (pools / "broken.png").write_bytes(b"\x89PNG not really")
    rows = [{"id": str(i), "image": name, "conversations": [
        {"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": Path(name).stem}]}
        for i, name in enumerate(names)]  # fmt: skip
    rows.append({"id": "bad", "image": names[0], "conversations": [{"from": "human", "value": "no placeholder"},
                                                                   {"from": "gpt", "value": "x"}]})  # fmt: skip
    (folder / "llava.json").write_text(json.dumps(rows))
    chat = [{"images": row["image"] and [row["image"]], "messages": [
        {"role": "user", "content": row["conversations"][0]["value"]},
        {"role": "assistant", "content": row["conversations"][1]["value"]}]} for row in rows]  # fmt: skip
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, chat)) + "\n{not json\n")
    return folder


def command(files: Path, annotated: str, model: Path, store: Path, *more: str) -> list[str]:
    given = [f"data.annotated={files / annotated}", f"data.unlabeled={files / 'unlabeled'}", f"model.base={model}",
             f"store={store}"]  # fmt: skip
    return [sys.executable, "-m", "sicog_exp.cli", "iterate", "experiments/own.yaml", *given, *SMALL, *more]


@pytest.mark.parametrize("annotated", ["llava.json", "chat.jsonl"])
def test_own_photographs_run_and_bad_rows_are_listed(
    annotated: str, files: Path, tiny_model: Path, tmp_path: Path
) -> None:
    printed = finish(command(files, annotated, tiny_model, tmp_path / "store"), tmp_path)
    assert "report.html" in printed
    listing = next((tmp_path / "store").glob("data-*/rejected.jsonl"))
    rejected = [json.loads(line) for line in listing.read_text().splitlines()]
    assert any("broken.png" in json.dumps(row) for row in rejected)
    assert all(row["reason"] and row["fix"] for row in rejected)
    assert any(annotated in row["file"] for row in rejected)


def test_one_line_puts_a_real_model_in_the_place_of_the_shipped_one(files: Path, tmp_path: Path) -> None:
    """A Qwen2.5-VL in everything but size; nothing but `model.base` names it."""
    model = build("qwen2_5_vl", tmp_path / "model").folder
    printed = finish(command(files, "llava.json", model, tmp_path / "store"), tmp_path)
    (said,) = re.findall(r"^other_base holds for .*", printed, re.MULTILINE)
    for line in ("model.precision=bf16-mixed", "pretrain.lora_rank=16", "develop.language_lr=0.0001",
                 "model.image_pixels=602112", "instruct.max_length=4096"):  # fmt: skip
        assert line in said
    assert "develop.steps" not in said, "what stands above other_base still holds"
    assert "sampling.max_new_tokens=12 " in said, "what the command line says comes last"
    manifest = next((tmp_path / "store").glob("pretrain-*/manifest.json"))
    task = json.loads(manifest.read_text())["config"]
    assert task["stage"]["lora_rank"] == 16
    assert task["stage"]["vision_lr"] == 0
    assert task["model"]["gradient_checkpointing"] is True
    assert json.loads((manifest.parent / "config.json").read_text())["model_type"] == "qwen2_5_vl"


def test_a_missing_annotation_file_is_named(files: Path, tiny_model: Path, tmp_path: Path) -> None:
    process = start(command(files, "nowhere.json", tiny_model, tmp_path / "store"), tmp_path)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "nowhere.json" in printed
    assert "Traceback" not in printed


def test_an_unknown_model_architecture_is_named(files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "nothing-we-know"}))
    (folder / "model.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    process = start(command(files, "llava.json", folder, tmp_path / "store"), tmp_path)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "Traceback" not in printed
    assert str(folder) in printed or "base-" in printed
