"""A pool under every threshold: what the sweep says is what curating again with that threshold does."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sicog_exp.curation import CurationError
from sicog_exp.curation import calibration as c
from sicog_exp.curation.diagnosis import Truth, diagnose, read_truth
from sicog_exp.curation.diversity import read_diversity
from sicog_exp.curation.files import curate_file
from sicog_exp.curation.similarity import Encoder, LexicalEncoder, Matrix
from sicog_exp.prompts import structured
from sicog_exp.recipe import CurationConfig
from sicog_exp.records import read_jsonl, write_jsonl


def cot(answer: str, seen: str = "red dog") -> dict[str, Any]:
    return {"kind": "cot", "text": structured("cot", ("goal", seen, "because", answer)), "finish_reason": "stop"}


def cod(text: str) -> dict[str, Any]:
    parts = ("dog", "red dog", "dog left", "gray", text)
    return {"kind": "cod", "text": structured("cod", parts), "finish_reason": "stop"}


def plain(text: str, kind: str = "direct") -> dict[str, Any]:
    return {"kind": kind, "text": text, "finish_reason": "stop"}


def item(id: str, *candidates: dict[str, Any], kind: str = "reasoning", image: str | None = None) -> dict[str, Any]:
    return {"id": id, "kind": kind, "prompt": f"prompt {kind}", "image": image or f"{id}.png",
            "candidates": list(candidates)}  # fmt: skip


def span(values: Sequence[float], images: Sequence[str]) -> tuple[float, float]:
    """Not an interval, but one that shows which values it was made of."""
    assert len(values) == len(images)
    return min(values), max(values)


def curated(folder: Path, pool: Iterable[dict], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / "pool.jsonl", pool)
    curate_file(folder / "pool.jsonl", folder, CurationConfig(**config))
    return folder


def pools(folder: Path, truths: dict[str, Truth] | None = None) -> dict[Any, c.Pool]:
    return c.read_pools(folder, truths or {}, folder / "pool.jsonl")


# Against curating again.

ANSWERS = st.sampled_from(["red", "Red.", "two", "2", "left"])
CAPTIONS = st.sampled_from(["red dog top, blue car left.", "red dog top, blue cat left.", "green cup, gray ground."])
REASONING = st.lists(st.one_of(ANSWERS.map(cot), ANSWERS.map(plain), st.just(plain("broken", "cot"))), max_size=5)
CAPTION = st.lists(st.one_of(CAPTIONS.map(cod), CAPTIONS.map(lambda text: plain(text, "dd"))), max_size=4)
ROWS = st.lists(st.tuples(st.booleans(), REASONING, CAPTION, st.sampled_from(["a.png", "b.png"])), max_size=12)
CONFIGS = st.builds(
    CurationConfig, caption_threshold=st.sampled_from([0.0, 0.5, 0.85, 1.0]), include_self=st.booleans(),
    reasoning_threshold=st.sampled_from([0.0, 0.4, 0.75, 1.0]), require_direct_agreement=st.booleans(),
    reasoning_scorer=st.sampled_from(["agreement", "similarity"]), select=st.sampled_from(["best", "best", "random"]),
    dedup=st.booleans(), near_duplicate=st.sampled_from([0.6, 0.95]),
)  # fmt: skip


def kept_ids(folder: Path, group: str) -> list[str]:
    return [row["id"] for row in read_jsonl(folder / "curated.jsonl") if row["kept"] and row["kind"] == group]


@settings(max_examples=60, deadline=None)
@given(ROWS, CONFIGS, st.sampled_from([0.0, 0.3, 0.5, 2 / 3, 0.9, 1.0]))
def test_every_threshold_keeps_what_curating_again_with_it_keeps(rows: list, config: CurationConfig, other: float):
    pool = [item(f"{i}", *(answers if reasoning else captions), kind="reasoning" if reasoning else "caption",
                 image=image) for i, (reasoning, answers, captions, image) in enumerate(rows)]  # fmt: skip
    if not pool:
        return
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        given_config = {field: getattr(config, field) for field in config.__dataclass_fields__}
        once = curated(home / "once", pool, **given_config)
        again = curated(home / "again", pool, **{**given_config, "caption_threshold": other,
                                                 "reasoning_threshold": other})  # fmt: skip
        for group, found in pools(once).items():
            today = found.threshold if found.threshold is not None else -1.0
            assert [j.row["id"] for j in found.kept_at(today)] == kept_ids(once, group)
            if config.select == "best":
                assert [j.row["id"] for j in found.kept_at(other)] == kept_ids(again, group)
            made = c.calibrate(found, span)
            if made.today is not None:
                assert made.levels[made.today].kept == made.kept == len(kept_ids(once, group))
            kept = [level.kept for level in made.levels]
            assert config.dedup or kept == sorted(kept, reverse=True)


# By hand.

FAMILIES = ("counting", "naming")
POOL = [
    item("n0", cot("red"), cot("red"), plain("red"), image="a.png"),  # 1, right, formats agree
    item("n1", cot("red"), cot("red"), plain("blue"), image="a.png"),  # 2/3, right, formats disagree
    item("n2", cot("red"), plain("the red"), image="b.png"),  # 1, right
    item("k0", cot("2"), cot("2"), plain("3"), image="c.png"),  # 2/3, wrong
    item("k1", cot("2"), cot("4"), plain("3"), image="c.png"),  # 1/3, the first chain, right
    item("k2", plain("5"), image="d.png"),  # alone: 1, wrong
]
TRUTHS = {**{f"n{i}": Truth("red", "naming") for i in range(3)},
          **{f"k{i}": Truth(answer, "counting") for i, answer in enumerate("323")}}  # fmt: skip


@pytest.fixture
def found(tmp_path: Path) -> c.Calibration:
    folder = curated(tmp_path / "pool", POOL, reasoning_threshold=0.6, dedup=False)
    return c.calibrate(pools(folder, TRUTHS)["reasoning"], span)


def test_levels_by_hand(found: c.Calibration):
    assert [level.threshold for level in found.levels] == [0.3333, 0.6, 0.6666, 1.0]
    assert [level.kept for level in found.levels] == [6, 5, 5, 3]
    assert [level.keep_rate for level in found.levels] == [1, 5 / 6, 5 / 6, 0.5]
    precisions = [level.precision.mean for level in found.levels if level.precision]
    assert precisions == [4 / 6, 3 / 5, 3 / 5, 2 / 3]
    assert found.levels[0].precision == c.Precision(4 / 6, 0.0, 1.0, 6)
    randoms = {"n0": 1, "n1": 2 / 3, "n2": 1, "k0": 1 / 3, "k1": 1 / 3, "k2": 0}
    assert found.random == pytest.approx(fmean(randoms.values()))
    assert found.levels[-1].random == pytest.approx(fmean(randoms[id] for id in ("n0", "n2", "k2")))
    assert found.levels[-1].easiness == pytest.approx((2 * (8 / 9) + 2 / 9) / 3)
    assert [level.formats for level in found.levels] == [2 / 5, 2 / 4, 2 / 4, 1.0]
    assert (found.today, found.kept, found.known, found.threshold) == (1, 5, 6, 0.6)


def test_families_drift_by_hand(found: c.Calibration):
    counting, naming = found.families
    assert (counting.name, counting.items, counting.share, counting.easiness) == (
        "counting", 3, 0.5, pytest.approx(2 / 9))  # fmt: skip
    assert counting.kept == (3, 2, 2, 1)
    assert naming.shares == pytest.approx((3 / 6, 3 / 5, 3 / 5, 2 / 3))
    assert counting.precision == pytest.approx((1 / 3, 0, 0, 0))
    assert naming.today == c.Precision(1.0, 1.0, 1.0, 3)


def test_the_parts_of_the_gain_add_up(found: c.Calibration):
    for level in found.levels:
        gain = c.gain_of(found, level)
        assert gain
        assert gain.choosing + gain.families + gain.items == pytest.approx(gain.total)
    top = c.gain_of(found, found.levels[-1])
    assert top
    assert top.total == pytest.approx(2 / 3 - 5 / 9)
    assert top.choosing == 0
    assert top.families == pytest.approx((2 * (8 / 9) + 2 / 9) / 3 - 5 / 9)


def test_bins_hold_every_known_item_once_and_scores_stay_together(found: c.Calibration):
    assert [(round(b.score, 3), b.precision.n) for b in found.bins] == [(0.333, 1), (0.667, 2), (1.0, 3)]
    many = [item(f"q{i}", *[cot("a")] * (i % 7), *[cot("b")] * 6) for i in range(90)]
    with tempfile.TemporaryDirectory() as home:
        folder = curated(Path(home) / "p", many, dedup=False)
        bins = c.calibrate(pools(folder, {f"q{i}": Truth("a") for i in range(90)})["reasoning"], span).bins
    assert sum(b.precision.n for b in bins) == 90
    assert len(bins) <= c.BINS
    assert [b.score for b in bins] == sorted({b.score for b in bins})


def test_what_nothing_confirms_is_counted(found: c.Calibration):
    assert (found.lone_kept, found.lone.holds) == (1, c.Precision(0.0, 0.0, 0.0, 1))
    assert found.lone.fails == c.Precision(3 / 4, 0.0, 1.0, 4)


def test_the_worth_of_the_format_proxy_is_measured(found: c.Calibration):
    assert found.formats == c.Split(c.Precision(1.0, 1.0, 1.0, 2), c.Precision(2 / 3, 0.0, 1.0, 3))


def test_variety_at_today_s_threshold_is_the_diversity_of_the_run(tmp_path: Path):
    rows = [item(f"q{i:03}", cot(f"word{i % 7}", f"red dog {i % 11} near cup {i % 3}"),
                 plain(f"word{i % 7 if i % 3 else 9}")) for i in range(200)]  # fmt: skip
    folder = curated(tmp_path / "curated", rows, reasoning_threshold=0.6)
    (tmp_path / "data").mkdir()
    truth = [{"id": f"q{i:03}", "answer": f"word{i % 7}", "family": FAMILIES[i % 2]} for i in range(200)]
    write_jsonl(tmp_path / "data" / "truth.jsonl", truth)
    found = c.calibrate(pools(folder, read_truth(tmp_path / "data"))["reasoning"], span)
    level = found.levels[found.today or 0]
    run = read_diversity(folder, tmp_path / "data")["reasoning"]
    assert level.distinct_2 == run.distinct_2 is not None
    assert (level.answer_entropy, level.mean_words) == (run.answer_entropy, run.mean_words)
    known = diagnose(folder, tmp_path / "data")["reasoning"]
    assert level.precision
    assert (level.precision.mean, level.keep_rate, found.random) == (
        known.precision_kept, known.keep_rate, known.precision_random)  # fmt: skip


# What is not known.


def test_without_truth_the_proxies_remain(tmp_path: Path):
    found = c.calibrate(pools(curated(tmp_path / "p", POOL, dedup=False))["reasoning"], span)
    assert (found.known, found.random, found.families, found.bins, found.lone.holds) == (0, None, (), (), None)
    assert {level.precision for level in found.levels} == {None}
    assert found.levels[0].formats == 2 / 5
    assert c.gain_of(found, found.levels[0]) is None
    assert c.metrics({"reasoning": found}).keys() == {"curation/reasoning/formats_agreement"}


def test_without_the_candidates_what_needs_them_is_unknown(tmp_path: Path):
    folder = curated(tmp_path / "p", POOL, reasoning_threshold=0.6, require_direct_agreement=True, dedup=False)
    whole, alone = pools(folder, TRUTHS)["reasoning"], c.read_pools(folder, TRUTHS)["reasoning"]
    assert [level.threshold for level in c.calibrate(whole, span).levels] == [0.3333, 0.6, 0.6666, 1.0]
    found = c.calibrate(alone, span)
    assert [level.threshold for level in found.levels] == [0.6, 0.6666, 1.0], "what 0.33 would keep hangs on votes"
    assert [level.kept for level in found.levels] == [len(whole.kept_at(t)) for t in (0.6, 0.6666, 1.0)] == [3, 3, 3]
    assert {level.formats for level in found.levels} == {found.random} == {None}
    assert found.levels[0].precision == c.Precision(2 / 3, 0.0, 1.0, 3)
    with pytest.raises(CurationError, match=r"nowhere\.jsonl: No such file"):
        c.read_pools(folder, {}, tmp_path / "nowhere.jsonl")


def test_a_random_choice_has_no_threshold_of_today(tmp_path: Path):
    found = c.calibrate(pools(curated(tmp_path / "p", POOL, select="random"), TRUTHS)["reasoning"], span)
    assert (found.threshold, found.today, found.kept) == (None, 0, 6)
    assert found.levels[0].kept == 6


def test_a_group_without_a_valid_candidate(tmp_path: Path):
    found = c.calibrate(pools(curated(tmp_path / "p", [item("q", plain("no steps", "cot"))]))["reasoning"], span)
    assert (found.items, found.choices, [level.kept for level in found.levels]) == (1, 0, [0])


def test_thresholds_are_few_and_as_a_recipe_takes_them(tmp_path: Path):
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(9)]
    rows = [item(f"c{i}", *(plain(" ".join(rng.choice(words, 8)), "dd") for _ in range(4)), kind="caption")
            for i in range(60)]  # fmt: skip
    pool = pools(curated(tmp_path / "p", rows, caption_threshold=0.43))["caption"]
    thresholds = c.thresholds_of(pool)
    assert 10 < len(thresholds) <= c.LEVELS + 1
    assert thresholds == sorted(thresholds)
    assert 0.43 in thresholds
    assert all(round(t, 4) == t for t in thresholds)
    assert len(pool.kept_at(thresholds[0])) == 60
    assert pool.kept_at(thresholds[-1])


# Proxies.


def test_captions_of_two_formats_are_alike_or_not(tmp_path: Path):
    rows = [item("c0", cod("red dog top."), plain("red dog top.", "dd"), kind="caption"),
            item("c1", cod("red dog top."), plain("blue car left.", "dd"), kind="caption"),
            item("c2", cod("red dog top."), cod("red dog."), kind="caption")]  # fmt: skip
    judged = {j.row["id"]: j.formats for j in pools(curated(tmp_path / "p", rows))["caption"].judged}
    assert judged == {"c0": 1.0, "c1": 0.0, "c2": None}


class Lengths(Encoder):
    """Texts are as alike as they are long."""

    name = "lengths"

    def group_similarities(self, groups: Iterable[Sequence[str]]) -> Iterator[Matrix]:
        for texts in groups:
            sizes = np.array([len(text) for text in texts], float)
            yield 1 - np.abs(sizes[:, None] - sizes[None, :]) / sizes.max()


def test_two_encoders_are_compared_where_the_first_one_decides(tmp_path: Path):
    dog, dogs, long = "red dog top left.", "red dog top right.", "one very long description of something else."
    rows = [item(f"c{i}", *(plain(text, "dd") for text in texts), kind="caption") for i, texts in enumerate([
        (dog, dog, dogs), (dog, dogs, long), (dog, dog, dog), (dog, dogs)])]  # fmt: skip
    drawn = pools(curated(tmp_path / "p", rows))["caption"].drawn
    assert {d.id for d in drawn} == {"c0", "c1", "c2"}, "two candidates are as alike to each other, whatever encodes"
    same = c.encoder_agreement(drawn, "lexical", LexicalEncoder(), include_self=True)
    assert same == c.EncoderAgreement("lexical", "lexical", 3, 2, 1.0, pytest.approx(1.0))
    turned = [replace(d, scores=tuple(1 - s for s in d.scores)) for d in drawn]
    other = c.encoder_agreement(turned, "lexical", Lengths(), include_self=True)
    assert (other.second, other.decided, other.same) == ("lengths", 2, 0.0)
    assert other.correlation is not None
    assert other.correlation < 0
    none = c.encoder_agreement([], "lexical", LexicalEncoder(), include_self=True)
    assert (none.items, none.same, none.correlation) == (0, None, None)


def test_answers_compared_as_words_have_no_encoder(tmp_path: Path):
    pool = pools(curated(tmp_path / "p", POOL))["reasoning"]
    assert (pool.encoder, pool.drawn) == ("", ())
    scored = pools(curated(tmp_path / "q", POOL, reasoning_scorer="similarity"))["reasoning"]
    assert (scored.encoder, {d.id for d in scored.drawn}) == ("lexical", {"n0", "n1", "k0", "k1"})
    assert json.loads((tmp_path / "q" / "summary.json").read_text())["encoder"] == "lexical"


@pytest.mark.parametrize(("options", "encoder"), [
    ({}, "lexical"), ({"caption_scorer": "likelihood"}, ""), ({"caption_blend": {"likelihood": 1.0}}, ""),
])  # fmt: skip
def test_only_an_encoder_s_own_scores_are_held_against_another_s(options: dict, encoder: str, tmp_path: Path):
    sure = {"logprob": -1.0, "tokens": 2}
    said = [{**plain(text, "dd"), **sure} for text in ("red dog top.", "red dog left.", "one blue cup.")]
    pool = pools(curated(tmp_path / "p", [item("c", *said, kind="caption")], **options))["caption"]
    assert (pool.encoder, len(pool.drawn)) == (encoder, bool(encoder))


@pytest.mark.parametrize("select", ["oracle", "truth"])
def test_what_the_truth_chose_has_no_threshold(select: str, tmp_path: Path):
    folder = curated(tmp_path / "p", POOL)
    assert pools(folder)
    summary = json.loads((folder / "summary.json").read_text())
    summary["config"]["select"] = select
    (folder / "summary.json").write_text(json.dumps(summary))
    assert pools(folder) == {}
