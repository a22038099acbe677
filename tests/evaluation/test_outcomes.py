"""`sicog compare`: agrees with scipy and statsmodels, reads our files and lmms-eval's, refuses unlike things."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from sicog_exp.cli import main
from sicog_exp.evaluation.outcomes import OVERALL, cluster_error, compare, detectable, read_outcomes
from sicog_exp.evaluation.statistics import StatisticsError
from sicog_exp.records import write_jsonl


def harness(path: Path, values: Any, **columns: Any) -> str:
    """A file as lmms-eval 0.7.3 writes it."""
    rows = [{"doc_id": i, "target": "x", "filtered_resps": "y", "doc_hash": "h", "input": f"Q{i}?", "accuracy": v,
             **{name: column(i) for name, column in columns.items()}} for i, v in enumerate(values)]  # fmt: skip
    write_jsonl(path, rows)
    return str(path)


def ours(path: Path, tasks: dict[str, Any], per_image: int = 4) -> str:
    rows = [{"task": task, "id": f"q{i}", "image": f"{i // per_image}.png", "family": "", "format": "direct",
             "prompt": "p", "response": "r", "answer": "a", "target": "t", "correct": float(v)}
            for task, values in tasks.items() for i, v in enumerate(values)]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, rows)
    return str(path)


def draws(seed: int, share: float, n: int = 1000) -> Any:
    return (np.random.default_rng(seed).random(n) < share).astype(int).tolist()


def test_a_thousand_samples_agree_with_scipy_and_statsmodels(tmp_path: Path) -> None:
    from statsmodels.stats.contingency_tables import mcnemar

    a, b = np.array(draws(0, 0.5)), np.array(draws(1, 0.56))
    (found,) = compare(harness(tmp_path / "a_samples_t.jsonl", a.tolist()),
                       harness(tmp_path / "b_samples_t.jsonl", b.tolist()))  # fmt: skip
    difference = b - a
    assert found.difference == pytest.approx(difference.mean(), abs=1e-9)
    assert found.error == pytest.approx(stats.sem(difference), abs=1e-9)
    table = [[int(((a == x) & (b == y)).sum()) for y in (0, 1)] for x in (0, 1)]
    assert found.mcnemar_p == pytest.approx(mcnemar(table, exact=True).pvalue, abs=1e-9)
    boot = stats.bootstrap((difference,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(3))
    assert found.low == pytest.approx(boot.confidence_interval.low, abs=0.006)
    assert found.high == pytest.approx(boot.confidence_interval.high, abs=0.006)
    power = 1 - stats.norm.cdf(stats.norm.ppf(0.975) - found.detectable / found.error)
    assert power == pytest.approx(0.8, abs=1e-6)


def test_errors_are_clustered_by_image(tmp_path: Path) -> None:
    from statsmodels.regression.linear_model import OLS

    a, b = draws(0, 0.4), draws(1, 0.5)
    images = np.arange(1000) // 4
    difference = np.array(b) - np.array(a)
    # statsmodels' cluster-robust error of the mean, with its correction G / (G - 1) * (n - 1) / (n - 1)
    fit = OLS(difference, np.ones(1000)).fit(cov_type="cluster", cov_kwds={"groups": images, "use_correction": True})
    assert cluster_error(difference, images) == pytest.approx(float(fit.bse[0]), rel=1e-9)
    (found,) = compare(ours(tmp_path / "a.jsonl", {"t": a}), ours(tmp_path / "b.jsonl", {"t": b}))
    assert (found.n, found.clusters) == (1000, 250)


def test_tasks_are_corrected_together_and_weigh_the_same_overall(tmp_path: Path) -> None:
    from statsmodels.stats.multitest import multipletests

    before = {"one": draws(0, 0.5, 400), "two": draws(1, 0.5, 100)}
    after = {"one": draws(2, 0.6, 400), "two": draws(3, 0.7, 100)}
    *tasks, overall = compare(ours(tmp_path / "a.jsonl", before), ours(tmp_path / "b.jsonl", after))
    assert [c.task for c in tasks] == ["one", "two"]
    expected = multipletests([c.mcnemar_p for c in tasks], method="holm")[1]
    assert [c.holm_p for c in tasks] == pytest.approx(list(expected))
    assert overall.task == OVERALL
    assert overall.difference == pytest.approx(np.mean([c.difference for c in tasks]))
    assert overall.low < overall.difference < overall.high
    assert overall.mcnemar_p is None


def test_seeds_are_pooled_and_their_spread_shown(tmp_path: Path) -> None:
    a = [ours(tmp_path / f"a{i}.jsonl", {"t": draws(i, 0.5)}) for i in range(3)]
    b = [ours(tmp_path / f"b{i}.jsonl", {"t": draws(10 + i, 0.6)}) for i in range(3)]
    (found,) = compare(",".join(a), ",".join(b))
    assert len(found.per_seed) == 3
    assert found.difference == pytest.approx(np.mean(found.per_seed))
    assert found.spread == pytest.approx(np.std(found.per_seed, ddof=1))
    with pytest.raises(StatisticsError, match="names 3 seeds"):
        compare(",".join(a), b[0])


@pytest.mark.parametrize(("value", "expected"), [
    (True, 1.0), (0.25, 0.25), ({"score": 1, "question_id": 3}, 1.0), ([0, 1, 1, 1], 0.75)])  # fmt: skip
def test_harness_metrics_in_all_their_forms(tmp_path: Path, value: Any, expected: float) -> None:
    found = read_outcomes(harness(tmp_path / "1_samples_pope.jsonl", [value] * 3))
    assert list(found) == ["pope"]
    assert set(found["pope"].values.values()) == {expected}


def test_images_named_by_the_samples_are_the_clusters(tmp_path: Path) -> None:
    source = harness(tmp_path / "1_samples_t.jsonl", [{"score": i % 2, "image": f"{i // 5}.png"} for i in range(20)])
    assert len(set(read_outcomes(source)["t"].images.values())) == 4


def test_several_metrics_need_a_name(tmp_path: Path) -> None:
    source = harness(tmp_path / "1_samples_t.jsonl", [1, 0], f1=lambda i: 0.5)
    with pytest.raises(StatisticsError, match=r"metrics accuracy, f1; name one with --metric"):
        read_outcomes(source)
    assert set(read_outcomes(source, "f1")["t"].values.values()) == {0.5}


@pytest.mark.parametrize(("change", "message"), [
    (lambda rows: rows[:-1], "different questions"),
    (lambda rows: [{**row, "prompt": "another"} for row in rows], "different prompts, 'p' against 'another'"),
    (lambda rows: [{**row, "task": "u"} for row in rows], "different benchmarks: t against u"),
])  # fmt: skip
def test_unlike_things_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    a = Path(ours(tmp_path / "a.jsonl", {"t": draws(0, 0.5, 20)}))
    rows = [json.loads(line) for line in a.read_text().splitlines()]
    write_jsonl(tmp_path / "b.jsonl", change(rows))
    with pytest.raises(StatisticsError, match=message):
        compare(str(a), str(tmp_path / "b.jsonl"))


def test_other_harness_versions_are_refused(tmp_path: Path) -> None:
    for name, version in (("a", "lmms-eval 0.7.3"), ("b", "lmms-eval 0.8.0")):
        ours(tmp_path / name / "samples.jsonl", {"t": [0, 1]})
        (tmp_path / name / "scores.json").write_text(json.dumps({"harness": version}))
    with pytest.raises(StatisticsError, match=r"harness versions, lmms-eval 0\.7\.3 against lmms-eval 0\.8\.0"):
        compare(str(tmp_path / "a"), str(tmp_path / "b"))


def test_command_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)  # where an unknown name is looked for in a tracking store
    a, b = ours(tmp_path / "a.jsonl", {"t": draws(0, 0.5)}), ours(tmp_path / "b.jsonl", {"t": draws(1, 0.6)})
    assert main(["compare", a, b, b]) == 0
    printed = capsys.readouterr().out
    assert "Difference to A" in printed
    assert f"B: {b}" in printed
    assert main(["compare", a, b, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["difference"] == pytest.approx(row["mean_b"] - row["mean_a"])
    assert main(["compare", a, str(tmp_path / "none.jsonl")]) == 2
    assert "neither a file, nor a folder, nor a run" in capsys.readouterr().err


def test_one_image_shows_nothing() -> None:
    assert detectable(cluster_error(np.array([1.0, 0.0]), np.array(["i", "i"]))) == float("inf")
