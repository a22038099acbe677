"""Curation by self-consistency (paper.md, section Curation): no ground truth, no judge.

`filters` sets aside what cannot be compared or repeats what is kept, `similarity` compares texts, `consistency` and
`scorers` turn that into scores, `selection` into decisions; `curate` joins them item by item, `files` runs it on a
JSONL file. `oracle` alone lets a truth choose, for upper bounds that are no results.
"""

from __future__ import annotations


class CurationError(ValueError):
    """Curation that cannot run; the message names the file or value, what is wrong and the fix."""
