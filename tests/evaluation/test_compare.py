"""Generations compared from their per-question results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from mlflow.utils.validation import _validate_metric_name

from sicog_exp.evaluation.benchmarks import SAMPLES, Sample
from sicog_exp.evaluation.compare import champion, deltas, mean_gain, metrics, score_table
from sicog_exp.evaluation.outcomes import OVERALL, compare
from sicog_exp.evaluation.statistics import StatisticsError, holm, interval
from sicog_exp.records import write_jsonl

FAMILIES = ("counting", "naming")


def sample(task: str, number: int, correct: float, family: str = "", id: str = "") -> Sample:
    """Two questions about each image."""
    image = f"images/{number // 2}.png"
    return Sample(task, id or f"q{number}", image, family, task.rsplit("_")[-1], "p", "r", "a", "t", correct)


def results(folder: Path, name: str, **tasks: Sequence[float]) -> Path:
    (folder / name).mkdir()
    rows = [sample(t, i, c, FAMILIES[i % 2]) for t, scores in tasks.items() for i, c in enumerate(scores)]
    write_jsonl(folder / name / SAMPLES, map(asdict, rows))
    return folder / name


def right(count: int, of: int = 80) -> list[float]:
    """The first `count` questions are right."""
    return [float(i < count) for i in range(of)]


def test_scores_have_clustered_intervals_overall_and_by_family(tmp_path: Path):
    scores = list(np.random.default_rng(0).integers(0, 2, 80).astype(float))
    table = score_table(results(tmp_path, "g0", world_direct=scores, world_cot=right(80)))
    assert list(table) == ["world_direct", "world_cot"]
    found = table["world_direct"]
    images = [f"images/{i // 2}.png" for i in range(80)]
    assert found.overall == interval(scores, images)
    assert (found.format, found.overall.n, found.overall.clusters) == ("direct", 80, 40)
    assert found.families["naming"] == interval(scores[1::2], images[1::2])
    assert table["world_cot"].overall.low == table["world_cot"].overall.mean == 1.0


def test_questions_without_a_family_make_none(tmp_path: Path):
    write_jsonl(tmp_path / SAMPLES, [asdict(sample("stock", i, 1.0)) for i in range(4)])
    assert score_table(tmp_path)["stock"].families == {}


def test_metric_names_are_stable_and_allowed(tmp_path: Path):
    families = ("counting", "a=b", "a,b", "50% @ x/y", "..", "a.", "\N{GREEK SMALL LETTER PI}")
    write_jsonl(tmp_path / SAMPLES, [asdict(sample("world_cot", i, i % 2, name)) for i, name in enumerate(families)])
    named = metrics(score_table(tmp_path))
    assert list(named)[:3] == [f"eval/world_cot/{n}" for n in ("accuracy", "accuracy_low", "accuracy_high")]
    assert named["eval/world_cot/family/counting"] == 0.0
    assert len([name for name in named if "/family/" in name]) == 7, "two families share a name"
    for name in named:
        _validate_metric_name(name)
        assert not set(name) & set("=@,%")


def test_every_generation_is_compared_with_the_first_and_with_the_one_before(tmp_path: Path):
    folders = [results(tmp_path, f"g{g}", a_direct=right(40 + 8 * g), a_cot=right(40)) for g in range(4)]
    found = deltas(folders)
    pairs = [(d.after, d.before) for d in found if d.task == "a_direct"]
    assert pairs == [("G1", "G0"), ("G2", "G0"), ("G3", "G0"), ("G2", "G1"), ("G3", "G2")]
    assert [d.task for d in found] == ["a_direct", "a_cot"] * 5
    last = next(d for d in found if (d.before, d.after, d.task) == ("G0", "G3", "a_direct"))
    assert (last.difference, last.n, last.clusters, last.clear) == (pytest.approx(0.3), 80, 40, True)
    assert last.low < 0.3 < last.high
    assert [d.holm_p for d in found] == holm([d.mcnemar_p for d in found]), "corrected over all tests of the list"
    json.dumps([vars(d) for d in found])


def test_one_generation_has_no_deltas(tmp_path: Path):
    folders = [results(tmp_path, "g0", a=right(3))]
    assert (deltas(folders), champion(folders)) == ([], 0)


def test_questions_are_matched_by_id_not_by_order(tmp_path: Path):
    first = results(tmp_path, "g0", a=right(30))
    rows = [asdict(sample("a", i, c, FAMILIES[i % 2])) for i, c in enumerate(right(30))]
    second = tmp_path / "g1"
    second.mkdir()
    write_jsonl(second / SAMPLES, reversed(rows))
    (found,) = deltas([first, second])
    assert (found.difference, found.low, found.high, found.mcnemar_p) == (0, 0, 0, 1)


def test_one_id_for_several_questions_of_a_stock_task_loses_none(tmp_path: Path):
    for g in range(2):
        (tmp_path / f"g{g}").mkdir()
        rows = [asdict(sample("stock", i, float(i == 1 or g), id="same")) for i in range(3)]
        write_jsonl(tmp_path / f"g{g}" / SAMPLES, rows)
    (found,) = deltas([tmp_path / "g0", tmp_path / "g1"])
    assert (found.n, found.difference) == (3, pytest.approx(2 / 3))


def test_metrics_that_are_not_right_or_wrong_have_no_mcnemar_and_stay_out_of_the_correction(tmp_path: Path):
    folders = [results(tmp_path, f"g{g}", graded=[0.5 + 0.1 * g] * 20, binary=right(10 + 5 * g, 20)) for g in range(2)]
    graded, binary = deltas(folders)
    assert (graded.mcnemar_p, graded.holm_p) == (None, None)
    assert binary.holm_p == binary.mcnemar_p < 0.1


def test_other_tasks_or_questions_are_refused(tmp_path: Path):
    first = results(tmp_path, "g0", a=right(5))
    with pytest.raises(StatisticsError, match="G0 was scored on a and G1 on b"):
        deltas([first, results(tmp_path, "g1", b=right(5))])
    with pytest.raises(StatisticsError, match="different questions"):
        deltas([first, results(tmp_path, "g2", a=right(5, of=79))])


def test_the_mean_gain_is_the_overall_difference_of_compare(tmp_path: Path):
    first, second = (results(tmp_path, name, a=right(a), b=right(b, of=20)) for name, a, b in
                     (("g0", 40, 10), ("g1", 60, 12)))  # fmt: skip
    found = mean_gain(first, second)
    (overall,) = (one for one in compare(str(first), str(second)) if one.task == OVERALL)
    assert found.difference == pytest.approx((20 / 80 + 2 / 20) / 2)
    assert (found.difference, found.low, found.high) == (overall.difference, overall.low, overall.high)
    with pytest.raises(StatisticsError, match="G0 was scored on a, b and G1 on a"):
        mean_gain(first, results(tmp_path, "g2", a=right(1)))


def generations(folder: Path, *counts: tuple[int, int]) -> list[Path]:
    return [results(folder, f"g{i}", x=right(a), y=right(b)) for i, (a, b) in enumerate(counts)]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([(40, 40), (40, 40)], 0),  # no better
        ([(40, 40), (50, 50)], 1),
        ([(40, 40), (70, 20)], 0),  # better in the mean, a clear regression on one task
        ([(40, 40), (60, 39)], 1),  # a loss within the noise of one question
        ([(40, 40), (50, 50), (20, 60)], 1),
        ([(40, 40), (20, 60), (50, 50)], 2),  # compared with the holder, G0, not with the generation before
        ([(40, 40), (60, 60), (20, 20), (50, 50)], 1),  # better than G0 and the one before, worse than the holder
        ([(60, 60), (20, 20), (30, 30)], 0),
    ],
)
def test_champion_never_regresses_beyond_the_noise(tmp_path: Path, counts: list[tuple[int, int]], expected: int):
    assert champion(generations(tmp_path, *counts)) == expected
