"""The package's miniatures, saved for tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sicog_exp.models.miniatures import FAMILIES, save


@dataclass(frozen=True)
class Family:
    """A saved model of one architecture."""

    name: str
    folder: Path


def build(name: str, folder: Path) -> Family:
    return Family(name, save(FAMILIES[name], folder))
