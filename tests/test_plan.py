"""Plans: they agree with what runs measure, name the steps that runs take, and need neither weights nor data."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sicog_exp.cli import main
from sicog_exp.data.chat import ChatError
from sicog_exp.models.loading import EMBEDDED_BASE, ModelError
from sicog_exp.models.shapes import encoder_parameters, read_shape
from sicog_exp.planning import plan as p
from sicog_exp.planning.contents import Contents, Held, Rows, Ruler, read_contents
from sicog_exp.planning.devices import DEVICES
from sicog_exp.planning.show import duration, si, size, stages
from sicog_exp.planning.tasks import read_tasks
from sicog_exp.recipe import EvaluationConfig, Recipe, load

WITHIN = 0.25
"""How far a plan may be from what a run measured."""
PAPER = "experiments/paper_lowres.yaml"
COUNTED = ("samples", "prompt_tokens", "image_tokens", "new_tokens", "tokens", "flops")


def planned(recipe: Recipe, device: str = "cpu", devices: int = 1) -> p.Plan:
    return p.make_plan(recipe, p.pricing(device, devices))


# Against a run.


@pytest.fixture(scope="module")
def tiny(tiny_run: tuple[Path, str], tiny_model: Path) -> Recipe:
    return load("tests/tiny.yaml", [f"model.base={tiny_model}", f"store={tiny_run[0]}/store"])


@pytest.mark.timeout(1800)
def test_a_plan_is_within_a_quarter_of_what_a_run_measured(tiny: Recipe, tiny_run: tuple[Path, str]) -> None:
    found: dict[str, Counter[str]] = defaultdict(Counter)
    store = Path(tiny.store)
    (run,) = set(re.findall(r"iterate-[0-9a-f]{16}", tiny_run[1]))  # other tests add steps to its store
    for name in json.loads((store / run / "summary.json").read_text())["artifacts"]:
        manifest = json.loads((store / name / "manifest.json").read_text())
        found[manifest["step"]].update(manifest["facts"])
    ratios = {(stage, name): found[stage][name] / getattr(step, name) for stage, step in stages(planned(tiny)).items()
              for name in COUNTED if getattr(step, name)}  # fmt: skip
    assert len(ratios) == 6 * 6 + 2, "six stages compute, two more have rows"
    assert {key: ratio for key, ratio in ratios.items() if abs(ratio - 1) > WITHIN} == {}


def test_a_plan_names_the_steps_of_a_run(tiny: Recipe, tiny_run: tuple[Path, str]) -> None:
    shown = set(re.findall(r"^(G\d [\w-]+): \d+ s$", tiny_run[1], re.MULTILINE))
    assert set(p.expected_work(tiny)) == shown


def test_costs_are_metrics_of_every_generation(tiny_run: tuple[Path, str]) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tiny_run[0]}/mlflow.db")
    experiment = client.get_experiment_by_name("end-to-end")
    assert experiment
    query = "tags.`sicog.level` = 'experiment'"
    parent = client.search_runs([experiment.experiment_id], query)[-1].info.run_id
    for name in ("cost/flops", "cost/training_flops", "cost/added/flops", "cost/evaluate/seconds"):
        assert sorted(point.step for point in client.get_metric_history(parent, name)) == [0, 1, 2], name
    spent = {point.step: point.value for point in client.get_metric_history(parent, "cost/flops")}
    trained = {point.step: point.value for point in client.get_metric_history(parent, "cost/training_flops")}
    assert spent[0] == trained[0] < trained[1] < spent[1] < spent[2]
    assert {point.step for point in client.get_metric_history(parent, "cost/generate-caption/tokens")} == {1, 2}


# The model.


@pytest.fixture(scope="module")
def embedded() -> p.Plan:
    return planned(load("experiments/embedded.yaml"))


def test_published_shapes_have_the_published_sizes() -> None:
    assert read_shape("llava-qwen2-7b").parts["language"] == 7_615_616_512  # of Qwen2-7B's safetensors index
    assert read_shape("llava-llama3-8b").parts["language"] == 8_030_261_248  # of Llama-3.1-8B's
    assert read_shape("qwen2.5-vl-3b").parameters == 3_754_622_976  # of their safetensors indices
    assert read_shape("qwen2.5-vl-7b").parameters == 8_292_166_656
    assert read_shape("smolvlm2-2.2b").parameters == 2_246_784_880
    for name in ("llava-qwen2-7b", "llava-llama3-8b"):
        shape = read_shape(name)
        assert shape.image_tokens == (336 // 14) ** 2
        assert shape.parts["vision"] == pytest.approx(303.5e6, rel=1e-3)
        assert shape.work.positions == 1


def test_no_weights_are_needed(embedded: p.Plan, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(EMBEDDED_BASE, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    recipe = load("experiments/embedded.yaml")
    other = replace(recipe, model=replace(recipe.model, base=str(bare)))
    compared = [[step for step in plan.steps if step.step != "base"] for plan in (embedded, planned(other))]
    assert compared[0] == compared[1]


def test_parts_put_together_have_a_shape_of_both(tmp_path: Path) -> None:
    from sicog_exp.models.shapes import composed_shape

    base = str(EMBEDDED_BASE)
    with pytest.raises(ModelError, match=r"model\.language=nowhere.*set plan\.shape"):
        composed_shape("nowhere", base)
    whole = read_shape(base)
    text = json.loads((EMBEDDED_BASE / "config.json").read_text())["text_config"]
    (tmp_path / "config.json").write_text(json.dumps(text))
    shape = composed_shape(str(tmp_path), base)
    assert (shape.parts["vision"], shape.image_tokens) == (whole.parts["vision"], 9)
    assert shape.parts["language"] == whole.parts["language"]


def test_a_model_without_a_processor_is_measured_by_characters(embedded: p.Plan, tmp_path: Path) -> None:
    shutil.copy(EMBEDDED_BASE / "config.json", tmp_path)
    recipe = load("experiments/embedded.yaml", [f"model.base={tmp_path}"])
    plan = planned(recipe)
    assert any("characters a token, no processor" in line for line in plan.assumptions)
    assert plan.total.image_tokens == embedded.total.image_tokens
    assert 0.5 < plan.total.new_tokens / embedded.total.new_tokens < 3


def test_encoders_are_counted_without_their_tables() -> None:
    from sicog_exp.curation.similarity import encoder_source

    assert encoder_parameters(encoder_source("minilm")) == 22_713_216 - (30_522 + 512 + 2) * 384  # its model card's
    assert encoder_parameters("nowhere/nothing") == 0
    recipe = load("experiments/embedded.yaml", ["curation.encoder=minilm", "curation.reasoning_scorer=similarity"])
    steps = [step for step in planned(recipe).steps if step.step == "embed"]
    assert [step.generation for step in steps] == [1, 1, 2, 2]
    assert all(step.flops == 2 * encoder_parameters_of_minilm() * step.prompt_tokens > 0 for step in steps)


def test_an_embedding_step_counts_its_tokens() -> None:
    from sicog_exp.curation.embeddings import encoder_work

    found = encoder_work(lambda: iter(["a red dog", "a cat", "a red dog"]), "minilm")
    assert found["tokens"] == (3 + 2) + (2 + 2)  # words, and the marks at both ends
    assert found["flops"] == 2 * found["tokens"] * encoder_parameters_of_minilm()


def encoder_parameters_of_minilm() -> int:
    from sicog_exp.curation.similarity import encoder_source

    return encoder_parameters(encoder_source("minilm"))


# The data.


def own(folder: Path, **data: Any) -> Recipe:
    given = {"annotated": folder / "rows.jsonl", "unlabeled": folder / "photos", **data}
    return load("experiments/own.yaml", [f"data.{name}={value}" for name, value in given.items()])


@pytest.fixture
def files(tmp_path: Path, world_images: list[Path]) -> Path:
    """Ten annotated rows, two of them unusable, a folder of twelve pictures, and a file of questions about them."""
    (tmp_path / "photos").mkdir()
    for image in world_images:
        shutil.copy(image, tmp_path / "photos")
    rows: list[Any] = [{"id": str(i), "image": f"photos/{i}.png", "conversations": [
        {"from": "human", "value": "<image>\nWhich thing is furthest left?"},
        {"from": "gpt", "value": "dog" if i % 2 else "red dog top left, blue cat middle " * 4}]}
        for i in range(8)]  # fmt: skip
    rows += [{"id": "x", "conversations": "none"}, [3]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"image": f"photos/{i % 6}.png", "question": f"What, {i}?"} for i in range(18)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    return tmp_path


def contents(recipe: Recipe) -> Contents:
    shape, encoder = p.base_of(recipe)
    return read_contents(recipe, Ruler(encoder, shape.image_tokens, recipe.data.max_pixels), shape.image_tokens)


def test_a_user_s_files_are_counted_as_they_are(files: Path) -> None:
    found = contents(own(files))
    assert sum(rows.count for rows in found.annotated.values()) == pytest.approx(8 * 0.6)
    assert found.splits["benchmark"] == Held(pytest.approx(1.6), pytest.approx(1.6))
    assert (found.captions, found.questions) == (12, 0)
    assert found.annotated["direct"].image == 9
    assert found.picture_bytes > 1000
    asked = contents(own(files, unlabeled=files / "asked.jsonl", unlabeled_images=4))
    assert (asked.captions, asked.questions) == (4, 12)
    assert [step.step for step in planned(own(files)).steps if step.step.startswith("generate")] == ["generate-caption"]


def test_rows_that_training_sets_aside_stop_no_plan(files: Path) -> None:
    recipe = own(files)
    shape, encoder = p.base_of(recipe)
    assert encoder
    refusing = "{% if 'blue cat' in messages|string %}{{ raise_exception('no cats') }}{% endif %}"
    encoder.processor.chat_template = refusing + encoder.processor.chat_template
    found = read_contents(recipe, Ruler(encoder, shape.image_tokens, recipe.data.max_pixels), shape.image_tokens)
    assert sum(rows.count for rows in found.annotated.values()) == pytest.approx(8 * 0.6)
    assert found.annotated["direct"].image == 9


def test_a_picture_that_the_processor_refuses_stops_no_plan(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = own(files)
    shape, encoder = p.base_of(recipe)
    assert encoder
    took, refused = encoder.pixels, []

    def pixels(images: Any) -> Any:
        if not refused:
            refused.append(images)
            raise ChatError("too long a picture")
        return took(images)

    monkeypatch.setattr(encoder, "pixels", pixels)
    monkeypatch.setattr("sicog_exp.planning.contents._rows", lambda *_: Rows(1, 1, 9, (1,)))  # only prompts are counted
    found = read_contents(recipe, Ruler(encoder, shape.image_tokens, recipe.data.max_pixels), shape.image_tokens)
    assert refused
    assert found.asked["cod"].image == 9


def test_data_that_are_not_at_hand_are_assumed_and_said_so(tmp_path: Path) -> None:
    recipe = own(tmp_path, annotated_images=100, unlabeled_images=50, questions_per_image=3)
    plan = planned(recipe)
    assert any("are not at hand" in line for line in plan.assumptions)
    found = {step.step: step for step in plan.steps}
    assert found["generate-caption"].samples == 50 * 3
    assert found["generate-reasoning"].samples == 150 * 3
    longer = planned(replace(recipe, plan=replace(recipe.plan, cod_tokens=80, unlabeled_questions=7)))
    assert {step.step: step for step in longer.steps}["generate-reasoning"].samples == 7 * 3
    assert "given, not measured: plan.unlabeled_questions=7, plan.cod_tokens=80" in longer.assumptions


def test_tasks_are_read_without_the_harness() -> None:
    splits = {"benchmark": Held(2080, 520), "development": Held(800, 200)}
    found = read_tasks(EvaluationConfig("embedded"), "benchmark", splits, 5)
    assert [(task.kind, task.questions, task.known) for task in found] == [
        ("direct", 2080, True), ("cot", 2080, True), ("direct", 1000, True)]  # fmt: skip
    assert [task.max_new_tokens for task in found] == [32, 1200, 32]
    assert found[2].per_picture == pytest.approx(9673 / 1000, rel=0.01)
    assert [task.questions for task in read_tasks(EvaluationConfig(), "development", splits, 5)] == [800, 800]


def test_tasks_that_are_not_ours_have_assumed_questions(tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text("name: s\nbenchmark: [{task: mmstar}, {task: ai2d, limit: 300}]\n")
    found = read_tasks(EvaluationConfig(str(tmp_path / "suite.yaml")), "benchmark", {}, 1500)
    assert [(task.questions, task.known) for task in found] == [(1500, False), (300, False)]
    scored_by_rules = read_tasks(EvaluationConfig("paper"), "benchmark", {}, 1500)
    assert len(scored_by_rules) == 10
    assert len(read_tasks(EvaluationConfig("paper", judge=True), "benchmark", {}, 1500)) == 12


# The arithmetic.


@given(requests=st.integers(1, 2000), per_picture=st.floats(1, 20), batch=st.integers(1, 3000))
def test_shared_pictures_are_encoded_at_least_once_and_never_more_than_shown(requests, per_picture, batch):
    share = p.encoded_share(requests, per_picture, batch)
    assert 1 / per_picture - 1e-9 <= share <= 1 + 1e-9
    if batch >= requests:
        assert share == pytest.approx(1 / per_picture)


@given(limit=st.integers(1, 300), responses=st.lists(st.integers(0, 400), min_size=1).map(tuple))
def test_a_limit_cuts_responses(limit, responses):
    rows = Rows(1, 5, 9, responses)
    assert rows.new(limit) == pytest.approx(sum(min(n, limit) for n in responses) / len(responses))
    assert rows.new(limit) <= rows.new()


def test_the_paper_s_plan_follows_from_its_numbers() -> None:
    plan = planned(load(PAPER), "a100", 32)
    found = {(step.generation, step.step): step for step in plan.steps}
    instruct, parameters = found[1, "instruct"], plan.shape.parameters
    assert instruct.samples == 6703 * 128
    # 6 a parameter and token (Kaplan), but that the vision tower's tokens are few and the table is looked up
    assert instruct.flops == pytest.approx(6 * 6.8e9 * instruct.tokens, rel=0.05)
    # weights, gradients and two moments in float32
    assert instruct.state == 16 * parameters
    assert 1.05 < instruct.memory / instruct.state < 1.3
    align = found[0, "align"]  # of parts whose projector has learned nothing
    assert align.state == 4 * (parameters + 3 * plan.shape.parts["projector"])
    assert align.flops < 0.7 * plan.shape.work.training(align.tokens, align.image_tokens, align.new_tokens)
    assert found[1, "generate-caption"].samples == 118_000 * 3
    assert found[1, "generate-reasoning"].samples == 165_000 * 3
    assert plan.sharded < 80e9 < plan.total.memory
    hours = instruct.flops / (312e12 * 0.4) / 3600
    assert instruct.hours == pytest.approx(hours)


def test_the_control_s_later_generations_are_the_first_one() -> None:
    """Without self-data and from the base nothing differs: a run reads them from the store."""
    plan = planned(load("experiments/embedded.yaml", ["self_data=false", "iterations=3"]))
    assert {step.generation for step in plan.steps} == {0, 1}
    two = planned(load("experiments/embedded.yaml", ["generators=two", "align.steps=5", "closing_steps=null"]))
    names = Counter(step.step for step in two.steps)
    assert names["develop-perception"] == names["develop-reasoning"] == 2
    assert (names["align"], names["instruct"]) == (1, 3)


def test_adapters_and_recomputation_trade_memory_for_work() -> None:
    whole = stages(planned(load(PAPER), "a100"))["instruct"]
    lora = [f"{stage}.{key}" for stage in ("develop", "pretrain", "instruct") for key in
            ("lora_rank=16", "lora_4bit=true", "lora_parts=[vision,language]", "optimizer=adamw_8bit")]  # fmt: skip
    small = stages(planned(load(PAPER, lora), "a100"))["instruct"]
    assert small.state < whole.state / 20
    assert 0.6 < small.flops / whole.flops < 0.72  # no gradients of weights: 4 of 6
    again = stages(planned(load(PAPER, ["model.gradient_checkpointing=true"]), "a100"))["instruct"]
    assert again.flops == pytest.approx(8 / 6 * whole.flops)
    assert again.memory - again.state < 0.4 * (whole.memory - whole.state)


def test_adapters_count_by_their_rank(embedded: p.Plan) -> None:
    """Every linear layer but the head has two matrices, of its inputs and of its outputs by the rank."""
    from sicog_exp.models.adapters import MARK, add_adapters
    from sicog_exp.models.loading import ModelSource, load_model

    model, _ = load_model(ModelSource(str(EMBEDDED_BASE)))
    add_adapters(model, ["language"], 4, 8.0)
    counted = sum(p.numel() for name, p in model.named_parameters() if MARK in name)
    assert 4 * embedded.shape.sides["language"] == counted
    lora = stages(planned(load("experiments/embedded.yaml", ["pretrain.lora_rank=4", "pretrain.vision_lr=0",
                                                             "pretrain.projector_lr=0"])))["pretrain"]  # fmt: skip
    assert lora.state == 4 * (embedded.shape.parameters + counted) + 12 * counted


def test_a_model_made_of_parts_is_aligned_first_and_once() -> None:
    found = Counter(step.step for step in planned(load(PAPER, ["iterations=2"])).steps)
    assert (found["align"], found["instruct"]) == (1, 3)
    fewer = planned(load(PAPER, ["data.alignment=null"]))
    more = planned(load(PAPER))
    assert more.steps[0].disk > fewer.steps[0].disk
    tokens = [{step.step: step for step in plan.steps}["align"].new_tokens for plan in (more, fewer)]
    assert tokens[0] == 15 * 2180 * 256 < tokens[1]
    longer = planned(load(PAPER, ["plan.image_tokens=600", "plan.alignment_tokens=20"]))
    assert {step.step: step for step in longer.steps}["align"].image_tokens == 600 * 2180 * 256


def test_more_work_costs_more(embedded: p.Plan) -> None:
    double = planned(load("experiments/embedded.yaml", ["pretrain.steps=960", "sampling.cot=8"]))
    one, two = stages(embedded), stages(double)
    assert two["pretrain"].flops == pytest.approx(2 * one["pretrain"].flops)
    assert one["generate-reasoning"].prompt_tokens == two["generate-reasoning"].prompt_tokens, "prompts are read once"
    assert two["generate-reasoning"].new_tokens > 1.8 * one["generate-reasoning"].new_tokens
    assert embedded.total.flops == pytest.approx(sum(step.flops for step in one.values()))


# What is shown.


def test_numbers_for_people() -> None:
    assert [si(value) for value in (0, 12, 4800, 2.137e12, 3e21)] == ["", "12", "4.8 k", "2.14 T", "3 Z"]
    assert [size(value) for value in (0, 141e9)] == ["", "141 GB"]
    assert [duration(value) for value in (0, 0.01, 1.5, 12.34, 4321)] == ["", "36 s", "90.0 min", "12.3 h", "4,321 h"]


def test_the_table_and_the_json_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", PAPER, "--device", "h200", "--devices", "8", "--utilisation", "0.5"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pricing"]["utilisation"] == 0.5
    assert found["pricing"]["peak"] == DEVICES["h200"].peak
    assert found["wall_hours"] == found["total"]["hours"] / 8
    assert f"device time: {duration(found['total']['hours'])}" in shown
    assert si(found["total"]["flops"]) in shown
    assert all(line in shown.replace("\n", " ") or line in shown for line in found["assumptions"])
    assert len(found["steps"]) == sum(shown.count(f"\n  G{g} ") for g in (0, 1))
