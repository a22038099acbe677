"""An ablation's tables and page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from sicog_exp.reporting import ablation
from sicog_exp.reporting.ablation import AblationData, ArmRun, Difference, Score, Share


def demo() -> AblationData:
    """Two arms on one task; the second one changes G0 and trains more."""
    scores = [Score(arm, g, "world", 0.5 + 0.01 * g, 0.01, (0.49 + 0.01 * g + shift, 0.51 + 0.01 * g))
              for arm, shift in (("full", 0.0), ("less <b>", 0.002)) for g in (0, 1)]  # fmt: skip
    ends = [("full:G0", "full", 0.02), ("full", "less <b>", -0.01)]
    differences = [Difference(a, b, "world", d, d - 0.01, d + 0.015, 0.004, (d, d), 40, 20, 0.01, 0.4)
                   for a, b, d in ends]  # fmt: skip
    sampled = {"generate-caption": 2e9, "generate-reasoning": 3e9}
    runs = [ArmRun(arm, seed, f"{arm}{seed}", {"pretrain": training, **sampled}, training, 5e9)
            for arm, training in (("full", 1e12), ("less <b>", 1.2e12)) for seed in (0, 1)]  # fmt: skip
    made = AblationData("demo", "r.yaml", "full", "benchmark", (0, 1), {"full": (), "less <b>": ("a.b=1",)}, (),
                        "2026-11-25", "run", tuple(scores), tuple(differences), tuple(runs))  # fmt: skip
    return replace(made, notes=tuple(ablation.unequal(made)))


def test_tables_show_differences_spread_seeds_and_compute_with_and_without_generation() -> None:
    differences, scores, compute, stages = ablation.sheets(demo())
    minus = "\N{MINUS SIGN}"
    assert differences.rows[1] == (f"less <b> {minus} full", f"{minus}1.0 [{minus}2.0, +0.5]", "0.400", "0.4",
                                   f"{minus}1.0 {minus}1.0")  # fmt: skip
    assert [row[0] for row in scores.rows] == ["full G0", "full G1", "less <b> G0", "less <b> G1"]
    assert scores.rows[0][1:] == ("50.0", "1.0", "49.0 51.0")
    assert compute.rows[1] == ("less <b>", "1.2 T", "120%", "1.2 T", "120%")
    assert stages.columns == ("arm", "pretrain", "generate")
    assert stages.rows[1] == ("less <b>", "1.2 T", "5.0 G")
    assert demo().notes == ("less <b> trained with 20.0% more FLOPs than full: the comparison is not at equal training "
                            "compute.",)  # fmt: skip


@given(st.floats(0.5, 2))
def test_arms_are_named_where_training_compute_differs_by_more_than_a_few_percent(share: float) -> None:
    runs = tuple(replace(run, training=share * 1e12) if run.arm != "full" else run for run in demo().runs)
    assert bool(ablation.unequal(replace(demo(), runs=runs))) == (abs(share * 1e12 / 1e12 - 1) > ablation.EQUAL_WITHIN)


def test_the_page_loads_nothing_and_escapes_names() -> None:
    page = ablation.render(demo())
    assert "http" not in page.replace("http-equiv", "")
    assert "<b>" not in page.replace("<b></b>", "")
    assert "less &lt;b&gt;" in page
    assert page.count("<svg") == 1


def test_the_data_come_back_as_they_were_and_the_files_are_the_same_each_time(tmp_path: Path) -> None:
    assert ablation.from_json(ablation.to_json(demo())) == demo()
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        made.append([path.read_bytes() for path in ablation.write(demo(), tmp_path / name)])
    assert made[0] == made[1]


def test_shares_of_the_ceiling_have_a_table_of_their_own() -> None:
    shared = replace(demo(), shares=(Share("less <b>", "world", 0.47, 0.2, 0.75),))
    (table,) = [sheet for sheet in ablation.sheets(shared) if sheet.title.startswith("Share of the ceiling")]
    assert (table.columns, table.rows) == (("arm", "world"), (("less <b>", "47% [20%, 75%]"),))
    assert ablation.from_json(ablation.to_json(shared)) == shared


def test_one_seed_has_no_standard_deviation() -> None:
    lone = replace(demo(), scores=tuple(replace(s, spread=None, per_seed=s.per_seed[:1]) for s in demo().scores))
    assert ablation.sheets(lone)[1].rows[0][1:] == ("50.0", "\N{EN DASH}", "49.0")
