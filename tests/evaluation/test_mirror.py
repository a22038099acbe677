"""The paper's stock tasks over local copies: small files in the stock schemas, scored by the stock functions."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import stock_data
import yaml
from oracle import OracleEngine

from sicog_exp.ahead import left_out
from sicog_exp.cli import main
from sicog_exp.evaluation.benchmarks import evaluate, read_samples
from sicog_exp.evaluation.compare import deltas
from sicog_exp.evaluation.mirror import copies, mirror
from sicog_exp.evaluation.overview import listed
from sicog_exp.evaluation.ready import check_suite
from sicog_exp.evaluation.stock import TaskData
from sicog_exp.evaluation.suites import BenchmarkError, Suite, load_suite, suite_state
from sicog_exp.generation.engine import Request
from sicog_exp.recipe import EvaluationConfig, RecipeError, load, load_as

CONFIG = EvaluationConfig(batch_size=4, max_new_tokens=64)
STOCK = stock_data.stock()
JUDGED = stock_data.judged()


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of every data set that the rule-scored tasks read."""
    folder = tmp_path_factory.mktemp("copies")
    stock_data.write(folder, STOCK)
    return folder


@pytest.fixture(scope="module")
def paper(copied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mirrored suite's file."""
    made = mirror("paper", copied, tmp_path_factory.mktemp("mirrored"))
    assert [one.task.task for one in made.tasks] == list(STOCK)
    assert len(made.notes) == 2
    assert all("scored by a judge; no copy of" in note for note in made.notes)
    return made.suite


def test_a_mirror_is_one_folder(paper: Path, scored: tuple[Path, Path]):
    assert sorted(path.name for path in paper.parent.iterdir()) == ["cache", "paper", "paper.yaml"]
    assert sorted(path.stem for path in (paper.parent / "paper").iterdir()) == sorted(f"{name}_local" for name in STOCK)


def truth(request: Request) -> str:
    task, document, _ = request.sample_id.split("/")
    return (STOCK | JUDGED)[task.removesuffix("_local")].answers[int(document)]


def nearly(request: Request) -> str:
    """Right but for: a circular variant, one question of a pair, a letter of a date."""
    task, document, _ = request.sample_id.split("/")
    if (task, document) in (("mmbench_en_dev_static_local", "2"), ("mme_local", "0")):
        return {"B": "A", "yes": "no"}[truth(request)]
    return truth(request).replace("january", "januari") if task == "docvqa_val_local" else truth(request)


@pytest.fixture(scope="module")
def scored(paper: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Evaluations of an oracle and of one that is nearly right."""
    folder = tmp_path_factory.mktemp("scored")
    for name, answer in (("right", truth), ("nearly", nearly)):
        evaluate(OracleEngine(answer), load_suite(str(paper)), folder, CONFIG, folder / name)
    return folder / "right", folder / "nearly"


def test_an_oracle_scores_one_on_every_rule_scored_benchmark(scored: tuple[Path, Path]):
    scores = json.loads((scored[0] / "scores.json").read_text())["tasks"]
    assert {name: task["accuracy"] for name, task in scores.items()} == {f"{name}_local": 1.0 for name in STOCK}
    counts = {name: task["n"] for name, task in scores.items()}
    assert (counts["mmbench_en_dev_static_local"], counts["mme_local"]) == (2, 2), "variants and pairs are one question"
    assert counts["pope_local"] == 4
    assert set(scores["pope_local"]["families"]) == {"random", "adversarial"}
    assert set(scores["mme_local"]["families"]) == {"existence", "count"}, "cognition is no part of perception"


def test_the_stock_aggregates_are_kept(scored: tuple[Path, Path]):
    results = json.loads((scored[0] / "results.json").read_text())["results"]
    assert results["mme_local"]["mme_perception_score,none"] == 400
    assert results["mmbench_en_dev_static_local"]["gpt_eval_score,none"] == 100
    assert results["ocrbench_local"]["ocrbench_accuracy,none"] == 3 / 1000
    assert results["ai2d_local"]["exact_match,flexible-extract"] == 1


def test_values_between_wrong_and_right_are_kept_per_question(scored: tuple[Path, Path]):
    samples = read_samples(scored[1])
    values = {task: [s.correct for s in samples if s.task == task] for task in dict.fromkeys(s.task for s in samples)}
    assert values["mmbench_en_dev_static_local"] == [0.0, 1.0], "one wrong variant makes the question wrong"
    assert values["mme_local"] == [0.25, 1.0], "half the accuracy, not both right: 50 of 200"
    expected = 1 - 1 / len("january 10")
    assert values["docvqa_val_local"] == pytest.approx([expected] * 3)
    assert all(set(found) == {1.0} for task, found in values.items() if task.split("_")[0] not in
               ("mmbench", "mme", "docvqa"))  # fmt: skip
    results = json.loads((scored[1] / "results.json").read_text())["results"]
    assert results["docvqa_val_local"]["anls,none"] == pytest.approx(expected)
    assert results["mme_local"]["mme_perception_score,none"] == 250
    assert results["mmbench_en_dev_static_local"]["gpt_eval_score,none"] == 50


def test_metrics_that_are_not_0_or_1_are_compared_by_bootstrap_alone(scored: tuple[Path, Path]):
    found = {delta.task: delta for delta in deltas(scored, resamples=200)}
    for task in ("docvqa_val_local", "mme_local"):
        assert found[task].mcnemar_p is None
        assert found[task].low <= found[task].difference < 0
    assert found["mmbench_en_dev_static_local"].mcnemar_p == 1.0


def test_questions_about_one_picture_are_one_cluster(scored: tuple[Path, Path]):
    shown = {s.id: s.image for s in read_samples(scored[0]) if s.task == "pope_local"}
    assert shown["0"] == shown["1"] != shown["2"] == shown["3"]


def test_missing_copies_are_named_with_what_to_download(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "lmms-lab-encoder").mkdir()
    (tmp_path / "lmms-lab-encoder" / "POPE").symlink_to(copied / "lmms-lab-encoder" / "POPE")
    assert main(["benchmarks", "mirror", "paper", "--from", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "no copies for 9 of 12 tasks" in said
    assert "docvqa_val: lmms-lab-encoder/DocVQA, configuration DocVQA, split validation" in said
    wanted = tmp_path / "Lin-Chen/MMStar"
    assert f"hf download Lin-Chen/MMStar --repo-type dataset --local-dir {wanted}" in said
    assert "POPE" not in said
    assert "MMVet" not in said
    assert not (tmp_path / "out").exists()


def test_a_copy_with_other_columns_is_named(tmp_path: Path):
    rows = tuple(({"image": row["image"], "answer": row["answer"]}, said) for row, said in STOCK["pope"].rows)
    stock_data.write(tmp_path, {"pope": stock_data.Stock(STOCK["pope"].files, rows)})
    (tmp_path / "suite.yaml").write_text("name: s\nbenchmark: [{task: pope, metric: pope_accuracy}]\n")
    with pytest.raises(BenchmarkError, match=r"pope over .*test-00000-of-00001.parquet: KeyError: 'question'"):
        mirror(str(tmp_path / "suite.yaml"), tmp_path, tmp_path / "out")


def test_a_suite_without_hub_tasks_has_nothing_to_mirror(tmp_path: Path):
    with pytest.raises(BenchmarkError, match="nothing to mirror"):
        mirror("embedded", tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "config", "split", "found"),
    [
        ("data/test-00000-of-00001.parquet", None, "test", True),
        ("data/test-00000-of-00001.parquet", None, "val", False),
        ("data/test-00000-of-00001.parquet", "Full", "test", False),
        ("Full/test-00000-of-00001.parquet", "Full", "test", True),
        ("Full/test-00000-of-00001.parquet", None, "test", False),
        ("default/test/0000.parquet", None, "test", True),
        ("test.parquet", None, "test", True),
        ("test.jsonl", None, "test", True),
        ("test.tsv", None, "test", False),
        ("testmini-00000-of-00001.parquet", None, "test", False),
    ],
)
def test_a_split_is_found_by_its_name(tmp_path: Path, name: str, config: str | None, split: str, found: bool):
    file = tmp_path / "them" / "SET" / name
    file.parent.mkdir(parents=True)
    file.touch()
    assert copies(tmp_path, TaskData("them/SET", config, split, True)) == ((file,) if found else ())
    assert copies(tmp_path / "them", TaskData("them/SET", config, split, True)) == ((file,) if found else ())


def test_a_readme_names_the_files_of_its_configurations(tmp_path: Path):
    files = {"a": "a/*.parquet", "b": ["b1.parquet", "b2.parquet"]}
    configs = [{"config_name": name, "data_files": [{"split": "test", "path": path}]} for name, path in files.items()]
    folder = tmp_path / "SET"
    (folder / "a").mkdir(parents=True)
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\nWords --- and more.\n")
    for name in ("a/x.parquet", "b1.parquet", "b2.parquet"):
        (folder / name).touch()
    for config, expected in (("a", ["a/x.parquet"]), ("b", ["b1.parquet", "b2.parquet"]), (None, [])):
        found = copies(tmp_path, TaskData("them/SET", config, "test", False))
        assert [str(file.relative_to(folder)) for file in found] == expected


@pytest.mark.parametrize("path", ["../secret.json", "a/../../secret.json", "{}/secret.json", "", 3])
def test_a_readme_names_no_file_outside_of_its_folder(tmp_path: Path, path: str | int):
    (tmp_path / "SET" / "a").mkdir(parents=True)
    (tmp_path / "secret.json").write_text("{}")
    declared = [{"split": "test", "path": path.format(tmp_path) if isinstance(path, str) else [path]}]
    front = yaml.safe_dump({"configs": [{"config_name": "default", "data_files": declared}]})
    (tmp_path / "SET" / "README.md").write_text(f"---\n{front}---\n")
    with pytest.raises(BenchmarkError, match=r"SET/README\.md: its configs name"):
        copies(tmp_path, TaskData("them/SET", None, "test", False))


def test_what_a_suite_holds_is_listed(paper: Path, capsys: pytest.CaptureFixture):
    rows = {row.task: row for row in listed("paper")}
    assert list(rows) == [*STOCK, *JUDGED]
    assert {row.place for row in rows.values()} == {"hub"}
    assert [row.task for row in rows.values() if row.scored_by == "judge"] == list(JUDGED)
    assert rows["docvqa_val"].data == "lmms-lab-encoder/DocVQA, DocVQA/validation, login"
    mirrored = {row.task: row for row in listed(str(paper))}
    assert list(mirrored) == [f"{name}_local" for name in STOCK]
    assert {row.place for row in mirrored.values()} == {"local"}
    assert mirrored["pope_local"].data.endswith("lmms-lab-encoder/POPE/data")
    assert main(["benchmarks", "list", "fast"]) == 0
    assert "first 250" in capsys.readouterr().out


def test_shipped_suites_of_stock_tasks_agree_on_how_a_metric_is_read():
    names = ("paper", "hallucination", "ocr_chart", "knowledge", "fast")
    entries = {name: load_suite(name).benchmark for name in names}
    known = {task.task: (task.metric, task.scale, task.unit, task.judge) for task in entries["paper"]}
    for tasks in entries.values():
        for task in tasks:
            assert known[task.task] == (task.metric, task.scale, task.unit, task.judge)
    assert all(task.limit and not task.judge for task in entries["fast"])


def test_other_data_are_another_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture):
    stock_data.write(tmp_path, {"pope": STOCK["pope"]})
    (tmp_path / "s.yaml").write_text("name: s\nbenchmark: [{task: pope, metric: pope_accuracy}]\n")
    command = ["benchmarks", "mirror", str(tmp_path / "s.yaml"), "--from", str(tmp_path), "--out", str(tmp_path / "o")]
    assert main(command) == 0
    suite = str(tmp_path / "o" / "s.yaml")
    assert f"score it with evaluation.suite={suite}" in capsys.readouterr().out
    before = suite_state(suite)
    assert suite_state(suite) == before
    stock_data.write(tmp_path, {"pope": stock_data.Stock(STOCK["pope"].files, STOCK["pope"].rows[:2])})
    assert suite_state(suite) != before
    check_suite(suite, "benchmark")
    (tmp_path / STOCK["pope"].files[0]).unlink()
    with pytest.raises(BenchmarkError, match=r"(?s)data files are missing.*pope_local: .*mirror the suite again"):
        check_suite(suite, "benchmark")


def test_a_run_says_what_it_leaves_out():
    recipe = load("experiments/embedded.yaml", ["evaluation.suite=knowledge"])
    assert "mathvista_testmini_format, which a judge model scores" in left_out(recipe)
    for override in ("evaluation.suite=fast", "evaluation.judge=true"):
        assert left_out(load("experiments/embedded.yaml", ["evaluation.suite=knowledge", override])) == ""


def test_hub_tasks_without_a_hub_stop_a_run_at_its_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BenchmarkError, match=r"(?s)the hub does not answer.*pope: lmms-lab-encoder/POPE.*mirror"):
        check_suite("hallucination", "benchmark")


def test_a_metric_of_errors_is_turned_round_and_a_limit_tears_no_unit(paper: Path, tmp_path: Path):
    text = yaml.safe_load(paper.read_text())
    (pope,) = [task for task in text["benchmark"] if task["task"] == "pope_local"]
    suite = load_as(Suite, _written(tmp_path / "s.yaml", {**text, "benchmark": [{**pope, "higher_is_better": False}]}))
    scores = evaluate(OracleEngine(truth), suite, tmp_path, CONFIG, tmp_path / "out")
    assert scores.tasks["pope_local"].accuracy == 0.0
    with pytest.raises(RecipeError, match="limit=3 would tear rows that question_id makes one question"):
        load_as(Suite, _written(tmp_path / "t.yaml", {"name": "t", "benchmark": [
            {"task": "mme", "metric": "mme_perception_score", "unit": "question_id", "limit": 3}]}))  # fmt: skip


def _written(path: Path, values: dict) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


# Tasks that a judge scores.


class Judge(BaseHTTPRequestHandler):
    """A server in OpenAI's protocol that calls an answer right where it says every part of the truth."""

    silent = False

    def do_GET(self) -> None:
        self._say(404, {})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
        _question, truth, said, *_ = asked.splitlines()[-1].split(" | ")
        right = all(part.strip() in said for part in truth.split("<AND>"))
        content = "" if self.silent else "1.0" if right else "0.3"
        message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        self._say(200, {"id": "1", "object": "chat.completion", "created": 0, "model": "local-judge",
                        "choices": [message], "usage": usage})  # fmt: skip

    def _say(self, status: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Judge]]:
    server = HTTPServer(("127.0.0.1", 0), Judge)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("OPENAI_API_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield Judge
    server.shutdown()
    thread.join()
    server.server_close()


def _judged_suite(folder: Path, task: str) -> Path:
    """A mirrored suite of one judged task."""
    (entry,) = [one for one in load_suite("paper").benchmark if one.task == task]
    stock_data.write(folder, {task: JUDGED[task]})
    values = {"task": task, "metric": entry.metric, "judge": True}
    made = mirror(str(_written(folder / "s.yaml", {"name": "s", "benchmark": [values]})), folder, folder / "out")
    assert made.notes == ()
    return made.suite


def test_a_judged_benchmark_is_scored_only_when_asked_for(tmp_path: Path, judge: type[Judge],
                                                          monkeypatch: pytest.MonkeyPatch):  # fmt: skip
    suite = _judged_suite(tmp_path, "mmvet")
    with pytest.raises(BenchmarkError, match=r"a judge scores every task.*evaluation\.judge=true"):
        check_suite(str(suite), "benchmark")
    check_suite(str(suite), "benchmark", judged=True)
    config = EvaluationConfig(batch_size=4, max_new_tokens=64, judge=True)
    scores = evaluate(OracleEngine(truth), load_suite(str(suite)), tmp_path, config, tmp_path / "right")
    assert scores.tasks["mmvet_local"].accuracy == 1.0
    scores = evaluate(OracleEngine(lambda _: "a red car"), load_suite(str(suite)), tmp_path, config, tmp_path / "half")
    assert [s.correct for s in read_samples(tmp_path / "half")] == [0.3, 0.3]
    monkeypatch.setattr(judge, "silent", True)
    with pytest.raises(BenchmarkError, match="the judge gave no answer for question 0"):
        evaluate(OracleEngine(truth), load_suite(str(suite)), tmp_path, config, tmp_path / "silent")
    monkeypatch.setenv("OPENAI_API_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(BenchmarkError, match=r"127\.0\.0\.1:9/v1 does not answer"):
        check_suite(str(suite), "benchmark", judged=True)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(BenchmarkError, match="a judge model scores mmvet_local: set OPENAI_API_KEY"):
        check_suite(str(suite), "benchmark", judged=True)


def test_mathvista_reads_plain_answers_without_its_judge(tmp_path: Path, judge: type[Judge]):
    pytest.importorskip("Levenshtein", reason="MathVista's stock scorer imports Levenshtein, which lmms-eval does not "
                        "install: pip install Levenshtein")  # fmt: skip
    suite = load_suite(str(_judged_suite(tmp_path, "mathvista_testmini_format")))
    config = EvaluationConfig(batch_size=4, max_new_tokens=64, judge=True)
    evaluate(OracleEngine(truth), suite, tmp_path, config, tmp_path / "out")
    # The third is right: 0.7.3 rounds by the column `precision` as it is, a float on the hub, and takes the TypeError
    # for a wrong answer.
    assert [s.correct for s in read_samples(tmp_path / "out")] == [1.0, 1.0, 0.0]
