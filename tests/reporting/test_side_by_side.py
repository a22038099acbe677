"""Reports drawn from MLflow alone: one run's again, several on one page, and what cannot be drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from test_report import demo, outline

from sicog_exp.cli import main
from sicog_exp.records import write_jsonl
from sicog_exp.reporting import report
from sicog_exp.reporting import side_by_side as s


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """An empty tracking store, which the commands find too."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    return MlflowClient()


def finished(client: MlflowClient, tmp_path: Path, data: report.ReportData, right: float, words: str = "Red?") -> str:
    """A finished run as the loop leaves it: what its report is drawn from, and each generation's outcomes."""
    run = client.create_run("0", run_name=data.name, tags={"sicog.level": "experiment"})
    id = run.info.run_id
    for g in range(2):
        tags = {"mlflow.parentRunId": id, "sicog.level": "generation", "sicog.generation": str(g)}
        child = client.create_run("0", run_name=f"G{g}", tags=tags)
        rows = [{"task": "world", "id": f"q{i}", "image": f"{i // 2}.png", "prompt": words,
                 "correct": float(i < right * 40)} for i in range(40)]  # fmt: skip
        write_jsonl(tmp_path / "samples.jsonl", rows)
        client.log_artifact(child.info.run_id, str(tmp_path / "samples.jsonl"), "eval")
    (tmp_path / report.DATA).write_bytes(report.to_json(replace(data, run_id=id)))
    client.log_artifact(id, str(tmp_path / report.DATA))
    return id


def test_one_run_is_drawn_as_it_was(client: MlflowClient, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    id = finished(client, tmp_path, demo(), 0.5)
    assert main(["report", id, "--out", "again/r.html"]) == 0
    assert Path("again/r.html").read_text() == report.render(replace(demo(), run_id=id))
    (generation,) = client.search_runs(["0"], "attributes.run_name = 'G1'")
    assert main(["report", generation.info.run_id]) == 0
    assert Path("report.html").read_text() == Path("again/r.html").read_text()
    assert "report: report.html" in capsys.readouterr().out


def test_runs_stand_side_by_side(client: MlflowClient, tmp_path: Path) -> None:
    recipe = "name: random\nseed: 0\niterations: 2\ncuration:\n  select: random\n"
    other = replace(demo(), name="random", recipe_yaml=recipe)
    finished(client, tmp_path, demo(), 0.5)
    finished(client, tmp_path, other, 0.75)
    s.rebuild(["embedded", "random"], Path("both.html"))
    page = Path("both.html").read_text()
    words = " ".join(outline(page).words)
    assert "B \N{MINUS SIGN} A" in words
    assert "+25.0" in words
    assert "curation.select" in words
    assert "seed" not in [row[0] for row in s._recipe_rows([s.Compared(0, demo()), s.Compared(1, other)])]
    assert page.count("<svg") == 1 + 4 + 1 + 2
    assert "http" not in page.replace("http-equiv", "")


def test_runs_that_were_asked_other_questions_are_shown_and_not_compared(client: MlflowClient, tmp_path: Path) -> None:
    ids = [finished(client, tmp_path, replace(demo(), name=name), 0.5, name) for name in ("one", "two")]
    s.rebuild(ids, Path("both.html"))
    words = " ".join(outline(Path("both.html").read_text()).words)
    assert "is not compared: world, question q0: different prompts" in words
    assert "Paired on the same questions" not in words


def test_what_cannot_be_drawn_is_named(client: MlflowClient, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for _ in range(2):
        finished(client, tmp_path, demo(), 0.5)
    stranger = client.create_run("0", run_name="not ours").info.run_id
    young = client.create_run("0", run_name="young", tags={"sicog.level": "experiment"}).info.run_id
    expected = {stranger: "is no experiment of ours", young: "holds no report.json",
                "embedded": "2 runs have this name; give one of their ids", "nobody": "neither the id nor"}  # fmt: skip
    for name, words in expected.items():
        assert main(["report", name]) == 2
        assert words in capsys.readouterr().err
    assert not Path("report.html").exists()
