"""Intervals, paired comparisons and corrections, against theory, scipy and statsmodels."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, ttest_1samp

from sicog_exp.evaluation.statistics import (
    StatisticsError,
    gain_share,
    holm,
    interval,
    join,
    paired,
    paired_pooled,
)


@st.composite
def samples(draw):
    """Scores of two models with image ids: at least two images and some variation."""
    count = draw(st.integers(8, 60))
    images = draw(st.integers(4, 20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    clusters = np.array([f"image-{i % images}" for i in range(count)])
    return rng.random(count), rng.random(count), clusters


def clustered(rng: np.random.Generator, images: int, per_image: int, effect: float) -> tuple[np.ndarray, np.ndarray]:
    """Binary scores whose probability varies by image around 0.5."""
    level = np.clip(0.5 + effect * rng.standard_normal(images), 0.02, 0.98)
    clusters = np.repeat(np.arange(images), per_image)
    return (rng.random(len(clusters)) < level[clusters]).astype(float), clusters


@settings(max_examples=50, deadline=None)
@given(samples())
def test_interval_contains_the_mean(sample):
    scores, _, clusters = sample
    found = interval(scores, clusters, 500)
    assert found.low <= found.mean <= found.high
    assert found.mean == pytest.approx(scores.mean())
    assert (found.n, found.clusters) == (len(scores), len(set(clusters)))


@settings(max_examples=50, deadline=None)
@given(samples())
def test_paired_is_antisymmetric(sample):
    a, b, clusters = sample
    forth, back = paired(a, b, clusters, 500), paired(b, a, clusters, 500)
    assert forth.difference == pytest.approx(-back.difference)
    assert (forth.low, forth.high) == (pytest.approx(-back.high), pytest.approx(-back.low))


@settings(max_examples=30, deadline=None)
@given(samples(), st.randoms(use_true_random=False))
def test_paired_shift_invariance_and_order(sample, random):
    a, b, clusters = sample
    shifted = paired(a + 3, b + 3, clusters, 300)
    assert shifted.difference == pytest.approx(paired(a, b, clusters, 300).difference)
    order = list(range(len(a)))
    random.shuffle(order)
    shuffled = paired(a[order], b[order], clusters[order], 300)
    assert shuffled.low == pytest.approx(paired(a, b, clusters, 300).low)


def test_same_seed_same_interval():
    scores, clusters = clustered(np.random.default_rng(1), 40, 4, 0.2)
    assert interval(scores, clusters, seed=5) == interval(scores, clusters, seed=5)
    assert interval(scores, clusters, seed=5) != interval(scores, clusters, seed=6)


def test_interval_is_wider_on_clustered_data():
    scores, clusters = clustered(np.random.default_rng(0), 100, 8, 0.4)
    by_image, by_question = interval(scores, clusters), interval(scores, np.arange(len(scores)))
    assert by_image.high - by_image.low > 1.3 * (by_question.high - by_question.low)


def test_coverage_is_near_95_percent():
    rng = np.random.default_rng(3)
    found = [interval(*clustered(rng, 80, 4, 0.2), 400, seed=i) for i in range(300)]
    covered = np.mean([one.low <= 0.5 <= one.high for one in found])
    assert 0.91 <= covered <= 0.985


def test_one_cluster_has_a_flat_interval():
    found = interval([0, 1, 1, 1], ["x"] * 4)
    assert found.low == found.mean == found.high == 0.75


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
@settings(max_examples=60, deadline=None)
def test_mcnemar_agrees_with_scipy_and_statsmodels(pairs):
    a, b = (np.array(side, dtype=float) for side in zip(*pairs))
    found = paired(a, b, np.arange(len(a)), 10).mcnemar_p
    wins, losses = int((b > a).sum()), int((a > b).sum())
    if wins + losses:
        assert found == pytest.approx(binomtest(min(wins, losses), wins + losses).pvalue, abs=1e-12)
    contingency = pytest.importorskip("statsmodels.stats.contingency_tables")
    table = [[int((a * b).sum()), losses], [wins, int(((1 - a) * (1 - b)).sum())]]
    if wins + losses:
        assert found == pytest.approx(contingency.mcnemar(table, exact=True).pvalue, abs=1e-12)
    else:
        assert found == 1.0


def test_mcnemar_needs_binary_scores():
    assert paired([0, 0.5, 1], [1, 1, 1], [1, 2, 3]).mcnemar_p is None


def test_pooled_averages_seeds_by_question_and_reports_their_spread():
    rng = np.random.default_rng(8)
    clusters = np.repeat(np.arange(50), 4)
    runs = [((rng.random(200) < 0.4) * 1.0, (rng.random(200) < 0.7) * 1.0, clusters) for _ in range(3)]
    found = paired_pooled(runs)
    assert found.difference == pytest.approx(np.mean(found.per_seed))
    assert found.per_seed == tuple(pytest.approx((b - a).mean()) for a, b, _ in runs)
    assert found.spread == pytest.approx(np.std(found.per_seed, ddof=1))
    averaged = paired(np.mean([r[0] for r in runs], 0), np.mean([r[1] for r in runs], 0), clusters)
    assert (found.low, found.high) == (pytest.approx(averaged.low), pytest.approx(averaged.high))
    assert found.clear
    assert paired_pooled(runs[:1]).spread is None


@settings(max_examples=40, deadline=None)
@given(samples())
def test_the_pooled_p_agrees_with_scipy_and_statsmodels(sample):
    before, after, images = sample
    found = paired_pooled([(before, after, images)], 10)
    linear = pytest.importorskip("statsmodels.api")
    groups = np.unique(images, return_inverse=True)[1]
    model = linear.OLS(after - before, np.ones(len(images)))
    fitted = model.fit(cov_type="cluster", cov_kwds={"groups": groups}, use_t=True)
    assert found.p == pytest.approx(fitted.pvalues[0], abs=1e-9)
    alone = paired_pooled([(before, after, np.arange(len(images)))], 10)
    assert alone.p == pytest.approx(ttest_1samp(after - before, 0).pvalue, abs=1e-9)


def test_what_no_test_can_tell_has_a_p_of_one():
    assert paired_pooled([([1, 0], [1, 0], ["x", "y"])], 10).p == 1.0
    assert paired_pooled([([0, 0], [1, 0], ["x", "x"])], 10).p == 1.0


def test_copies_of_a_seed_do_not_narrow_the_pooled_interval():
    rng = np.random.default_rng(9)
    one = (rng.random(200), rng.random(200), np.repeat(np.arange(50), 4))
    single, many = paired_pooled([one]), paired_pooled([one] * 5)
    assert many.high - many.low == pytest.approx(single.high - single.low)


def test_pooled_refuses_seeds_with_other_questions():
    with pytest.raises(StatisticsError, match="number 1"):
        paired_pooled([([0, 1], [1, 1], ["x", "y"]), ([0, 1], [1, 1], ["y", "x"])])
    with pytest.raises(StatisticsError, match="no seeds"):
        paired_pooled([])


@given(st.lists(st.floats(0, 1), max_size=20))
def test_holm_agrees_with_statsmodels(values):
    adjusted = holm(values)
    assert all(high >= low for low, high in zip(values, adjusted))
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    if values:
        assert adjusted == pytest.approx(multitest.multipletests(values, method="holm")[1].tolist(), abs=1e-12)


def test_holm_refuses_what_is_no_probability():
    with pytest.raises(StatisticsError):
        holm([0.5, float("nan")])


def test_join_matches_by_id_not_by_place():
    ids, a, b = join({"x": 1, "y": 0}, {"y": 0.25, "x": 0.75})
    assert ids == ["x", "y"]
    assert (a.tolist(), b.tolist()) == ([1, 0], [0.75, 0.25])


def test_join_names_an_example_of_differing_ids():
    with pytest.raises(StatisticsError, match=r"3 against 2, 2 only in the first and 1 only in the second.*'p'"):
        join({"p": 1, "q": 1, "r": 0}, {"r": 1, "s": 0})
    with pytest.raises(StatisticsError, match="'s', only in the second"):
        join({"r": 0}, {"r": 1, "s": 0})


@pytest.mark.parametrize(
    ("scores", "clusters"), [([], []), ([1, 0], ["x"]), ([float("nan")], ["x"]), ([[1], [0]], [["x"], ["y"]])]
)
def test_unusable_scores_are_refused(scores, clusters):
    with pytest.raises(StatisticsError):
        interval(scores, clusters)


def test_two_thousand_resamples_of_500_images_are_quick():
    scores, clusters = clustered(np.random.default_rng(0), 500, 4, 0.2)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        interval(scores, clusters, 2000)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.1


def test_a_share_of_a_possible_gain_comes_from_resampling_both_at_once():
    rng = np.random.default_rng(0)
    images = np.repeat(np.arange(200), 4)
    limits = rng.normal(0.1, 0.3, 800)
    whole = gain_share(limits, limits, images)
    assert (whole.mean, whole.low, whole.high) == (1.0, 1.0, 1.0)
    half = gain_share(limits / 2 + rng.normal(0, 0.1, 800), limits, images)
    assert half.low < 0.5 < half.high < half.low + 0.5
    assert (half.n, half.clusters) == (800, 200)


@pytest.mark.parametrize("limits", [np.tile([1.0, -1.0], 50), np.eye(1, 100)[0] + np.eye(1, 100, 1)[0]])
def test_no_share_of_a_limit_that_may_be_zero(limits):
    """Of two hits in a hundred, too: some resamples have neither."""
    with pytest.raises(StatisticsError, match="not clearly above 0"):
        gain_share(limits, limits, np.arange(100))
