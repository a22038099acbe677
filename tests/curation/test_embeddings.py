"""Embeddings are made once: the stored ones are the model's, a killed run goes on, curation loads no model."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hashed import hashed
from hypothesis import given, settings
from hypothesis import strategies as st
from test_selfdata import candidate, pool, unlabeled

from sicog_exp import selfdata
from sicog_exp.curation import embeddings as e
from sicog_exp.curation.similarity import EmbeddingEncoder
from sicog_exp.recipe import CurationConfig
from sicog_exp.records import read_jsonl, write_records
from sicog_exp.store import Artifact, Store

TEXTS = [f"a {color} {thing}" for color in ("red", "blue", "green") for thing in ("dog", "cat", "dog")]
DISTINCT = list(dict.fromkeys(TEXTS))


def test_each_text_is_embedded_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(e, "embedder", lambda name: lambda texts: seen.extend(texts) or hashed(texts))
    assert e.embed_texts(lambda: iter(TEXTS), "any", tmp_path, tmp_path) == len(DISTINCT) == len(seen)
    assert np.array_equal(np.load(tmp_path / e.VECTORS), hashed(DISTINCT).astype(np.float32))
    monkeypatch.setattr(e, "embedder", lambda name: pytest.fail("a model was loaded for stored texts"))
    cosine = hashed(DISTINCT) @ hashed(DISTINCT).T
    lengths = np.sqrt(np.diag(cosine))
    found = e.stored_encoder("any", [tmp_path]).similarities(DISTINCT)
    np.testing.assert_allclose(found, cosine / np.outer(lengths, lengths), atol=1e-6)


@pytest.mark.parametrize("after", range(4))
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    calls: list[list[str]] = []

    def dying(texts: list[str]) -> np.ndarray:
        calls.append(texts)
        if len(calls) == after + 1:
            raise KeyboardInterrupt
        return hashed(texts)

    monkeypatch.setattr(e, "TEXTS_PER_BATCH", 2)
    monkeypatch.setattr(e, "embedder", lambda name: dying)
    if after < len(DISTINCT) // 2:
        with pytest.raises(KeyboardInterrupt):
            e.embed_texts(lambda: iter(TEXTS), "any", tmp_path, tmp_path)
    assert e.embed_texts(lambda: iter(TEXTS), "any", tmp_path, tmp_path) == len(DISTINCT)
    assert np.array_equal(np.load(tmp_path / e.VECTORS), hashed(DISTINCT).astype(np.float32))
    assert sum(map(len, calls)) == len(DISTINCT) + 2 * (after < 3), "only the batch that died is embedded again"


def test_others_may_compute_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(e, "TEXTS_PER_BATCH", 2)
    monkeypatch.setattr(e, "embedder", lambda name: pytest.fail("a model was loaded in this process"))
    batches: list[list[str]] = []

    def spread(given):
        batches.extend(given)  # all asked before the first is answered, as workers do
        return (hashed(batch) for batch in batches)

    assert e.embed_texts(lambda: iter(TEXTS), "any", tmp_path, tmp_path, spread=spread) == len(DISTINCT)
    assert [text for batch in batches for text in batch] == DISTINCT
    assert np.array_equal(np.load(tmp_path / e.VECTORS), hashed(DISTINCT).astype(np.float32))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.sampled_from(DISTINCT), unique=True), max_size=3))
def test_of_several_folders_the_last_one_s_embedding_counts(held: list[list[str]]) -> None:
    """The others are embedded when they come, each text gets its own vector, in any order."""

    def embed(number: int) -> Callable[[list[str]], np.ndarray]:
        return lambda texts: hashed([f"{number} {text}" for text in texts])

    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folders = [Path(name) / str(i) for i in range(len(held))]
        for i, (folder, texts) in enumerate(zip(folders, held, strict=True)):
            folder.mkdir()
            patch.setattr(e, "embedder", lambda name, i=i: embed(i))
            e.embed_texts(lambda texts=texts: iter(texts), "any", folder, folder)  # type: ignore[misc]
        patch.setattr(e, "embedder", lambda name: embed(9))
        patch.setattr(e, "build_encoder", lambda name: EmbeddingEncoder(name, embed(9)))
        asked = DISTINCT[::-1]
        found = e.stored_encoder("any", folders).similarities(asked)
    owner = [max((i for i, texts in enumerate(held) if text in texts), default=9) for text in asked]
    wanted = EmbeddingEncoder("any", hashed).similarities([f"{i} {text}" for i, text in zip(owner, asked)])
    assert np.array_equal(found, wanted)


def test_no_text_no_vectors(tmp_path: Path) -> None:
    assert e.embed_texts(lambda: iter([]), "minilm", tmp_path, tmp_path) == 0
    assert e.stored_encoder("minilm", [tmp_path]).similarities([]).shape == (0, 0)


def test_memory_holds_no_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 distinct texts of a kB: 17 bytes of each are held, while they are embedded and when their tokens count."""

    def texts() -> Iterator[str]:
        return (f"{i} " * 180 for i in range(20_000))

    class Tokenizer:
        def encode(self, text: str, truncation: bool) -> range:
            return range(7)

    monkeypatch.setattr(e, "embedder", lambda name: lambda texts: np.zeros((len(texts), 2), np.float32))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda source: Tokenizer())
    monkeypatch.setattr(e, "encoder_parameters", lambda source: 10)
    tracemalloc.start()
    try:
        assert e.embed_texts(texts, "any", tmp_path, tmp_path) == 20_000
        embedding = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        assert e.encoder_work(texts, "minilm")["tokens"] == 7 * 20_000
        counting = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert embedding < 4e6, "a batch of texts and the digests"
    assert counting < 2.5e6


def test_an_encoder_is_what_its_files_hold(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("1")
    before = e.encoder_state(str(tmp_path))
    (tmp_path / "weights").write_text("2")
    assert e.encoder_state(str(tmp_path)) != before
    assert e.encoder_state("owner/name") == "owner/name"


def test_curations_of_one_pool_share_its_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the trials of a sweep do: the second threshold loads no model, and scores are those of a model."""
    store, data = Store(tmp_path / "store"), tmp_path / "data"
    data.mkdir()
    write_records(data / "unlabeled.parquet", [unlabeled(i, "dd") for i in range(3)])
    rows = [candidate(f"u{i % 3}", "dd", text, i) for i, text in enumerate(TEXTS)]
    sampled = pool(tmp_path / "p", rows)
    sampled = Artifact(sampled.path, {"fingerprint": "p", "step": "generate-caption"}, True)

    def scores(threshold: float) -> list[float]:
        config = CurationConfig("minilm", caption_threshold=threshold, dedup=False)
        inputs = {"data": Artifact(data, {"fingerprint": "d"}, True), "pool00": sampled}
        inputs |= selfdata.embeddings(config, [sampled], store.run)
        step = selfdata.Step("curate", selfdata.curate, selfdata.CurationTask(config), inputs)
        return [row["score"] for row in read_jsonl(store.run(step) / "scores.jsonl")]

    first = scores(0.1)
    monkeypatch.setattr(e, "embedder", lambda name: pytest.fail("embedded again"))
    assert scores(0.9) == first
    assert len(list((tmp_path / "store").glob("embed-*/manifest.json"))) == 1
