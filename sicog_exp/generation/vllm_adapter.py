"""LoRA adapters in peft's form as vllm takes them: matrices beside a base's language model, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sicog_exp.generation.requests import EngineError
from sicog_exp.models.loading import part_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""What peft saves of an adapter."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vllm lets the largest rank of an adapter be."""
MERGE = "merge it into its base (peft's merge_and_unload) and give the merged model's folder"


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, the folder or hub name of the base that it goes on, and the room its ranks need."""

    folder: Path
    base: str
    room: int

    @classmethod
    def read(cls, folder: Path) -> Adapter | None:
        """The adapter in a folder; None where none is. Raises EngineError for one that vllm would not apply whole."""
        if not (folder / CONFIG).is_file():
            return None
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        base = config.get("base_model_name_or_path")
        if not base:
            raise EngineError(f"{folder / CONFIG}: base_model_name_or_path names no base; write its folder or hub name "
                              "there")  # fmt: skip
        _check_names(folder)
        return cls(folder, base, _room(folder, config))

    @property
    def options(self) -> dict[str, Any]:
        """What `vllm.LLM` is told of it."""
        return {"enable_lora": True, "max_lora_rank": self.room}


def _check_names(folder: Path) -> None:
    """vllm passes over what it finds no place for, and samples from a model that nobody trained: refused instead."""
    from safetensors import safe_open

    if not (folder / WEIGHTS).is_file():
        raise EngineError(f"{folder}: no {WEIGHTS} beside {CONFIG}; save the adapter with peft's save_pretrained")
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        strays = [name for name in file.keys() if part_of(name) != "language"]  # noqa: SIM118
    if strays:
        raise EngineError(f"{folder}: vllm takes adapters of the language model alone, here is one of {strays[0]}; "
                          f"{MERGE}")  # fmt: skip


def _room(folder: Path, config: Mapping[str, Any]) -> int:
    """The least of RANKS that holds the adapter's largest rank."""
    ranks: Iterable[int] = (config["r"], *(config.get("rank_pattern") or {}).values())
    largest = max(ranks)
    if largest > RANKS[-1]:
        raise EngineError(f"{folder}: rank {largest}, vllm takes ranks up to {RANKS[-1]}; {MERGE}")
    return next(room for room in RANKS if room >= largest)
