"""The recipes of real models run end to end with `scale=smoke`, on miniatures of their architectures, and say so."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from sicog_exp import smoke
from sicog_exp.cli import main
from sicog_exp.models.shapes import PUBLISHED
from sicog_exp.recipe import Recipe, RecipeError, StageConfig, load, to_yaml
from sicog_exp.reporting import report, side_by_side
from sicog_exp.reporting.export import ExportError, export

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
REAL = {"llava_qwen2_7b": "llava", "qwen2_5_vl_7b": "qwen2_5_vl", "smolvlm_2b": "smolvlm", "paper_lowres": "llava"}
"""Recipe -> its architecture."""
SWAPPED = {"name", "plan", "data", "model", "sampling", "curation", "evaluation", "closing_steps", *smoke.STAGES}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(EXPERIMENTS.parent)
    return tmp_path


def recipe_of(name: str, home: Path, *more: str) -> Recipe:
    return load(EXPERIMENTS / f"{name}.yaml", ["scale=smoke", f"store={home}/store", *more])


@pytest.mark.parametrize("name", REAL)
def test_a_recipe_of_a_real_model_runs_end_to_end(name: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["iterate", f"experiments/{name}.yaml", "scale=smoke", f"store={home}/store"]
    assert main(command) == 0, capsys.readouterr().err
    assert "Not a result: a smoke test" in capsys.readouterr().out
    (run,) = (home / "store").glob("iterate-*/")
    summary = json.loads((run / "summary.json").read_text())
    made = {artifact.partition("-")[0] for artifact in summary["artifacts"]}
    assert {"develop", "generate", "curate", "pretrain", "instruct", "evaluate"} <= made
    check_aligned(home / "store", summary["artifacts"], parts=REAL[name] == "llava")
    assert {"generate-caption", "generate-reasoning"} <= {name.rpartition("-")[0] for name in summary["artifacts"]}
    self_data = json.loads(next((home / "store").glob("curate-*/summary.json")).read_text())
    assert self_data["kept"] > 0, "the self-generated rows train"
    model = next((home / "store").glob("pretrain-*/config.json"))
    assert json.loads(model.read_text())["model_type"] == REAL[name]
    check_marked(summary, run, name)


def check_aligned(store: Path, artifacts: list[str], parts: bool) -> None:
    """A model made of parts is aligned once, before G0 is instructed; the others are not."""
    found = [artifact for artifact in artifacts if artifact.startswith("align-")]
    assert len(found) == parts
    starts = {json.loads((store / name / "manifest.json").read_text())["inputs"]["model"] for name in artifacts
              if name.startswith("instruct-")}  # fmt: skip
    assert not parts or any(found[0].removeprefix("align-") in start for start in starts)


def check_marked(summary: dict[str, Any], run: Path, name: str) -> None:
    """Nobody takes it for a result, and the registry has nothing of it."""
    from mlflow import MlflowClient

    client = MlflowClient()
    found = client.get_run(summary["run_id"])
    assert "smoke-" in found.info.run_name
    assert found.data.tags["sicog.scale"] == "smoke"
    assert client.search_registered_models() == []
    with pytest.raises(ExportError, match="is a smoke test"):
        export(summary["run_id"], run.parent.parent / "passed-on")
    page = (run / "report.html").read_text()
    assert "Not a result: a smoke test" in page.partition("</header>")[0]
    data = report.from_json((run / report.DATA).read_bytes())
    assert "a smoke test, not a result" in side_by_side.render([data, data])
    assert "smoke-" in data.name


@pytest.mark.parametrize("name", REAL)
def test_every_other_line_stays(name: str, home: Path) -> None:
    full = load(EXPERIMENTS / f"{name}.yaml", [f"store={home}/store"])
    small = smoke.sized(recipe_of(name, home))
    one, other = asdict(full), asdict(small)
    assert {key for key in one if one[key] != other[key]} <= SWAPPED | {"scale"}
    for stage in smoke.STAGES:
        changed = {key for key in one[stage] if one[stage][key] != other[stage][key]}
        assert changed <= {"steps", "batch_size", "micro_batch_size"}
        assert (one[stage]["steps"] == 0) == (other[stage]["steps"] == 0)
    assert {key for key in one["model"] if one["model"][key] != other["model"][key]} <= {"base", "language", "vision"}
    assert {key for key in one["mixture"] if one["mixture"][key] != other["mixture"][key]} == set()
    assert {key for key in one["curation"] if one["curation"][key] != other["curation"][key]} <= {
        "caption_threshold", "reasoning_threshold", "require_format", "min_words"}  # fmt: skip
    assert [one["sampling"][kind] for kind in ("cod", "dd", "cot", "direct")] == [2, 1, 2, 1]
    for split in smoke.FILES:
        before, after = one["data"][split], other["data"][split]
        assert (before is None) == (after is None)
        assert before is None or Path(before).suffix == Path(after).suffix


def test_a_smoke_test_is_the_same_again_also_from_the_recipe_that_it_logged(home: Path) -> None:
    small = smoke.sized(recipe_of("qwen2_5_vl_7b", home))
    (home / "logged.yaml").write_text(to_yaml(small))
    assert smoke.sized(load(home / "logged.yaml")) == small == smoke.sized(recipe_of("qwen2_5_vl_7b", home))
    assert len(list((home / "store/smoke").iterdir())) == 1
    full = load(EXPERIMENTS / "qwen2_5_vl_7b.yaml")
    assert smoke.sized(full) is full


def test_the_built_in_world_shrinks_and_the_shipped_base_stays(home: Path) -> None:
    small = smoke.sized(recipe_of("embedded", home))
    assert small.model.base == "embedded"
    assert (small.data.source, small.data.unlabeled_images, small.pretrain.steps) == ("world", 4, 2)
    assert small.evaluation.suite == "embedded"


def test_unlabeled_pictures_are_a_folder_where_the_recipe_names_one(home: Path) -> None:
    recipe = recipe_of("qwen2_5_vl_7b", home, "data.unlabeled=photos", "data.annotated=a.parquet")
    small = smoke.sized(recipe)
    assert len(list(Path(str(small.data.unlabeled)).glob("*.png"))) == smoke.COUNTS["unlabeled_images"]
    assert Path(str(small.data.annotated)).suffix == ".jsonl"


def test_what_has_no_miniature_and_what_is_no_run_is_said(home: Path) -> None:
    recipe = recipe_of("qwen2_5_vl_7b", home)
    language = replace(recipe, model=replace(recipe.model, base="embedded", language="x", vision="embedded"))
    with pytest.raises(RecipeError, match="no miniature of the architecture qwen2_5_vl_text; there are qwen2, llama"):
        smoke.sized(language)
    assert main(["plan", "experiments/qwen2_5_vl_7b.yaml", "scale=smoke"]) == 2
    assert all(PUBLISHED[name]().model_type for name in PUBLISHED)


@pytest.mark.parametrize(("ranks", "batch"), [(1, 4), (3, 3), (8, 8)])
def test_every_rank_has_as_many_rows(ranks: int, batch: int) -> None:
    stage = StageConfig(steps=100, batch_size=24, micro_batch_size=8)
    assert smoke._stage(stage, ranks).batch_size == batch
