"""Suites run through lmms-eval in process, and the same score from its own command line."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import OracleEngine, RefusingOracle
from PIL import Image
from tiny import build

from sicog_exp.evaluation.answers import KeptAnswers
from sicog_exp.evaluation.benchmarks import SCORES, Sample, evaluate, read_samples
from sicog_exp.evaluation.suites import BenchmarkError, Suite, SuiteTask, evals_folder, load_suite
from sicog_exp.generation.engine import Request
from sicog_exp.prompts import prompt, question_of, structured
from sicog_exp.recipe import EvaluationConfig
from sicog_exp.records import Record, conversation, read_jsonl, read_records, write_jsonl, write_records
from sicog_exp.store import REJECTED, Workplace

WORLD = Suite("world", (SuiteTask("sicog_world_direct"), SuiteTask("sicog_world_cot")))
CONFIG = EvaluationConfig(batch_size=8, max_new_tokens=40)
ANSWERS = ("red", "two", "the dog", "Yes")
FAMILIES = ("attribute", "counting", "naming", "existence")


def make_records(images: int) -> list[Record]:
    records = []
    for i in range(images):
        for k in range(4):
            path = (f"images/{i}.png",)
            messages = conversation(prompt("direct", f"Question {k} of {i}?"), ANSWERS[(i + k) % 4], path)
            records.append(Record(f"{i}:q{k}", messages, path, "direct", "world", FAMILIES[k]))
    return records


def make_dataset(folder: Path, images: int = 5) -> Path:
    (folder / "images").mkdir(parents=True)
    for i in range(images):
        Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(folder / "images" / f"{i}.png")
    write_records(folder / "benchmark.parquet", make_records(images))
    write_records(folder / "development.parquet", make_records(images)[:4])
    return folder


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "data")


def truth(request: Request) -> str:
    """The right answer, in the format that the request asks for."""
    words = request.messages[-1].content.removeprefix("<image>\n")
    question = question_of(request.kind, words)
    assert words == prompt(request.kind, question), "the wording is not the prompt table's"
    k, i = (int(word.strip("?")) for word in question.split()[1::2])
    assert request.images[0].name == f"{i}.png"
    answer = ANSWERS[(i + k) % 4]
    return structured("cot", ("goal", "things", "because", answer)) if request.kind == "cot" else answer


def test_oracle_scores_one_and_every_row_is_complete(dataset: Path, tmp_path: Path):
    engine = OracleEngine(truth)
    scores = evaluate(engine, WORLD, dataset, CONFIG, tmp_path / "out")
    assert {name: (s.accuracy, s.n) for name, s in scores.tasks.items()} == {
        "sicog_world_direct": (1.0, 20),
        "sicog_world_cot": (1.0, 20),
    }
    assert scores.tasks["sicog_world_cot"].prompt == "{question}\nAnswer step by step."
    assert {f: s.n for f, s in scores.tasks["sicog_world_cot"].families.items()} == dict.fromkeys(sorted(FAMILIES), 5)
    assert (scores.harness.split()[0], scores.engine, scores.batch_size) == ("lmms-eval", "OracleEngine", 8)
    assert json.loads((tmp_path / "out" / SCORES).read_text()) == json.loads(json.dumps(asdict(scores)))
    samples = read_samples(tmp_path / "out")
    assert [s.id for s in samples] == [r.id for r in make_records(5)] * 2
    first = samples[1]
    assert (first.task, first.image, first.family, first.format) == (
        "sicog_world_direct",
        "images/0.png",
        "counting",
        "direct",
    )
    assert (first.response, first.answer, first.target, first.correct) == ("two", "2", "two", 1.0)
    assert all(request.images[0].parent == dataset / "images" for request in engine.asked), "images were copied"
    assert {d.max_new_tokens for d in engine.decodings} == {32, 40}
    assert {d.temperature for d in engine.decodings} == {0.0}


def test_wrong_answers_score_zero(dataset: Path, tmp_path: Path):
    scores = evaluate(OracleEngine(lambda _: "x"), WORLD, dataset, CONFIG, tmp_path / "out")
    assert [task.accuracy for task in scores.tasks.values()] == [0.0, 0.0]


@pytest.mark.parametrize("response", ["red", "", "Step 1: a\nb\nStep 4: Conclude the task with an answer\nred"])
def test_chain_of_thought_without_its_steps_is_wrong(dataset: Path, tmp_path: Path, response: str):
    suite = Suite("cot", (SuiteTask("sicog_world_cot"),))
    scores = evaluate(OracleEngine(lambda _: response), suite, dataset, CONFIG, tmp_path / "out")
    assert scores.tasks["sicog_world_cot"].accuracy == 0.0
    assert {sample.answer for sample in read_samples(tmp_path / "out")} == {""}


def test_answers_are_joined_by_id_not_by_order(dataset: Path, tmp_path: Path):
    class Shuffled(OracleEngine):
        def sample(self, requests, decoding):
            batches = list(super().sample(requests, decoding))
            random.Random(3).shuffle(batches)
            yield from batches

    scores = evaluate(Shuffled(truth), WORLD, dataset, CONFIG, tmp_path / "out")
    assert scores.tasks["sicog_world_direct"].accuracy == 1.0


def test_engine_failure_is_raised(dataset: Path, tmp_path: Path):
    def fail(_: Request) -> str:
        raise FloatingPointError("the weights are not numbers")

    with pytest.raises(FloatingPointError, match="not numbers"):
        evaluate(OracleEngine(fail), WORLD, dataset, CONFIG, tmp_path / "out")
    assert not (tmp_path / "out" / "scores.json").exists()


def test_unanswered_request_is_an_error(dataset: Path, tmp_path: Path):
    class Forgetful(OracleEngine):
        def sample(self, requests, decoding):
            yield from list(super().sample(requests, decoding))[1:]

    with pytest.raises(RuntimeError, match="unanswered"):
        evaluate(Forgetful(truth), WORLD, dataset, CONFIG, tmp_path / "out")


def test_missing_image_is_an_error(dataset: Path, tmp_path: Path):
    (dataset / "images" / "3.png").unlink()
    with pytest.raises(Exception, match=r"3\.png"):
        evaluate(OracleEngine(truth), WORLD, dataset, CONFIG, tmp_path / "out")


def test_same_evaluation_writes_the_same_bytes(dataset: Path, tmp_path: Path):
    other = make_dataset(tmp_path / "elsewhere" / "data")
    for name, data in (("a", dataset), ("b", other)):
        evaluate(OracleEngine(truth), WORLD, data, CONFIG, tmp_path / name)
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == ["results.json", "samples.jsonl", "scores.json"]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_rebuilt_data_are_read_anew(dataset: Path, tmp_path: Path):
    """A stale cache must never be scored: same path, other content."""
    before = evaluate(OracleEngine(truth), WORLD, dataset, CONFIG, tmp_path / "a")
    write_records(dataset / "benchmark.parquet", make_records(3))
    after = evaluate(OracleEngine(truth), WORLD, dataset, CONFIG, tmp_path / "b")
    assert (before.tasks["sicog_world_direct"].n, after.tasks["sicog_world_direct"].n) == (20, 12)


def test_nothing_else_is_touched(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Neither the working directory nor the environment nor the generators that training draws from."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    environment = dict(os.environ)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    evaluate(OracleEngine(truth), WORLD, dataset, CONFIG, tmp_path / "out")
    drawn = random.random(), np.random.rand(), torch.rand(1).item()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    assert drawn == (random.random(), np.random.rand(), torch.rand(1).item())
    assert list(Path().iterdir()) == []
    assert dict(os.environ) == environment


def test_embedded_suite_on_development_and_limits(dataset: Path, tmp_path: Path):
    suite = load_suite("embedded")
    scores = evaluate(OracleEngine(truth), suite, dataset, CONFIG, tmp_path / "dev", split="development")
    assert {name: (s.accuracy, s.n) for name, s in scores.tasks.items()} == {
        "sicog_world_direct_development": (1.0, 4),
        "sicog_world_cot_development": (1.0, 4),
    }
    entries = (SuiteTask("sicog_easyvqa_direct", limit=30), SuiteTask("sicog_world_direct"))
    limited = evaluate(OracleEngine(lambda _: "yes"), Suite("s", entries), dataset, CONFIG, tmp_path / "out")
    assert (limited.tasks["sicog_easyvqa_direct"].n, limited.tasks["sicog_world_direct"].n) == (30, 20)
    samples = [s for s in read_samples(tmp_path / "out") if s.task == "sicog_easyvqa_direct"]
    assert [s.correct for s in samples] == [float(s.target == "yes") for s in samples]
    assert {s.family for s in samples} == {"existence", "color", "shape"}


def choosing(folder: Path) -> Suite:
    """A suite of one task of multiple choice."""
    folder.mkdir()
    rows = [{"question": "Which?", "choices": ["long answer", "short"], "gold": i % 3 // 2} for i in range(6)]
    write_jsonl(folder / "rows.jsonl", rows)
    task = {"task": "choose", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}}
    task |= {"test_split": "test", "output_type": "multiple_choice", "doc_to_text": "question"}
    task |= {"doc_to_choice": "choices", "doc_to_target": "gold"}
    task |= {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
    (folder / "choose.yaml").write_text(json.dumps(task))
    return Suite("mine", (SuiteTask("choose", metric="acc"),), include=(str(folder),))


def test_multiple_choice_of_another_folder(dataset: Path, tmp_path: Path):
    """lmms-eval 0.7.3 fails on the documented return value of loglikelihood, and takes the smallest."""
    suite = choosing(tmp_path / "tasks")
    engine = OracleEngine(truth)  # its loss grows with the length: it always prefers the shorter choice
    scores = evaluate(engine, suite, dataset, CONFIG, tmp_path / "out")
    assert scores.tasks["choose"].accuracy == pytest.approx(2 / 6)
    assert [s.correct for s in read_samples(tmp_path / "out")] == [0.0, 0.0, 1.0] * 2
    with pytest.raises(BenchmarkError, match="no folder"):
        evaluate(engine, replace(suite, include=("/no/such",)), dataset, CONFIG, tmp_path / "out")


def test_a_question_that_cannot_be_put_is_left_out(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Of every format of answer; it is listed and counted, no other score changes."""
    suite = choosing(tmp_path / "tasks")
    suite = replace(suite, benchmark=(SuiteTask("sicog_world_direct"), *suite.benchmark))
    place = Workplace(tmp_path / "out", tmp_path / "scratch")
    evaluate(OracleEngine(truth), suite, dataset, CONFIG, tmp_path / "whole")
    whole = read_samples(tmp_path / "whole")
    gone = {("sicog_world_direct", whole[3].id), ("choose", "4")}
    engine = RefusingOracle(truth, refuses=lambda r: r.sample_id.startswith(("sicog_world_direct/3/", "choose/4/")))
    kept = KeptAnswers(engine, place.scratch, "w")
    scores = evaluate(kept, suite, dataset, CONFIG, tmp_path / "out", workplace=place)
    assert read_samples(tmp_path / "out") == [s for s in whole if (s.task, s.id) not in gone]
    assert {name: task.n for name, task in scores.tasks.items()} == {"sicog_world_direct": 19, "choose": 5}
    assert {(row["task"], row["id"], row["reason"]) for row in read_jsonl(tmp_path / "out" / REJECTED)} == {
        (*key, "too wide") for key in gone}  # fmt: skip
    assert place.facts == {"rejected": 2}
    assert "evaluation: 2 questions cannot be put to this model" in capsys.readouterr().out
    engine.refuses = lambda r: r.sample_id.startswith("choose/")
    with pytest.raises(BenchmarkError, match=r"choose: none of its questions can be put to this model \(too wide\)"):
        evaluate(KeptAnswers(engine, tmp_path / "s", "v"), suite, dataset, CONFIG, tmp_path / "none")


def test_how_far_an_evaluation_is(dataset: Path, tmp_path: Path):
    """Over calls of several limits, answers and choices alike; a continued one counts what it finds."""
    suite = choosing(tmp_path / "tasks")
    tasks = (SuiteTask("sicog_easyvqa_direct", limit=30), SuiteTask("sicog_world_direct"), *suite.benchmark)
    suite = replace(suite, benchmark=tasks)
    calls: list[tuple[int, int]] = []

    def run() -> RefusingOracle:
        place = Workplace(tmp_path / "out", tmp_path / "scratch", progress=lambda *call: calls.append(call))
        engine = RefusingOracle(lambda r: "yes")
        evaluate(KeptAnswers(engine, place.scratch, "w"), suite, dataset, CONFIG, tmp_path / "out", workplace=place)
        return engine

    assert run().asked
    assert {total for _, total in calls} == {20 + 6 + 30}
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1] == (56, 56)
    assert len(calls) > 4
    whole, calls[:] = list(calls), []
    assert run().asked == []
    assert calls == whole


@pytest.mark.parametrize("name", ["embedded", "easyvqa", "own"])
def test_shipped_suites_name_existing_tasks(name: str):
    suite = load_suite(name)
    for split in ("benchmark", "development"):
        for task in suite.tasks(split):
            assert (evals_folder() / "tasks" / f"{task.task}.yaml").is_file()


def test_suite_errors_say_what_to_do(tmp_path: Path, dataset: Path):
    with pytest.raises(BenchmarkError, match="embedded"):
        load_suite("embeded")
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: bad\nbenchmark:\n  - taks: sicog_world_direct\n")
    with pytest.raises(BenchmarkError, match="taks"):
        load_suite(str(bad))
    with pytest.raises(BenchmarkError, match="development"):
        WORLD.tasks("development")
    wrong_metric = replace(WORLD, benchmark=(SuiteTask("sicog_world_direct", metric="bleu"),))
    with pytest.raises(BenchmarkError, match="bleu"):
        evaluate(OracleEngine(truth), wrong_metric, dataset, CONFIG, tmp_path / "out")


def world_dataset(folder: Path, images: int) -> Path:
    """Questions about the built-in world, on which the tiny model was trained."""
    from sicog_exp.data.questions import questions
    from sicog_exp.data.scenes import make_scene, render, rng_for

    (folder / "images").mkdir(parents=True)
    records = []
    for i in range(images):
        scene, path = make_scene(7, "benchmark", i), f"images/{i}.png"
        Image.fromarray(render(scene, 7)).save(folder / path)
        for k, asked in enumerate(questions(scene, rng_for(7, "benchmark", i, "questions"), 4)):
            messages = conversation(prompt("direct", asked.text), asked.answer, (path,))
            records.append(Record(f"{i}:q{k}", messages, (path,), "direct", "world", asked.family))
    write_records(folder / "benchmark.parquet", records)
    return folder


def teach(dataset: Path, samples: list[Sample]) -> None:
    """Every other record takes an answer of the model's own as its truth, so that scores are neither 0 nor 1."""
    said = {sample.id: sample.answer for sample in samples if sample.answer}
    records = read_records(dataset / "benchmark.parquet")
    for i, record in enumerate(records):
        if i % 2 and record.id in said:
            taught = replace(record.messages[1], content=said[record.id])
            records[i] = replace(record, messages=(record.messages[0], taught))
    write_records(dataset / "benchmark.parquet", records)


@pytest.mark.slow
def test_command_line_gives_the_same_score(tmp_path: Path):
    """`lmms-eval --model sicog` in a process of its own, over a real model, against the in-process evaluation."""
    from sicog_exp.generation.transformers_engine import TransformersEngine

    torch.set_num_threads(1)
    dataset = world_dataset(tmp_path / "data", images=12)
    model = build(tmp_path / "model", steps=250)  # long enough for greedy answers of several words
    engine = TransformersEngine.from_path(model)
    config = EvaluationConfig(batch_size=16, max_new_tokens=120)
    evaluate(engine, WORLD, dataset, config, tmp_path / "first")
    teach(dataset, read_samples(tmp_path / "first"))
    scores = evaluate(engine, WORLD, dataset, config, tmp_path / "second")
    reported, responses = command_line(model, dataset, tmp_path / "cli")
    assert reported == {name: task.accuracy for name, task in scores.tasks.items()}
    assert responses == {(s.task, s.id): s.response for s in read_samples(tmp_path / "second")}
    assert 0.2 < reported["sicog_world_direct"] < 0.95


def command_line(model: Path, dataset: Path, out: Path) -> tuple[dict[str, float], dict[tuple[str, str], str]]:
    arguments = f"pretrained={model},batch_size=16,max_new_tokens=120,threads=1,device=cpu"
    command = [sys.executable, "-m", "lmms_eval", "--model", "sicog", "--model_args", arguments, "--log_samples"]
    command += ["--tasks", "sicog_world_direct,sicog_world_cot", "--include_path", str(evals_folder() / "tasks")]
    environment = os.environ | {"SICOG_DATA": str(dataset), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command += ["--output_path", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=dataset)
    files = list(out.rglob("*results.json"))
    assert len(files) == 1, done.stdout + done.stderr
    scores = {task: row["accuracy,none"] for task, row in json.loads(files[0].read_text())["results"].items()}
    ids = [record.id for record in read_records(dataset / "benchmark.parquet")]
    responses = {}
    for task in scores:
        (file,) = out.rglob(f"*_samples_{task}.jsonl")
        for row in read_jsonl(file):
            responses[task, ids[row["doc_id"]]] = row["filtered_resps"]
    return scores, responses
