"""Checkpoints under the names that vllm reads: transformers 5 saves a LLaVA's vision tower under shorter ones.

`python -m sicog_exp.models.vllm_names MODEL OUT` makes the folder that `vllm serve` takes; the weights are the same.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

SHORT, LONG = "vision_tower.", "vision_tower.vision_model."
TOWERS = ("clip_vision_model", "siglip_vision_model")
"""The towers whose weights vllm looks for under the longer names; InternVL's it does not."""
INNER = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")
"""What the names of a CLIP or SigLIP tower's weights go on with."""
HEADER_SIZE = 8
"""Bytes in front of a safetensors file that tell how long its header is."""


def vllm_folder(model: Path, home: Path) -> Path:
    """The model's own folder where vllm reads its names, else a copy under the longer names in `home`."""
    files = sorted(model.glob("*.safetensors"))
    if not _has_long_names(model) or not any(_renamed(name) != name for file in files for name in _header(file)[0]):
        return model
    home.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if file.suffix == ".safetensors":
            _copy_weights(file, home / file.name)
        elif file.name.endswith(".safetensors.index.json"):
            index = json.loads(file.read_text(encoding="utf-8"))
            index["weight_map"] = {_renamed(name): part for name, part in index["weight_map"].items()}
            (home / file.name).write_text(json.dumps(index), encoding="utf-8")
        elif file.is_file():
            shutil.copyfile(file, home / file.name)
    return home


def _has_long_names(model: Path) -> bool:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return (config.get("vision_config") or {}).get("model_type") in TOWERS


def _renamed(name: str) -> str:
    """`model.` may stand in front, and does where a base came so."""
    head, found, tail = name.partition(SHORT)
    return f"{head}{LONG}{tail}" if found and head in ("", "model.") and tail.startswith(INNER) else name


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """(tensor name -> where it lies, offset of the tensors) of a safetensors file."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(HEADER_SIZE), "little")
        return json.loads(stream.read(length)), HEADER_SIZE + length


def _copy_weights(file: Path, out: Path) -> None:
    """The file with other names in its header; the tensors' bytes are copied as they are."""
    header, start = _header(file)
    text = json.dumps({_renamed(name): value for name, value in header.items()}).encode()
    text += b" " * (-len(text) % HEADER_SIZE)  # tensors are aligned
    with file.open("rb") as stream, out.open("wb") as copy:
        copy.write(len(text).to_bytes(HEADER_SIZE, "little") + text)
        stream.seek(start)
        shutil.copyfileobj(stream, copy, 2**24)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("python -m sicog_exp.models.vllm_names MODEL OUT")
    print(vllm_folder(Path(sys.argv[1]), Path(sys.argv[2])))
