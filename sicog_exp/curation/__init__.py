"""Curation by self-consistency (paper.md, section Curation): no ground truth, no judge.

`similarity` compares texts, `consistency` turns similarities or answers into scores and a choice, `filters` sets aside
what cannot be compared or repeats what is kept, `curate` joins them item by item, `files` runs it on a JSONL file.
"""

from __future__ import annotations


class CurationError(ValueError):
    """Curation that cannot run; the message names the file or value, what is wrong and the fix."""
