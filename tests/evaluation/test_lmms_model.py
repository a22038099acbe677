"""The lmms-eval model over an engine, request by request."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lmms_eval.api.instance import Instance, unwrap_generation_output
from lmms_eval.models import get_model, get_model_manifest
from oracle import OracleEngine, RefusingOracle
from PIL import Image

from sicog_exp.evaluation.answers import KeptAnswers
from sicog_exp.evaluation.lmms_model import EngineModel, HarnessError

TASK, SPLIT = "some_task", "test"


def request(doc_id: int, context: str = "What is it?", visuals: Any = None, **options: Any):
    metadata = {"task": TASK, "doc_id": doc_id, "repeats": 1, "split": SPLIT}
    arguments = (context, options, lambda doc: visuals, doc_id, TASK, SPLIT)
    return Instance(request_type="generate_until", arguments=arguments, idx=0, metadata=metadata)


def model_with(answer, batch_size: int = 2, max_new_tokens: int = 50) -> EngineModel:
    model = EngineModel(OracleEngine(answer), batch_size, max_new_tokens)
    model.task_dict = {TASK: {SPLIT: [{"number": i} for i in range(9)]}}
    return model


def echo(request) -> str:
    return f"<{request.sample_id} {request.messages[0].content}>"


def test_registered_by_entry_point():
    assert get_model("sicog") is EngineModel
    assert get_model_manifest("sicog").chat_class_path is None


def test_order_of_requests_changes_no_answer():
    requests = [request(i, context="?" * (i % 3 + 1)) for i in range(9)]
    answers = dict(zip(range(9), model_with(echo).generate_until(requests), strict=True))
    backwards = dict(zip(reversed(range(9)), model_with(echo).generate_until(requests[::-1]), strict=True))
    assert answers == backwards
    assert all(f"{TASK}/{i}/0" in answer for i, answer in answers.items())


def test_token_limit_is_the_smaller_of_task_and_model():
    model = model_with(echo)
    model.generate_until([request(0, max_new_tokens=8), request(1, max_new_tokens=4096), request(2)])
    assert sorted(d.max_new_tokens for d in model.engine.decodings) == [8, 50]
    assert [d.temperature for d in model.engine.decodings] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("until", "expected"),
    [([], "a\n\nb. c"), (["\n\n"], "a\n\nb. c"), (["\n\n", ". "], "a"), (". ", "a\n\nb"), (None, "a\n\nb. c"),
     ([""], "a\n\nb. c")],
)
def test_until_cuts(until: Any, expected: str):
    """An empty line alone is what the harness puts where a task names nothing: answers of several paragraphs stay."""
    assert model_with(lambda _: "a\n\nb. c").generate_until([request(0, until=until)]) == [expected]


def test_repeated_requests_are_asked_once():
    model = model_with(echo)
    answers = model.generate_until([request(0), request(0), request(1)])
    assert len(model.engine.asked) == 2
    assert answers[0] == answers[1] != answers[2]


def test_undecoded_image_is_its_file_and_handles_are_closed(tmp_path: Path):
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4), "red").save(path)
    picture = Image.open(path)
    model = model_with(echo)
    model.generate_until([request(0, visuals=[picture]), request(1, visuals=[str(path)])])
    assert [r.images for r in model.engine.asked] == [(path,), (path,)]
    assert model.engine.asked[0].messages[0].content == "<image>\nWhat is it?"
    assert picture.fp is None


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1", "LA"])
def test_decoded_image_is_spooled_without_loss(mode: str):
    picture = Image.effect_noise((9, 7), 80).convert(mode)
    seen = []

    def look(request) -> str:
        with Image.open(request.images[0]) as image:
            seen.append(image.convert("RGBA").tobytes())
        return "yes"

    model = model_with(look)
    model.generate_until([request(0, visuals=[picture]), request(1, visuals=[picture.copy()])])
    assert seen == [picture.convert("RGBA").tobytes()] * 2
    path = model.engine.asked[0].images[0]
    assert path == model.engine.asked[1].images[0]
    model.clean()
    assert not path.exists()
    assert isinstance(model.engine, OracleEngine), "clean() must keep the engine"


def test_decoded_images_are_named_by_their_pixels_and_stay_where_they_are_told(tmp_path: Path):
    model = EngineModel(OracleEngine(echo), 2, 50, tmp_path / "pictures")
    model.task_dict = {TASK: {SPLIT: [{}] * 3}}
    red, blue = (Image.new("RGB", (5, 4), name) for name in ("red", "blue"))
    model.generate_until([request(0, visuals=[red]), request(1, visuals=[blue]), request(2, visuals=[red.copy()])])
    assert model.shown[TASK, 0] == model.shown[TASK, 2] != model.shown[TASK, 1]
    model.clean()
    names = sorted(path.stem for path in (tmp_path / "pictures").iterdir())
    assert names == sorted({model.shown[TASK, 0], model.shown[TASK, 1]})


def test_changed_image_is_not_taken_from_its_file(tmp_path: Path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    picture = Image.open(tmp_path / "a.png")
    picture.thumbnail((4, 4))
    sizes = []
    model = model_with(lambda r: sizes.append(Image.open(r.images[0]).size) or "yes")
    model.generate_until([request(0, visuals=[picture])])
    assert sizes == [(4, 4)]


@pytest.mark.parametrize("visual", ["/no/such/image.png", None, 7])
def test_missing_image_is_an_error(visual: Any):
    with pytest.raises(HarnessError, match="some_task/0/0"):
        model_with(echo).generate_until([request(0, visuals=[visual])])


def test_placed_placeholders_are_kept_and_counted(tmp_path: Path):
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path)
    model = model_with(echo)
    model.generate_until([request(0, context="First <image> then text", visuals=[str(path)])])
    assert model.engine.asked[0].messages[0].content == "First <image> then text"
    with pytest.raises(HarnessError, match="2 <image>"):
        model.generate_until([request(0, context="<image> <image>", visuals=[str(path)])])


def test_log_likelihood_is_the_mean_loss_in_the_harness_form():
    """0.7.3 stringifies plain (float, bool) pairs and takes the smallest number as the answer."""
    continuations = [" yes", " no", lambda doc: f" {doc['number']}"]
    requests = []
    for i, text in enumerate(continuations):
        instance = request(i)
        instance.arguments = (instance.args[0], text, *instance.args[2:])
        requests.append(instance)
    results = [unwrap_generation_output(r)[0] for r in model_with(echo).loglikelihood(requests)]
    assert results == [(1.5, False), (1.0, True), (0.5, True)]


def test_failures_are_raised():
    def fail(_) -> str:
        raise MemoryError("out of memory")

    with pytest.raises(MemoryError):
        model_with(fail).generate_until([request(0)])


def test_a_question_that_cannot_be_put_is_named_and_never_scored(tmp_path: Path):
    """Who reads the results leaves it out; lmms-eval by itself would take an empty answer for a wrong one."""
    engine = KeptAnswers(RefusingOracle(echo, refuses=lambda r: "wide" in r.messages[0].content), tmp_path, "w")
    asked, refused = [request(0), request(1, context="wide")], {}
    model = EngineModel(engine, 2, 50, refused=refused)
    model.task_dict = {TASK: {SPLIT: [{}] * 3}}
    assert [bool(answer) for answer in model.generate_until(asked)] == [True, False]
    assert refused == {(TASK, 1): "too wide"}
    strict = EngineModel(engine, 2, 50)
    strict.task_dict = model.task_dict
    with pytest.raises(HarnessError, match="some_task/1/0 cannot be put to this model: too wide"):
        strict.generate_until(asked)


def test_command_line_arguments(monkeypatch: pytest.MonkeyPatch):
    loaded = []
    monkeypatch.setattr("sicog_exp.evaluation.lmms_model._load_engine", lambda v: loaded.append(v) or SimpleNamespace())
    model = EngineModel.create_from_arg_string("pretrained=a/b,max_new_tokens=7", {"batch_size": 1, "device": "cpu"})
    assert (model.batch_size, model.max_new_tokens, loaded[0]["device"]) == (128, 7, "cpu")
    assert EngineModel.create_from_arg_string("pretrained=a", {"batch_size": "4"}).batch_size == 4
    assert EngineModel.create_from_arg_string("pretrained=a,batch_size=3", {"batch_size": "4"}).batch_size == 3
    with pytest.raises(HarnessError, match="pretrained=PATH is missing"):
        EngineModel.create_from_arg_string("batch_size=3", {})
    with pytest.raises(HarnessError, match="unknown treads"):
        EngineModel.create_from_arg_string("pretrained=a,treads=1", {})
