"""A finished run's artifacts, made by small steps in a real store, become the report's data."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sicog_exp.curation.diagnosis import Truth
from sicog_exp.curation.files import curate_file
from sicog_exp.curation.oracle import upper_bound
from sicog_exp.evaluation.benchmarks import SAMPLES, Sample
from sicog_exp.prompts import structured
from sicog_exp.recipe import CurationConfig, EvaluationConfig, ModelConfig, Recipe, to_yaml
from sicog_exp.records import Record, conversation, write_jsonl, write_records
from sicog_exp.reporting import collect as c
from sicog_exp.reporting import side_by_side
from sicog_exp.reporting.report import ReportData, render
from sicog_exp.store import Artifact, Step, Store, Workplace

RECIPE = Recipe(name="tiny", model=ModelConfig(device="cpu"), evaluation=EvaluationConfig(bootstrap=100))
ITEMS, IMAGES = 30, 20
FAMILIES = ("counting", "naming")


@dataclass
class Generation:
    index: int
    scores: Artifact


@dataclass
class Lineage:
    data: Artifact
    generations: list[Generation]
    curated: list[Artifact]


def make(store: Store, name: str, fill: Callable[[Workplace], Any], config: Any = 0) -> Artifact:
    return store.run(Step(name, lambda config, inputs, workplace: fill(workplace) and None, {"config": config}))


def fill_data(workplace: Workplace, truth: bool = True, rejected: int = 0) -> None:
    folder = workplace.directory
    (folder / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (IMAGES, 8, 6, 3)).astype(np.uint8)
    for i in range(IMAGES):
        Image.fromarray(pixels[i]).save(folder / f"images/{i}.png")
    Image.new("RGB", (700, 350)).save(folder / "images/large.png")
    rows = [Record(f"b{i}", conversation("What?", "2", ()), (), "direct", "benchmark") for i in range(40)]
    write_records(folder / "benchmark.parquet", rows)
    write_records(folder / "development.parquet", [])
    answers = [{"id": f"u{i}:q", "answer": "red", "family": FAMILIES[i % 2]} for i in range(ITEMS)]
    captions = [{"id": f"u{i}:c", "description": "red dog top, gray background.", "family": ""} for i in range(ITEMS)]
    write_jsonl(folder / "truth.jsonl", answers + captions if truth else [])
    priors = {"counting": {"answer": "2", "share": 0.9, "questions": 10}}
    problems = {"rows": rejected, "by_problem": {"missing image": rejected} if rejected else {}}
    (folder / "summary.json").write_text(json.dumps({"blind_prior": priors, "rejected": problems}))


def fill_scores(workplace: Workplace, share: float) -> None:
    """A task on the data set in two formats, and one on another set that shares a family's name."""
    rows = []
    for kind in ("direct", "cot"):
        rows += [Sample(f"sicog_world_{kind}", f"b{i}", f"images/{i // 2}.png", FAMILIES[i % 2], kind, "p", "r", "a",
                        "2", float(i < share * 40)) for i in range(40)]  # fmt: skip
    rows += [Sample("other", f"x{i}", f"o/{i}.png", "counting", "", "p", "r", "a", str(i % 4), 1.0) for i in range(8)]
    write_jsonl(workplace.directory / SAMPLES, map(asdict, rows))
    workplace.add(samples=len(rows), tokens=500, flops=1e9)


def answers(right: int) -> list[dict]:
    """Four chains and a cut one; `right` of the four say red."""
    texts = [structured("cot", ("goal", "see", "think", "red" if k < right else f"no{k}")) for k in range(4)]
    valid = [{"kind": "cot", "text": text, "finish_reason": "stop"} for text in texts]
    return [*valid, {"kind": "direct", "text": "re", "finish_reason": "length"}]


def fill_curated(workplace: Workplace, unanimous: int, config: CurationConfig, image: str = "") -> None:
    truths = {f"u{i}:q": Truth("red") for i in range(ITEMS)}
    truths |= {f"u{i}:c": Truth("red dog top, gray background.") for i in range(ITEMS)}
    captions = [{"kind": "dd", "text": "red dog top, gray background.", "finish_reason": "stop"}] * 2
    pool = []
    for i in range(ITEMS):
        row = {"prompt": "", "image": image or f"images/{i % IMAGES}.png"}
        pool.append({"id": f"u{i}:c", "kind": "caption", **row, "candidates": captions})
        given = {**row, "prompt": f"Which color, {i}?"}
        pool.append(
            {"id": f"u{i}:q", "kind": "reasoning", **given, "candidates": answers(4 if i < unanimous else i % 4)}
        )
    write_jsonl(workplace.directory / "pool.jsonl", pool)
    judge = upper_bound(config, truths) if config.is_upper_bound else None
    curate_file(workplace.directory / "pool.jsonl", workplace.directory, config, upper_bound=judge)


def lineage(store: Store, config: CurationConfig = RECIPE.curation, shares: Sequence[float] = (0.2, 0.5, 0.9),
            image: str = "", **data: Any) -> Lineage:  # fmt: skip
    made = make(store, "data", lambda w: fill_data(w, **data))
    scores = [make(store, "evaluate", lambda w, s=s: fill_scores(w, s), s) for s in shares]
    curated = [make(store, "curate", lambda w, i=i: fill_curated(w, 6 + 6 * i, config, image), i)
               for i in range(len(shares) - 1)]  # fmt: skip
    return Lineage(made, [Generation(i, artifact) for i, artifact in enumerate(scores)], curated)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def gather(made: Lineage, recipe: Recipe = RECIPE, done: Sequence[tuple[int, Artifact]] = ()) -> ReportData:
    steps = done or [(0, made.data), *((g.index, g.scores) for g in made.generations)]
    return c.collect(recipe, made, steps, run_id="r", run_uri="sqlite:///x", date="2026-01-01", reproduce="sicog",
                     orchestration_share=0.1)  # fmt: skip


def test_everything_is_there_and_the_page_renders(store: Store):
    made = lineage(store, rejected=3)
    found = gather(made)
    assert (found.name, found.run_id, found.run_uri, found.date, found.reproduce) == (
        "tiny", "r", "sqlite:///x", "2026-01-01", "sicog")  # fmt: skip
    assert found.recipe_yaml == to_yaml(RECIPE)
    assert {"torch", "lmms-eval", "python"} <= set(found.libraries)
    page = render(found)
    assert "sicog_world" in page
    assert "data:image/png" in page
    assert render(gather(made)) == page, "equal artifacts give equal bytes"


def test_formats_of_one_task_share_its_name(store: Store):
    found = gather(lineage(store))
    tasks = [(task.task, task.format) for task in found.generations[2].tasks]
    assert tasks == [("sicog_world", "direct"), ("sicog_world", "cot"), ("other", "as asked")]
    assert [g.index for g in found.generations] == [0, 1, 2]
    assert found.generations[1].tasks[0].mean == 0.5
    assert [(d.before, d.after) for d in found.deltas if (d.task, d.format) == ("sicog_world", "cot")] == [
        ("G0", "G1"), ("G0", "G2"), ("G1", "G2")]  # fmt: skip
    assert all(d.holm_p is not None for d in found.deltas)


def test_blind_priors_are_those_of_the_task_s_own_questions(store: Store):
    direct, _, other = gather(lineage(store)).generations[0].tasks
    assert {f.family: f.blind_prior for f in direct.families} == {"counting": 0.9, "naming": None}
    assert [f.blind_prior for f in other.families] == [0.25]


def test_curation_holds_scores_qualities_and_reasons(store: Store):
    found = gather(lineage(store, CurationConfig(reasoning_threshold=0.75, dedup=False))).curation
    assert [one.iteration for one in found] == [0, 1]
    captions, reasoning = found[0].groups
    assert (captions.group, captions.kept, captions.random_quality, captions.threshold) == ("caption", ITEMS, 1.0, 0.85)
    assert (reasoning.threshold, len(reasoning.best), reasoning.quality_name) == (0.75, ITEMS, "right")
    assert reasoning.kept == 6 + 6 == sum(best.score >= 0.75 for best in reasoning.best)
    assert dict(found[0].set_aside) == {"candidates truncated": ITEMS, "items below threshold": ITEMS - 12}
    assert ("reasoning scored by", "agreement") in found[0].settings
    assert ("caption scored by", "similarity") in found[0].settings
    assert ("format required", "yes") in found[0].settings


def test_the_control_without_curation_has_no_threshold(store: Store):
    groups = gather(lineage(store, CurationConfig(select="random"))).curation[0].groups
    assert [(g.threshold, g.kept) for g in groups] == [(0.0, ITEMS), (0.0, ITEMS)]


def test_the_share_of_the_ceiling_is_shown(store: Store):
    """Of 30 questions 24 have 0, 1, 2 or 3 of four chains right, six all; the vote finds 2 and 3, a third of the 1."""
    made = lineage(store, CurationConfig(reasoning_threshold=0.75, dedup=False))
    found = gather(made)
    captions, reasoning = found.curation[0].groups
    named = c.curation_metrics(made.curated[0], made.data)
    assert (captions.oracle_quality, captions.ceiling_share) == (1.0, None)
    assert reasoning.oracle_quality == named["curation/reasoning/precision_oracle"] == 24 / 30
    assert reasoning.ceiling_share == named["curation/reasoning/ceiling_share"]
    chosen = named["curation/reasoning/precision_chosen"]
    assert reasoning.random_quality is not None
    assert reasoning.ceiling_share == (chosen - reasoning.random_quality) / (24 / 30 - reasoning.random_quality)
    assert "curation/caption/ceiling_share" not in named
    assert f"<td>{100 * reasoning.ceiling_share:.1f}%</td>" in render(found)


@pytest.mark.parametrize("select", ["oracle", "truth"])
def test_upper_bounds_cannot_be_taken_for_results(store: Store, select: Any):
    config = CurationConfig(select=select)
    recipe = replace(RECIPE, curation=config)
    found = gather(lineage(store, config), recipe)
    assert found.upper_bound.startswith(f"Not a result: an upper bound. curation.select={select} looked at the truth")
    assert any("which chose the self-data here" in note for note in found.notes)
    reasoning = found.curation[0].groups[1]
    assert reasoning.kept == (24 if select == "oracle" else ITEMS)
    assert (reasoning.threshold, len(reasoning.best)) == (0.0, ITEMS)
    assert (reasoning.ceiling_share is None) == (select == "truth")
    assert "Not a result: an upper bound." in render(found).partition("</header>")[0]
    assert "an upper bound, not a result" in side_by_side.render([found, found])
    assert c.upper_bound_note(replace(recipe, self_data=False)) == c.upper_bound_note(RECIPE) == ""


def test_cost_lists_every_artifact_once(store: Store):
    made = lineage(store)
    again = replace(made.data, cached=True)
    scores = made.generations[0].scores
    found = gather(made, done=[(0, made.data), (0, scores), (1, again), (1, replace(scores, cached=True))]).cost
    assert found is not None
    assert [(row.generation, row.stage, row.cached) for row in found.rows] == [
        (0, "data", False),
        (0, "evaluate", False),
    ]
    assert (found.rows[1].samples, found.rows[1].tokens, found.rows[1].flops) == (88, 500, 1e9)
    assert (found.rows[0].samples, found.rows[0].flops) == (None, None)
    assert found.rows[0].seconds == made.data.facts["seconds"] > 0
    assert found.rows[0].peak_mb > 0
    assert found.orchestration_share == 0.1
    assert found.device.startswith("2 CPU threads")


def test_gallery_is_balanced_seeded_and_shows_pictures(store: Store):
    made = lineage(store, CurationConfig(reasoning_threshold=0.75, dedup=False))
    found = gather(made).gallery
    assert len({sample.id for sample in found}) == c.GALLERY_SIZE
    # Every caption is kept: the room of captions that were not goes to the other three kinds of sample.
    assert Counter((s.group, s.kept) for s in found) == {
        ("caption", True): 8, ("reasoning", True): 8, ("reasoning", False): 8}  # fmt: skip
    assert gather(made).gallery == found
    assert gather(made, replace(RECIPE, seed=1)).gallery != found
    assert {sample.iteration for sample in found} == {1}
    for sample in found:
        assert sample.png is not None
        assert Image.open(io.BytesIO(sample.png)).size == (18, 24)


def test_enlarged_pictures_keep_their_pixels(store: Store):
    made = lineage(store)
    sample = gather(made).gallery[0]
    assert sample.png is not None
    number = int(sample.id[1:].split(":")[0]) % IMAGES
    small = np.asarray(Image.open(made.data / f"images/{number}.png"))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample.png))), small.repeat(3, 0).repeat(3, 1))


def test_large_pictures_are_made_small(store: Store):
    found = gather(lineage(store, image="images/large.png")).gallery
    assert {Image.open(io.BytesIO(sample.png or b"")).size for sample in found} == {(256, 128)}


def test_candidates_carry_score_finish_choice_and_truth(store: Store):
    found = gather(lineage(store)).gallery
    sample = next(s for s in found if s.group == "reasoning" and s.kept)
    *valid, cut = sample.candidates
    assert (sample.truth, sample.question[:13]) == ("red", "Which color, ")
    assert [one.chosen for one in valid] == [True, False, False, False], "one choice, though all say the same"
    assert {(one.kind, one.score, one.finish_reason, one.right) for one in valid} == {("cot", 1.0, "stop", True)}
    assert (cut.kind, cut.score, cut.finish_reason, cut.right, cut.chosen) == ("direct", None, "length", None, False)
    caption = next(s for s in found if s.group == "caption")
    assert (caption.question, caption.candidates[0].right) == ("", True)
    assert any(one.right is False for s in found for one in s.candidates)


def test_notes_say_what_a_reader_must_know(store: Store):
    notes = "\n".join(gather(lineage(store, rejected=3, shares=(0.2, 0.9, 0.5))).notes)
    assert "3 rows of the data were set aside (missing image 3); rejected.jsonl in data-" in notes
    assert "30 of 210 candidates of G1 were set aside (truncated 30)." in notes
    assert (
        "sicog_world (cot): G2 answers 50.0% of the counting questions right, below the blind prior of 90.0%." in notes
    )
    assert "naming" not in notes
    assert "unanimously: 20.0% by G0 (100.0% of them right), 40.0% by G1 (100.0% of them right)." in notes
    assert "Later pools hold the earlier candidates too." in notes
    assert "Sureness grew" not in notes
    assert "One seed" in notes
    assert "development split" not in notes


def test_notes_warn_when_sureness_outgrows_correctness(store: Store):
    def fill(workplace: Workplace, wrong: int) -> None:
        fill_curated(workplace, 6, RECIPE.curation)
        pool = [json.loads(line) for line in (workplace.directory / "pool.jsonl").read_text().splitlines()]
        for row in [row for row in pool if row["kind"] == "reasoning"][-wrong:]:
            row["candidates"] = [{"kind": "direct", "text": "wrong", "finish_reason": "stop"}] * 2
        write_jsonl(workplace.directory / "pool.jsonl", pool)
        curate_file(workplace.directory / "pool.jsonl", workplace.directory, RECIPE.curation)

    made = lineage(store)
    made.curated[1] = make(store, "curate", lambda w: fill(w, 5), "wrong")
    assert any("Sureness grew and correctness did not." in note for note in gather(made).notes)


def test_scores_of_the_development_split_are_marked(store: Store):
    recipe = replace(RECIPE, evaluation=replace(RECIPE.evaluation, split="development"))
    assert "development split" in gather(lineage(store), recipe).notes[0]
    assert c._name("sicog_world_direct_development", "direct") == "sicog_world_development"


def test_the_annotated_only_control_has_neither_curation_nor_gallery(store: Store):
    made = replace(lineage(store), curated=[])
    found = gather(made)
    assert (found.curation, found.gallery) == ((), ())
    assert not any("truth" in note for note in found.notes)
    render(found)


def test_without_truth_qualities_are_unknown(store: Store):
    made = lineage(store, truth=False)
    found = gather(made)
    assert {best.quality for one in found.curation for group in one.groups for best in group.best} == {None}
    assert {(s.truth, one.right) for s in found.gallery for one in s.candidates} == {(None, None)}
    assert not any("truth" in note or "unanimously" in note for note in found.notes)
    render(found)
    named = c.curation_metrics(made.curated[0], made.data)
    assert not any("precision" in name for name in named)


def test_curation_metrics_have_the_same_names_everywhere(store: Store):
    made = lineage(store, CurationConfig(reasoning_threshold=0.75, dedup=False))
    named = [c.curation_metrics(curated, made.data) for curated in made.curated]
    assert named[0].keys() == named[1].keys()
    wanted = {"keep_rate", "kept", "mean_score", "precision_kept", "precision_chosen", "precision_random",
              "gain_choosing", "gain_families", "gain_items"}  # fmt: skip
    assert {f"curation/{group}/{name}" for group in ("caption", "reasoning") for name in wanted} <= named[0].keys()
    assert named[0]["curation/reasoning/kept"] == 12
    assert named[0]["curation/reasoning/keep_rate"] == 0.4
    assert named[0]["curation/reasoning/unanimous_share"] == 0.2
    assert named[0]["curation/reasoning/precision_kept"] == 1.0
    parts = [named[0][f"curation/reasoning/gain_{name}"] for name in ("choosing", "families", "items")]
    assert sum(parts) == pytest.approx(1.0 - named[0]["curation/reasoning/precision_random"])
