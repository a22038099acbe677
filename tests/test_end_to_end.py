"""`mlflow run` from outside: the loop, its no-op, its tracking, its models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import REPOSITORY, arguments, finish, outputs

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture
def run(tiny_run: tuple[Path, str]) -> tuple[Path, str]:
    return tiny_run


def iterate_folder(folder: Path) -> Path:
    return next(path for path in (folder / "store").glob("iterate-*") if (path / "manifest.json").is_file())


def test_terminal_summary_names_generations_report_and_ui(run: tuple[Path, str]) -> None:
    _, printed = run
    for expected in ("G0", "G1", "G2", "report.html", "make ui", "G2 - G0"):
        assert expected in printed


def test_second_run_is_a_no_op_that_says_so(run: tuple[Path, str], tiny_model: Path) -> None:
    folder, _ = run
    before = outputs(folder / "store")
    printed = finish(arguments(tiny_model, folder / "store"), folder)
    assert "nothing to do" in printed
    assert outputs(folder / "store") == before


def test_a_damaged_step_is_made_again_with_the_same_bytes(run: tuple[Path, str], tiny_model: Path) -> None:
    folder, _ = run
    before = outputs(folder / "store")
    victim = next((folder / "store").glob("curate-*/curated.jsonl"))
    victim.write_text("damaged")
    printed = finish(arguments(tiny_model, folder / "store"), folder)
    assert "damaged" in printed
    assert {name: before[name] for name in before} == {
        name: value for name, value in outputs(folder / "store").items() if "damaged" not in name}  # fmt: skip


def test_generations_are_comparable_in_mlflow(run: tuple[Path, str]) -> None:
    from mlflow import MlflowClient

    folder, _ = run
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("end-to-end")
    runs = client.search_runs([experiment.experiment_id], max_results=500)
    parent = next(r for r in runs if r.data.tags.get("sicog.level") == "experiment")
    assert parent.info.status == "FINISHED"
    generations = [r for r in runs if r.data.tags.get("sicog.level") == "generation"
                   and r.data.tags["mlflow.parentRunId"] == parent.info.run_id]  # fmt: skip
    assert len(generations) == 3
    scores = [{name for name in r.data.metrics if name.startswith("eval/")} for r in generations]
    assert scores[0] == scores[1] == scores[2] != set()
    history = client.get_metric_history(parent.info.run_id, "eval/sicog_world_direct/accuracy")
    assert sorted(point.step for point in history) == [0, 1, 2]
    steps = [r for r in runs if r.data.tags.get("sicog.level") == "step"]
    assert {r.data.tags["mlflow.parentRunId"] for r in steps} <= {r.info.run_id for r in generations}


def test_models_load_with_plain_transformers(run: tuple[Path, str]) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder, _ = run
    summary = json.loads((iterate_folder(folder) / "summary.json").read_text())
    for name in summary["models"]:
        path = folder / "store" / name
        assert AutoModelForImageTextToText.from_pretrained(path) is not None
        assert AutoProcessor.from_pretrained(path).tokenizer.chat_template


def test_the_resolved_recipe_runs_again_as_it_is(run: tuple[Path, str], tmp_path: Path) -> None:
    import yaml
    from mlflow import MlflowClient

    from sicog_exp.recipe import load

    folder, _ = run
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    summary = json.loads((iterate_folder(folder) / "summary.json").read_text())
    path = client.download_artifacts(summary["run_id"], "recipe.yaml", str(tmp_path))
    assert load(path).store == str(folder / "store")
    assert yaml.safe_load(Path(path).read_text())["iterations"] == 2


def test_nothing_is_littered_into_the_checkout(run: tuple[Path, str]) -> None:
    for name in ("submissions", "lightning_logs", "checkpoints"):
        assert not (REPOSITORY / name).exists()


def test_two_runs_at_once_share_a_store(tiny_model: Path, tmp_path: Path) -> None:
    from runs import start

    command = arguments(tiny_model, tmp_path / "store", "iterations=1")
    both = [start(command, tmp_path) for _ in range(2)]
    printed = [process.communicate(timeout=900)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    alone = tmp_path / "alone"
    finish(arguments(tiny_model, alone, "iterations=1"), tmp_path)
    assert outputs(tmp_path / "store") == outputs(alone)
