"""`sicog curation`: from a folder or from MLflow alone the same sweep, as a table, a page, JSON, and in the report."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import mlflow
import pytest
from mlflow import MlflowClient
from test_report import ATTACK, demo, outline

from sicog_exp.cli import main
from sicog_exp.curation.calibration import Calibration
from sicog_exp.curation.files import curate_file
from sicog_exp.evaluation.statistics import interval
from sicog_exp.prompts import final_text, structured
from sicog_exp.recipe import CurationConfig
from sicog_exp.records import read_jsonl, write_jsonl
from sicog_exp.reporting import charts, report
from sicog_exp.reporting import curation_page as page

FAMILIES = ("naming", "counting", "relation")


def pool() -> list[dict[str, Any]]:
    """60 questions, the first family's answered alike and rightly more often than the last one's; 20 captions."""
    rows = []
    for i in range(60):
        right = 4 - (i % 3) - (i // 3) % 2
        texts = [structured("cot", ("goal", f"red dog {k}", "because", "red" if k < right else f"no{k}")) for k in
                 range(4)]  # fmt: skip
        chains = [{"kind": "cot", "text": text, "finish_reason": "stop"} for text in texts]
        direct = {"kind": "direct", "text": "red" if i % 3 == 0 else "blue", "finish_reason": "stop"}
        rows.append({"id": f"q{i:02}", "kind": "reasoning", "prompt": f"Which color, {i}?", "image": f"{i // 2}.png",
                     "candidates": [*chains, direct]})  # fmt: skip
    for i in range(20):
        said = ("red dog top, gray background.", "red dog top, gray background.", f"blue cup {i}, red dog top.")
        captions = [{"kind": "dd", "text": text, "finish_reason": "stop"} for text in said]
        rows.append({"id": f"c{i:02}", "kind": "caption", "prompt": "", "image": f"{i}.png", "candidates": captions})
    return rows


TRUTH: list[dict[str, Any]] = [{"id": f"q{i:02}", "answer": "red", "family": FAMILIES[i % 3]} for i in range(60)]
TRUTH += [{"id": f"c{i:02}", "description": "red dog top, blue cup left.", "family": ""} for i in range(20)]


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tracking store of all these tests lies: MLflow takes seconds to make one."""
    return tmp_path_factory.mktemp("tracking")


@pytest.fixture(autouse=True)
def home(tracking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tracking}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def artifact(home: Path) -> Path:
    """A curation step's folder beside its data set's, as the store leaves them."""
    folder, data = home / "store" / "curate-1", home / "store" / "data-feed"
    folder.mkdir(parents=True)
    data.mkdir()
    write_jsonl(folder / "pool.jsonl", pool())
    write_jsonl(data / "truth.jsonl", TRUTH)
    curate_file(folder / "pool.jsonl", folder, CurationConfig(reasoning_threshold=0.55, caption_threshold=0.7))
    (folder / "manifest.json").write_text(json.dumps({"inputs": {"data": "feed"}}))
    return folder


def groups(folder: Path) -> Mapping[str, Calibration]:
    return {one.group: one for one in page.read(str(folder)).iterations[0].groups}


def test_a_store_s_folder_becomes_a_table_and_a_page(artifact: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["curation", str(artifact), "--out", "new/page.html"]) == 0
    printed = capsys.readouterr().out
    for expected in ("0.55 today", "right, %", "of them are right.", "Proxies for truth, which they are not:",
                     "page: new/page.html", "easier question families"):  # fmt: skip
        assert expected in printed, expected
    parser = outline(Path("new/page.html").read_text())
    words = " ".join(parser.words)
    for expected in ("curate-1: curation under every threshold", "today", "Where the quality comes from", "relation",
                     "Agreement stands in for truth here and is no measure of it"):  # fmt: skip
        assert expected in words, expected
    assert all((attrs.get(name) or "#").startswith("#") for _, attrs in parser.tags for name in ("src", "href"))
    assert all(attrs.get("scope") for tag, attrs in parser.tags if tag == "th")


def test_json_holds_every_figure_as_a_fraction(artifact: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["curation", str(artifact), "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    (iteration,) = read["iterations"]
    reasoning = next(one for one in iteration["groups"] if one["group"] == "reasoning")
    found = groups(artifact)["reasoning"]
    assert found.today is not None
    level = reasoning["levels"][found.today]
    assert (level["threshold"], level["kept"]) == (0.55, found.kept)
    assert level["keep_rate"] == found.kept / 60
    assert level["precision"]["low"] <= level["precision"]["mean"] <= level["precision"]["high"] <= 1
    assert Path("curation.html").is_file()


def test_intervals_resample_images(artifact: Path) -> None:
    found = groups(artifact)["reasoning"]
    level = found.levels[0]
    assert level.kept == 60
    chosen = [row for row in read_jsonl(artifact / "curated.jsonl") if row["kind"] == "reasoning"]
    right = [float(final_text(row["chosen_kind"], row["chosen"]) == "red") for row in chosen]
    expected = interval(right, [row["image"] for row in chosen])
    assert level.precision
    assert (level.precision.mean, level.precision.low, level.precision.high, expected.clusters) == (
        expected.mean, expected.low, expected.high, 30)  # fmt: skip


def test_a_folder_of_sicog_curate_takes_candidates_and_truth(home: Path, capsys: pytest.CaptureFixture) -> None:
    write_jsonl(home / "mine.jsonl", pool()[:60])
    write_jsonl(home / "truth.jsonl", TRUTH[:60])
    assert main(["curate", "--candidates", "mine.jsonl", "--out", "out", "curation.reasoning_threshold=0.55"]) == 0
    assert main(["curation", "out"]) == 0
    alone = capsys.readouterr().out
    assert "Whether they are right is not known here." in alone
    assert "no item has valid candidates of both formats at hand" in alone
    assert main(["curation", "out", "--candidates", "mine.jsonl", "--truth", "truth.jsonl"]) == 0
    whole = capsys.readouterr().out
    assert "of them are right." in whole
    assert "most frequent answer of the other format" in whole
    write_jsonl(home / "bad.jsonl", [{"id": "q00", "text": "red"}])
    assert main(["curation", "out", "--truth", "bad.jsonl"]) == 2
    assert "--truth bad.jsonl: KeyError 'description'; write a JSON object a line" in capsys.readouterr().err


def finished(artifact: Path, name: str = "mine", **changes: Any) -> str:
    """A finished run as the loop leaves it in MLflow; the store is not needed any more."""
    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    client = MlflowClient()
    place = client.get_experiment_by_name("pages")
    home = place.experiment_id if place else client.create_experiment("pages", (Path.cwd() / "artifacts").as_uri())
    run = client.create_run(home, run_name=name, tags={"sicog.level": "experiment", "sicog.recipe": name})
    id = run.info.run_id
    tags = {"mlflow.parentRunId": id, "sicog.level": "generation", "sicog.generation": "1"}
    child = client.create_run(home, run_name=f"G1 {name}", tags=tags).info.run_id
    client.log_param(child, "origin.curated", artifact.name)
    client.log_text(child, page.drawn_lines(artifact), f"{page.SELF_DATA}/{page.DRAWN}")
    data = replace(demo(), name=name, run_id=id, **{"calibration": (groups(artifact),), **changes})
    client.log_text(id, report.to_json(data).decode(), report.DATA)
    return id


def test_a_run_shows_from_mlflow_what_its_folder_shows(artifact: Path, capsys: pytest.CaptureFixture) -> None:
    main(["curation", str(artifact), "--json"])
    folder = json.loads(capsys.readouterr().out)["iterations"][0]["groups"]
    id = finished(artifact)
    artifact.rename(artifact.with_name("elsewhere"))
    for name in (id, "mine"):
        assert main(["curation", name, "--json"]) == 0
        (iteration,) = json.loads(capsys.readouterr().out)["iterations"]
        assert iteration == {"title": "Candidates of G0, training data of G1", "groups": folder}


def test_another_encoder_is_compared_on_what_the_run_keeps(artifact: Path, capsys: pytest.CaptureFixture) -> None:
    embedded = {group: replace(one, encoder=one.encoder and "minilm") for group, one in groups(artifact).items()}
    finished(artifact, "embedded by minilm", calibration=(embedded,))
    assert main(["curation", "embedded by minilm", "--encoder", "lexical"]) == 0
    printed = capsys.readouterr().out
    assert "Encoders: minilm and lexical on 20 drawn items; minilm prefers a candidate in 20" in printed
    assert "Encoders: nothing to compare, no encoder alone gave these scores." in printed
    words = " ".join(outline(Path("curation.html").read_text()).words)
    assert "but what the second encoder compared" in words


def test_an_embedding_s_scores_are_held_against_the_lexical_ones_unasked(artifact: Path) -> None:
    summary = json.loads((artifact / "summary.json").read_text())
    (artifact / "summary.json").write_text(json.dumps({**summary, "encoder": "minilm"}))
    found = groups(artifact)["caption"].encoders
    assert found
    assert (found.first, found.second, found.items, found.same) == ("minilm", "lexical", 20, 1.0)


def test_what_cannot_be_swept_is_named(artifact: Path, home: Path, capsys: pytest.CaptureFixture) -> None:
    (home / "empty").mkdir()
    finished(artifact, "old", calibration=())
    finished(artifact, "none", calibration=(), curation=())
    cases = {
        ("empty",): "empty: no curated.jsonl there; name a folder that `sicog curate` wrote",
        ("old",): "keeps no sweep: an older version made it. Name its curation folders in the step store instead: "
                  "curate-1",
        ("none",): "curated nothing: its generations were trained on annotated rows alone",
        ("old", "--truth", "t.jsonl"): "old: no folder; --candidates and --truth go with one",
        ("nobody",): "nobody: neither the id nor the name of a run",
        (str(artifact), "--encoder", "no/such/folder/x"): "curation.encoder='no/such/folder/x' cannot be used",
    }  # fmt: skip
    for arguments, words in cases.items():
        assert main(["curation", *arguments]) == 2
        assert words in capsys.readouterr().err
    summary = json.loads((artifact / "summary.json").read_text())
    (artifact / "summary.json").write_text(json.dumps(summary | {"config": {**summary["config"], "select": "oracle"}}))
    assert main(["curation", str(artifact)]) == 2
    assert "its candidates were chosen by the truth" in capsys.readouterr().err
    assert not Path("curation.html").exists()


def test_the_report_says_whether_the_kept_are_better_or_easier(artifact: Path) -> None:
    data = replace(demo(), calibration=(groups(artifact), groups(artifact)))
    shown = report.render(report.from_json(report.to_json(data)))
    assert shown == report.render(data)
    words = " ".join(outline(shown).words)
    for expected in ("Reasoning: better, or easier?", "from keeping easier question families", "How easy",
                     "Without truth: proxies", "sicog curation"):  # fmt: skip
        assert expected in words, expected
    assert "better, or easier" not in report.render(demo()), "a report of an older version has none"


def test_texts_are_escaped_and_rules_beside_the_threshold_named(artifact: Path) -> None:
    found = groups(artifact)["reasoning"]
    families = tuple(replace(family, name=ATTACK + family.name) for family in found.families)
    hostile = replace(found, families=families, quality_name=ATTACK, encoder=ATTACK, kept=1)
    page.write(page.Found(ATTACK, (page.Iteration(ATTACK, (hostile,)),)), Path("page.html"))
    parser = outline(Path("page.html").read_text())
    assert not {"script", "img"} & {tag for tag, _ in parser.tags}
    assert "The run itself kept 1: rules beside threshold" in " ".join(parser.words)


# The charts.


def test_curves_are_steps_through_what_is_known() -> None:
    curve = charts.Curve("right", (0.2, None, 0.4, 0.8), band=((0.1, 0.3), None, (0.3, 0.5), (0.7, 0.9)))
    drawn = charts.by_threshold([curve], [0.25, 0.5, 0.75, 1.0], 0.6, "%", "Label")
    root = ElementTree.fromstring(drawn)
    (line,) = (part for part in root.iter() if part.tag == "polyline")
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    assert len(points) == 5
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert points[1][1] == points[2][1], "up to the third score its value holds"
    assert sum(part.tag == "circle" for part in root) == 3
    assert sum(part.tag == "polygon" for part in root) == 1
    assert "threshold 0.6" in drawn


@pytest.mark.parametrize("shares", [True, False])
def test_every_chart_is_drawn_inside_its_frame(artifact: Path, shares: bool) -> None:
    one = charts.by_threshold([charts.Curve("a", (0.5,))], [1.0], None, "%", "One", shares)
    none = charts.by_threshold([charts.Curve("a", (None,))], [0.4], 0.4, "%", "None", shares)
    page.write(page.read(str(artifact)), Path("page.html"))
    drawings = [one, none, *re.findall(r"<svg.*?</svg>", Path("page.html").read_text(), re.DOTALL)]
    assert len(drawings) > 10
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        width, height = map(float, root.attrib["viewBox"].split()[2:])
        for element in root.iter():
            for name, limit in (("x", width), ("x1", width), ("cx", width), ("y", height), ("cy", height)):
                assert -1 <= float(element.attrib.get(name, 0)) <= limit + 1
        assert "nan" not in drawing
