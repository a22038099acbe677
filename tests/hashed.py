"""An embedding without a model, for tests of what stands around one."""

from __future__ import annotations

import hashlib

import numpy as np


def hashed(texts: list[str]) -> np.ndarray:
    """Embeddings without a model: a random vector seeded by the text."""
    seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") for text in texts]
    return np.stack([np.random.default_rng(seed).normal(size=16) for seed in seeds])
