import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sicog_exp.curation.consistency import (
    agreement_scores,
    choose,
    evidence_agreement,
    lower_half,
    mean_scores,
    mean_similarity_scores,
    seeded_index,
)


def test_threshold_090_with_self_means_085_to_the_two_others() -> None:
    """The paper's rule at N = 3: (1 + 0.85 + 0.85) / 3 = 0.9 exactly, not 0.8999999."""
    similarity = np.array([[1, 0.85, 0.85], [0.85, 1, 0.4], [0.85, 0.4, 1]])
    assert mean_similarity_scores(similarity, include_self=True) == [0.9, 0.75, 0.75]
    assert mean_similarity_scores(similarity, include_self=False) == [0.85, 0.625, 0.625]


def test_one_candidate_and_none() -> None:
    assert mean_similarity_scores(np.eye(1), include_self=True) == [1.0]
    assert mean_similarity_scores(np.eye(1), include_self=False) == [0.0]
    assert mean_similarity_scores(np.eye(0), True) == mean_similarity_scores(np.eye(0), False) == []
    assert agreement_scores(["x"], True) == [1.0]
    assert agreement_scores(["x"], False) == [0.0]
    assert agreement_scores([], True) == agreement_scores([], False) == []


def test_agreement_by_hand() -> None:
    answers = ["red", "red", "blue", "red"]
    assert agreement_scores(answers, include_self=True) == [0.75, 0.75, 0.25, 0.75]
    assert agreement_scores(answers, include_self=False) == pytest.approx([2 / 3, 2 / 3, 0, 2 / 3], abs=1e-9)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(0, 9), st.booleans(), st.integers(0, 2**32))
def test_items_scored_together_score_as_alone(m: int, n: int, include_self: bool, seed: int) -> None:
    """To the bit, against numpy's own mean of each item's rows."""
    matrices = np.random.default_rng(seed).random((m, n, n))
    found = mean_scores(matrices, include_self)
    assert found == [mean_similarity_scores(matrix, include_self) for matrix in matrices]
    for scores, matrix in zip(found, matrices, strict=True):
        rows = [np.sort(np.delete(row, [] if include_self else i)) for i, row in enumerate(matrix)]
        assert scores == [float(np.round(row.mean(), 9)) if len(row) else 0.0 for row in rows]


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=8), st.booleans())
def test_agreement_is_the_mean_similarity_of_equal_answers(answers: list[str], include_self: bool) -> None:
    same = np.array([[float(a == b) for b in answers] for a in answers])
    assert agreement_scores(answers, include_self) == mean_similarity_scores(same, include_self)


@given(
    st.integers(1, 6).flatmap(lambda n: st.lists(st.floats(0, 1), min_size=n * n, max_size=n * n)),
    st.booleans(),
    st.randoms(),
)
def test_scores_do_not_depend_on_order(values, include_self, random) -> None:
    n = int(len(values) ** 0.5)
    matrix = np.array(values).reshape(n, n)
    matrix = (matrix + matrix.T) / 2
    np.fill_diagonal(matrix, 1)
    order = random.sample(range(n), n)
    scores = mean_similarity_scores(matrix, include_self)
    assert mean_similarity_scores(matrix[np.ix_(order, order)], include_self) == [scores[i] for i in order]
    assert all(0 <= score <= 1 for score in scores)


def test_ties_prefer_structure_then_evidence_then_position() -> None:
    assert choose([0.5, 0.9, 0.5], ["dd"] * 3, ["", "", ""]) == 1
    assert choose([0.9, 0.9], ["direct", "cot"], ["", "a cat"]) == 1
    evidence = ["a dog", "a red cat", "the red cat", "a red cat", ""]
    assert choose([0.8] * 5, ["cot"] * 4 + ["direct"], evidence) == 1
    assert choose([0.8] * 3, ["dd"] * 3, ["x", "x", "x"]) == 0


def test_choice_of_the_best_evidence_is_the_same_in_every_order() -> None:
    evidence = ["a dog", "a red cat here", "the red cat", "a blue bird"]
    chosen = {evidence[order[choose([1.0] * 4, ["cot"] * 4, [evidence[i] for i in order])]]
              for order in itertools.permutations(range(4))}  # fmt: skip
    assert len(chosen) == 1


def test_empty_evidence_supports_nobody() -> None:
    assert evidence_agreement(["a cat", "", "a cat"]) == [1.0, 0.0, 1.0]
    assert evidence_agreement(["", ""]) == [0.0, 0.0]


def test_lower_half_leaves_out_the_middle() -> None:
    assert lower_half([0.9, 0.1, 0.5], ["a", "b", "c"]) == [1]
    assert lower_half([0.9, 0.1, 0.5, 0.5], ["a", "b", "d", "c"]) == [2, 1]
    assert lower_half([1.0], ["a"]) == []


def test_seeded_index_is_fixed() -> None:
    """Literal values: they must never change between processes, machines or releases."""
    assert [seeded_index("rejected", str(i), 10) for i in range(6)] == [4, 7, 2, 5, 3, 1]
    assert {seeded_index("rejected", str(i), 3) for i in range(50)} == {0, 1, 2}
