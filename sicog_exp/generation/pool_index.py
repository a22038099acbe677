"""Candidates of several pools, item by item."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sicog_exp.row_index import RowIndex


class PoolIndex(RowIndex):
    """Pool files joined by sample id, never by position (paper.md, defects)."""

    def __init__(self, files: Sequence[Path]) -> None:
        super().__init__(files, "sample_id")
