"""Embeddings of a pool's compared texts, made once: what changes only thresholds, choices or the mixture reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import compress, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sicog_exp.curation.similarity import EmbeddingEncoder, Encoder, batched, build_encoder, embedder, encoder_source
from sicog_exp.models.shapes import encoder_parameters
from sicog_exp.store import Progress, checksums, digest_of

TEXTS, VECTORS, DONE = "texts.bin", "vectors.npy", "done"
DIGEST_BYTES = 16
DIGEST = f"S{DIGEST_BYTES}"
TEXTS_PER_BATCH = 1024
"""Texts embedded between two marks from which a killed run goes on."""


def encoder_state(name: str) -> str:
    """What `curation.encoder` is now: a digest of its model's files, or the name of one that only the hub knows."""
    folder = Path(encoder_source(name))
    return digest_of(checksums(folder)) if folder.is_dir() else name


Embed = Callable[[Iterable[list[str]]], Iterator[npt.NDArray]]
"""Batches of texts to their vectors, in order."""


def embed_texts(texts: Callable[[], Iterator[str]], name: str, folder: Path, scratch: Path,
                progress: Progress | None = None, spread: Embed | None = None) -> int:  # fmt: skip
    """Embed every distinct text of a stream, which is read twice, into `folder`; returns their number n.

    `vectors.npy` is (n, d) float32, `texts.bin` the digests of its rows' texts. A killed run goes on with the first
    batch that is not marked as done. `spread` computes the batches, if it is given, and not this process. Raises
    CurationError for an encoder that cannot be used.
    """
    digests = _digests(texts())
    new = _first(digests)
    (folder / TEXTS).write_bytes(digests[new].tobytes())
    count = int(new.sum())
    mark = scratch / DONE
    done = int(mark.read_text() or 0) if mark.exists() else 0
    for embedded in (spread or embedding(name))(batched(islice(compress(texts(), new), done, None), TEXTS_PER_BATCH)):
        vectors = np.asarray(embedded, np.float32)
        shape = (count, vectors.shape[1])
        stored = np.lib.format.open_memmap(folder / VECTORS, "r+" if done else "w+", np.float32, shape)
        stored[done : done + len(vectors)] = vectors
        stored.flush()
        done += len(vectors)
        mark.write_text(str(done))
        if progress:
            progress(done, count)
    return count


def embedding(name: str) -> Embed:
    """Batch by batch, in this process."""
    embed = embedder(name)
    return lambda batches: (np.asarray(embed(batch), np.float32) for batch in batches)


class EmbeddingWorker:
    """The same for one batch, in a worker's process."""

    def __init__(self, name: str) -> None:
        self._embed = embedder(name)

    def vectors(self, batch: list[str]) -> npt.NDArray:
        """(texts, width) float32."""
        return np.asarray(self._embed(batch), np.float32)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


def _digests(texts: Iterable[str]) -> npt.NDArray[np.bytes_]:
    return np.fromiter(map(_digest, texts), DIGEST)


def _first(digests: npt.NDArray[np.bytes_]) -> npt.NDArray[np.bool_]:
    """Whether each text comes here first, which is the order of the rows."""
    new = np.zeros(len(digests), bool)
    new[np.unique(digests, return_index=True)[1]] = True
    return new


def encoder_work(texts: Callable[[], Iterator[str]], name: str) -> dict[str, float]:
    """Tokens and FLOPs of embedding the distinct texts of a stream, which is read twice; nothing where the encoder's
    shape cannot be read."""
    from transformers import AutoTokenizer

    source = encoder_source(name)
    parameters = encoder_parameters(source)
    if not parameters:
        return {}
    tokenizer = AutoTokenizer.from_pretrained(source)
    distinct = compress(texts(), _first(_digests(texts())))
    tokens = sum(len(tokenizer.encode(text, truncation=True)) for text in distinct)
    return {"tokens": tokens, "prompt_tokens": tokens, "flops": 2.0 * parameters * tokens}


def stored_encoder(name: str, folders: Sequence[Path]) -> Encoder:
    """The encoder called `name`; it reads the embeddings in `folders` and embeds only texts that none of them has."""
    if not folders:
        return build_encoder(name)
    stored = [_Stored(folder) for folder in reversed(folders) if (folder / TEXTS).stat().st_size]
    model = cache(lambda: embedder(name))

    def embed(texts: list[str]) -> npt.NDArray[np.float32]:
        digests, left = np.frombuffer(b"".join(map(_digest, texts)), DIGEST), np.arange(len(texts))
        found = []
        for folder in stored:
            held, vectors = folder.vectors(digests[left])
            found.append((left[held], vectors))
            left = left[~held]
        if len(left):
            found.append((left, np.asarray(model()([texts[i] for i in left]), np.float32)))
        places, vectors = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return vectors[np.argsort(places)]

    return EmbeddingEncoder(name, embed, cached=0)  # what is stored is read again sooner than kept


class _Stored:
    """One folder's embeddings, found by the digests of their texts: 40 bytes of memory each."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / VECTORS
        digests = np.fromfile(folder / TEXTS, DIGEST)
        self._rows = np.argsort(digests)
        self._digests = digests[self._rows]

    def vectors(self, digests: npt.NDArray[np.bytes_]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
        """Which of the digests are stored here, and their embeddings."""
        at = np.minimum(np.searchsorted(self._digests, digests), len(self._digests) - 1)
        held = self._digests[at] == digests
        # Mapped anew each time: the pages read through a map that stays would all count as this process's memory.
        mapped = np.load(self._file, mmap_mode="r", allow_pickle=False)
        return held, np.asarray(mapped)[self._rows[at[held]]]
