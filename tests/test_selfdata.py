"""Self-data: outputs are joined by sample id, ragged candidate lists are normal, chosen responses are kept whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hashed import hashed

from sicog_exp.curation import embeddings as embeddings_module
from sicog_exp.data.chat import ChatEncoder, ChatError
from sicog_exp.generation.transformers_engine import TransformersEngine
from sicog_exp.loop import EvaluationTask, run_evaluation
from sicog_exp.prompts import prompt, question_of, structured
from sicog_exp.recipe import (
    CurationConfig,
    EvaluationConfig,
    ModelConfig,
    Recipe,
    RecipeError,
    SamplingConfig,
    StageConfig,
)
from sicog_exp.records import Record, conversation, read_jsonl, read_records, write_jsonl, write_records
from sicog_exp.selfdata import (
    GROUPS,
    CurationTask,
    EmbeddingTask,
    PoolTask,
    SelfDataModule,
    check_truth,
    curate,
    embed,
    embeddings,
    generate,
    pool_rows,
    requests_for,
    training_rows,
)
from sicog_exp.store import Artifact, Step, Store, Workplace
from sicog_exp.training.stages import WEIGHTS, TrainingTask

UNPATCHED = TransformersEngine.from_recipe
COT = structured("cot", ("find color", "red dog", "dog red", "red"))


def unlabeled(i: int, kind: Any = "cot") -> Record:
    question = f"What color is thing {i}?"
    return Record(f"u{i}", conversation(prompt(kind, question), None, (f"{i}.png",)), (f"{i}.png",), kind, "unlabeled")


def task(group: Any = "reasoning", iteration: int = 0, **counts: int) -> PoolTask:
    return PoolTask(SamplingConfig(**counts), ModelConfig(), group, iteration, 0)


def candidate(sample_id: str, kind: str, text: str, index: int = 0) -> dict[str, Any]:
    return {"sample_id": sample_id, "kind": kind, "index": index, "text": text, "seed": 1, "logprob": -1.0,
            "tokens": 2, "finish_reason": "stop"}  # fmt: skip


def pool(folder: Path, rows: list[dict[str, Any]]) -> Artifact:
    folder.mkdir()
    write_jsonl(folder / "candidates.jsonl", rows)
    return Artifact(folder, {"fingerprint": folder.name}, True)


def test_defect_prompt_and_image_path_are_those_of_training(tmp_path: Path) -> None:
    records = [unlabeled(1), unlabeled(2), unlabeled(3, "cod")]
    requests = list(requests_for(task(cot=2, direct=1), records, tmp_path))
    assert [(r.sample_id, r.kind, r.count) for r in requests] == [
        ("u1", "cot", 2), ("u1", "direct", 1), ("u2", "cot", 2), ("u2", "direct", 1)]  # fmt: skip
    for request in requests:
        question = f"What color is thing {request.sample_id[1]}?"
        trained = conversation(prompt(request.kind, question), "x", ("one.png",))
        assert request.messages == trained[:1]
        assert request.images == (tmp_path / f"{request.sample_id[1]}.png",)
    captions = list(requests_for(task("caption", cod=0, dd=2), records, tmp_path))
    assert [(r.sample_id, r.kind, r.count) for r in captions] == [("u3", "dd", 2)]
    assert captions[0].messages[0].content == f"<image>\n{prompt('dd')}"


def test_iterations_give_pooled_candidates_keys_of_their_own(tmp_path: Path) -> None:
    keys = set()
    for iteration in range(3):
        for request in requests_for(task(iteration=iteration, cot=3, direct=1), [unlabeled(1)], tmp_path):
            keys |= {(request.kind, request.first_index + i) for i in range(request.count)}
    assert len(keys) == 3 * (3 + 1)


@pytest.mark.parametrize(("pooled", "counts"), [(True, [3, 6, 9]), (False, [3, 3, 3])])
def test_candidates_are_pooled_over_iterations_or_fresh(pooled: bool, counts: list[int], tiny_model: Path,
                                                        world_images: list[Path], tmp_path: Path) -> None:  # fmt: skip
    """The authors' runs: N = 3, 6, 9 over three iterations, each candidate a draw of its own."""
    data = tmp_path / "data"
    data.mkdir()
    records = [unlabeled(0), replace(unlabeled(1, "cod"), messages=conversation(prompt("cod"), None, ("1.png",)))]
    write_records(data / "unlabeled.parquet", records)
    for image in world_images[:2]:
        (data / image.name).write_bytes(image.read_bytes())
    model = Artifact(tiny_model, {"fingerprint": "model"}, True)
    sampling = SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=12, batch_size=4)
    machine, store = ModelConfig(device="cpu", threads=1), Store(tmp_path / "store")
    curation = CurationConfig(caption_threshold=0.0, reasoning_threshold=0.0, require_format=False)
    training = TrainingTask(StageConfig(), machine, {"self_cot": 1.0}, 0)
    earlier: list[Artifact] = []
    for iteration, count in enumerate(counts):
        drawn = PoolTask(sampling, machine, "caption", iteration, 0)
        module = SelfDataModule(drawn, curation, training, model, Artifact(data, {"fingerprint": "data"}, True),
                                dict.fromkeys(GROUPS, model), earlier, store.run)  # fmt: skip
        module.prepare_data()
        rows = list(read_jsonl(module.inputs["curated"] / "pool.jsonl"))
        assert {row["id"]: len(row["candidates"]) for row in rows} == {"u0": count, "u1": count}
        keys = [(row["sample_id"], row["kind"], row["index"])
                for pool in module.pools for row in read_jsonl(pool / "candidates.jsonl")]  # fmt: skip
        assert len(set(keys)) == len(keys) == 2 * count
        earlier = module.pools if pooled else []


def test_a_prompt_that_the_model_cannot_carry_costs_no_other(
    tiny_model: Path, world_images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A question with the model's own mark for an image, a picture too wide: the step lists it and says so once."""
    data, real = tmp_path / "data", ChatEncoder.prompt
    data.mkdir()
    for i in range(3):
        (data / f"{i}.png").write_bytes(world_images[i].read_bytes())
    write_records(data / "unlabeled.parquet", [unlabeled(i) for i in range(3)])

    def encoded(self: ChatEncoder, messages: Any, images: Any) -> list[int]:
        if "thing 1" in messages[0].content:
            raise ChatError("the conversation shows 2 images, and 1 came with it")
        return real(self, messages, images)

    monkeypatch.setattr(ChatEncoder, "prompt", encoded)
    sampling = SamplingConfig(cot=2, direct=1, max_new_tokens=8, batch_size=4)
    drawn = PoolTask(sampling, ModelConfig(device="cpu", threads=1), "reasoning", 0, 0)
    inputs = {"generator": Artifact(tiny_model, {"fingerprint": "m"}, True),
              "data": Artifact(data, {"fingerprint": "d"}, True)}  # fmt: skip
    made = Store(tmp_path / "store").run(Step("generate-reasoning", generate, drawn, inputs))
    assert made.facts["rejected"] == 2
    assert made.facts["samples"] == 6
    listed = [(row["id"], row["kind"]) for row in read_jsonl(made / "rejected.jsonl")]
    assert listed == [("u1", "cot"), ("u1", "direct")]
    assert "sampling: 2 reasoning prompts cannot be put to this model" in capsys.readouterr().out
    rows = pool_rows([unlabeled(i) for i in range(3)], [made])
    assert [(row["id"], len(row["candidates"])) for row in rows] == [("u0", 3), ("u2", 3)]


def test_defect_outputs_are_zipped_with_the_wrong_images(tmp_path: Path) -> None:
    """Candidates in another order, with a sample missing: each one still lands on its own sample."""
    records = [unlabeled(i) for i in range(4)]
    rows = [candidate(f"u{i}", "direct", f"answer {i}") for i in (3, 0, 2)]
    joined = list(pool_rows(records, [pool(tmp_path / "p0", rows)]))
    assert {row["id"]: (row["image"], row["candidates"][0]["text"]) for row in joined} == {
        f"u{i}": (f"{i}.png", f"answer {i}") for i in (0, 2, 3)}  # fmt: skip
    assert all(row["prompt"] == f"What color is thing {row['id'][1]}?" for row in joined)


def test_defect_a_ragged_item_kills_the_stage(tmp_path: Path) -> None:
    """Pools of several iterations with different numbers of candidates an item."""
    pools = [pool(tmp_path / "p0", [candidate("u0", "cot", COT)]),
             pool(tmp_path / "p1", [candidate("u0", "direct", "red"), candidate("u0", "cot", COT, 1),
                                    candidate("u1", "direct", "blue")])]  # fmt: skip
    rows = {row["id"]: row for row in pool_rows([unlabeled(0), unlabeled(1)], pools)}
    assert [len(rows[name]["candidates"]) for name in ("u0", "u1")] == [3, 1]
    assert {row["kind"] for row in rows.values()} == {"reasoning"}


def test_defect_the_chain_of_thought_is_lost() -> None:
    """The chosen response is kept whole, and its conclusion beside it as a direct answer."""
    row = {"id": "u1", "kind": "reasoning", "prompt": "What color?", "chosen": COT, "chosen_kind": "cot"}
    whole, plain = training_rows(row, ("1.png",))
    assert (whole.id, whole.kind, whole.response, whole.source) == ("u1:cot", "cot", COT, "self_cot")
    assert (plain.id, plain.kind, plain.response, plain.source) == ("u1:direct", "direct", "red", "self_direct")
    assert whole.messages[0].content == "<image>\n" + prompt("cot", "What color?")
    (only,) = training_rows({**row, "chosen": "red", "chosen_kind": "direct"}, ("1.png",))
    assert only.kind == "direct"
    caption = {"id": "u2", "kind": "caption", "prompt": "ignored", "chosen": "a dog", "chosen_kind": "dd"}
    (described,) = training_rows(caption, ("2.png",))
    assert (described.source, described.messages[0].content) == ("self_caption", f"<image>\n{prompt('dd')}")


@pytest.mark.parametrize("odd", ["<image>", "a dog <image> a cat"])
def test_a_response_that_spells_an_image_placeholder_stops_nothing(odd: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_records(data / "unlabeled.parquet", [unlabeled(0), unlabeled(1)])
    rows = [candidate("u0", "direct", odd, i) for i in range(2)] + [candidate("u1", "direct", "red", i) for i in (0, 1)]
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    out.mkdir()
    scratch.mkdir()
    inputs = {"data": Artifact(data, {}, True), "pool00": pool(tmp_path / "p0", rows)}
    curate(CurationTask(CurationConfig()), inputs, Workplace(out, scratch))
    assert [record.id for record in read_records(out / "self.parquet")] == ["u1:direct"]
    assert {row["id"]: row["kept"] for row in read_jsonl(out / "curated.jsonl")} == {"u0": False, "u1": True}


def test_the_pool_keeps_what_scorers_and_quotas_ask_for(tmp_path: Path) -> None:
    record = replace(unlabeled(0), family="naming")
    (row,) = pool_rows([record], [pool(tmp_path / "p0", [candidate("u0", "direct", "red")])])
    assert row["family"] == "naming"
    assert row["candidates"] == [
        {"kind": "direct", "text": "red", "finish_reason": "stop", "logprob": -1.0, "tokens": 2}]  # fmt: skip
    (plain,) = pool_rows([unlabeled(0)], [pool(tmp_path / "p1", [candidate("u0", "direct", "red")])])
    assert "family" not in plain


def test_rows_that_were_decided_apart_train_apart() -> None:
    row = {"id": "u1", "kind": "reasoning", "prompt": "What color?", "chosen": COT, "chosen_kind": "cot"}
    (only,) = training_rows({**row, "rows": [{"kind": "direct", "text": "red", "score": 1.0}]}, ("1.png",))
    assert (only.id, only.kind, only.response, only.source) == ("u1:direct", "direct", "red", "self_direct")
    (chain,) = training_rows({**row, "rows": [{"kind": "cot", "text": COT, "score": 1.0}]}, ("1.png",))
    assert (chain.id, chain.response, chain.source) == ("u1:cot", COT, "self_cot")


def curated(folder: Path, truth: list[dict[str, Any]], rows: list[dict[str, Any]], **options: Any) -> Path:
    """A curate step's folder over records u0, u1, ... of which `truth` is known."""
    data, out, scratch = folder / "data", folder / "out", folder / "scratch"
    for path in (data, out, scratch):
        path.mkdir()
    write_records(data / "unlabeled.parquet", [unlabeled(i) for i in range(3)])
    write_jsonl(data / "truth.jsonl", truth)
    inputs = {"data": Artifact(data, {}, True), "pool00": pool(folder / "pool", rows)}
    curate(CurationTask(CurationConfig(**options)), inputs, Workplace(out, scratch))
    return out


TRUTH = [{"id": "u0", "answer": "red", "chain": COT, "family": ""}, {"id": "u1", "answer": "blue", "family": ""}]
ROWS = [candidate("u0", "direct", "red"), candidate("u0", "direct", "green", 1), candidate("u0", "direct", "green", 2),
        candidate("u1", "direct", "green"), candidate("u2", "direct", "green")]  # fmt: skip


@pytest.mark.parametrize(("select", "expected"), [
    ("best", {"u0:direct": "green", "u1:direct": "green", "u2:direct": "green"}),
    ("oracle", {"u0:direct": "red"}),
    ("truth", {"u0:cot": COT, "u0:direct": "red", "u1:direct": "blue"}),
])  # fmt: skip
def test_upper_bounds_train_on_what_is_true(select: str, expected: dict[str, str], tmp_path: Path) -> None:
    out = curated(tmp_path, TRUTH, ROWS, select=select, reasoning_threshold=0.5)
    assert {record.id: record.response for record in read_records(out / "self.parquet")} == expected
    assert len(list(read_jsonl(out / "curated.jsonl"))) == 3


def test_curation_does_not_read_the_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: Path) -> None:
        raise AssertionError("the truth was read")

    monkeypatch.setattr("sicog_exp.selfdata.read_truth", refused)
    for select in ("best", "random"):
        (tmp_path / select).mkdir()
        curated(tmp_path / select, TRUTH, ROWS, select=select)
    (tmp_path / "oracle").mkdir()
    with pytest.raises(AssertionError, match="was read"):
        curated(tmp_path / "oracle", TRUTH, ROWS, select="oracle")


def test_weights_name_the_rows_that_train(tmp_path: Path) -> None:
    options = {"reasoning_threshold": 0.5, "disagreement_weight": 3.0}
    rows = [candidate("u0", "cot", COT), candidate("u0", "cot", COT, 1), candidate("u0", "direct", "blue")]
    out = curated(tmp_path, [], rows, **options)
    weight = pytest.approx(1 + 2 * 2 / 3, abs=1e-6)
    rows_of = [{"id": f"u0:{kind}", "weight": weight} for kind in ("cot", "direct")]
    assert list(read_jsonl(out / WEIGHTS)) == rows_of
    (tmp_path / "plain").mkdir()
    assert not (curated(tmp_path / "plain", [], rows) / WEIGHTS).exists()


def test_an_upper_bound_without_a_truth_stops_at_the_start(tmp_path: Path) -> None:
    write_records(tmp_path / "unlabeled.parquet", [unlabeled(0), unlabeled(1, "cod")])
    known = [{"id": "u0", "answer": "red", "family": ""}]
    data, recipe = Artifact(tmp_path, {}, True), Recipe(curation=CurationConfig(select="truth"))
    write_jsonl(tmp_path / "truth.jsonl", [])
    with pytest.raises(RecipeError, match=r"curation\.select=truth: data\.source=world knows no truth.*caption items"):
        check_truth(recipe, data)
    write_jsonl(tmp_path / "truth.jsonl", known)
    with pytest.raises(RecipeError, match=r"caption items.*sampling\.cod=0 and sampling\.dd=0"):
        check_truth(recipe, data)
    check_truth(replace(recipe, sampling=SamplingConfig(cod=0, dd=0)), data)
    check_truth(replace(recipe, curation=CurationConfig(select="random")), data)
    check_truth(replace(recipe, self_data=False), data)


def test_questions_are_found_again_in_their_prompts() -> None:
    record = unlabeled(5)
    words = record.messages[0].content.removeprefix("<image>\n")
    assert question_of("cot", words) == "What color is thing 5?"


@pytest.mark.parametrize(("scorer", "embedded"), [("similarity", True), ("cross_format", True), ("likelihood", False)])
def test_captions_are_embedded_where_any_scorer_compares_them(scorer: Any, embedded: bool, tmp_path: Path) -> None:
    made = Artifact(tmp_path / "generate-caption", {"fingerprint": "f", "step": "generate-caption"}, True)
    config = CurationConfig(encoder="minilm", caption_scorer=scorer)
    steps: list[Step] = []
    found = embeddings(config, [made], lambda step: steps.append(step) or made)
    assert [step.name for step in steps] == ["embed"] * embedded
    assert len(found) == embedded


def test_a_picture_of_any_allowed_size_is_sampled_and_scored(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`data.max_pixels` reaches the engine of a pool and of an evaluation."""

    class Stopped(Exception):
        """Once the engine is made."""

    given: list[int] = []

    def made(cls: Any, path: Path, config: ModelConfig, max_pixels: int = 0) -> Any:
        given.append(max_pixels)
        raise Stopped

    monkeypatch.setattr(TransformersEngine, "from_recipe", classmethod(made))
    monkeypatch.setattr("sicog_exp.selfdata.requests_for", lambda *_: [])
    model = Artifact(tiny_model, {"fingerprint": "m"}, True)
    place = Workplace(tiny_model, tiny_model)
    with pytest.raises(Stopped):
        generate(replace(task(), max_pixels=77), {"generator": model, "data": model}, place)
    scoring = EvaluationTask(EvaluationConfig(), ModelConfig(), {}, 78)
    with pytest.raises(Stopped):
        run_evaluation(scoring, {"model": model, "data": model}, place)
    assert given == [77, 78]
    engine = UNPATCHED(tiny_model, ModelConfig(device="cpu"), 79)
    assert engine._max_pixels == 79


def test_seconds_of_killed_attempts_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed embedding left 50 seconds behind it."""
    (tmp_path / "seconds").write_text("50")
    monkeypatch.setattr(embeddings_module, "embedder", lambda name: hashed)
    sampled = pool(tmp_path / "p", [candidate("u1", "dd", "a dog")])
    place = Workplace(tmp_path, tmp_path)
    embed(EmbeddingTask("minilm", ""), {"pool": sampled}, place)
    assert 50 < place.facts["model_seconds"] < 100
    assert float((tmp_path / "seconds").read_text()) > 50
