"""An exported generation is whole, loads elsewhere, reads back, and says where it comes from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sicog_exp.cli import main
from sicog_exp.data.images import ImageError, ImageFolder, open_image
from sicog_exp.data.readers import Intake, read_annotated
from sicog_exp.records import Record, conversation, read_records
from sicog_exp.reporting.export import CHAT, LLAVA, Exported, ExportError, copy_images, export, write_self_data
from sicog_exp.store import MANIFEST, file_checksum

pytestmark = pytest.mark.timeout(1800)


class Runs:
    """The tiny run in a tracking store of its own, which a test may change; its artifacts are those of the original."""

    def __init__(self, folder: Path, copy: Path) -> None:
        from mlflow import MlflowClient

        self.store, self.uri = folder / "store", f"sqlite:///{copy}"
        shutil.copyfile(folder / "mlflow.db", copy)
        self.client = MlflowClient(self.uri)
        self.experiment_id = self.client.get_experiment_by_name("end-to-end").experiment_id
        found = self.client.search_runs([self.experiment_id], max_results=500)
        self.experiment = next(r for r in found if r.data.tags.get("sicog.level") == "experiment")
        self.id = self.experiment.info.run_id
        mine = [r for r in found if r.data.tags.get("mlflow.parentRunId") == self.id]
        self.generations = {int(r.data.tags["sicog.generation"]): r.info.run_id for r in mine}
        self.step = next(r.info.run_id for r in found if r.data.tags.get("sicog.level") == "step")
        path = self.client.download_artifacts(self.id, "summary.json", str(copy.parent))
        self.summary = json.loads(Path(path).read_text())

    def forget_models(self) -> None:
        for model in self.client.search_logged_models([self.experiment_id]):
            self.client.delete_logged_model(model.model_id)

    def curated(self, index: int) -> Path:
        (source,) = (d.dataset.source for d in self.client.get_run(self.generations[index]).inputs.dataset_inputs
                     if d.dataset.name == "self-data")  # fmt: skip
        return self.store / Path(json.loads(source)["uri"]).name


@pytest.fixture
def runs(tiny_run: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    import mlflow

    before = mlflow.get_tracking_uri()
    made = Runs(tiny_run[0], tmp_path / "copy.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made.uri)
    yield made
    mlflow.set_tracking_uri(before)


@pytest.fixture
def away(tiny_run: tuple[Path, str]) -> Iterator[None]:
    """The step store is on another machine."""
    store = tiny_run[0] / "store"
    hidden = store.rename(store.with_name("elsewhere"))
    yield
    hidden.rename(store)


def read_back(file: Path, folder: Path) -> list[Record]:
    intake = Intake()
    folder.mkdir()
    rows = list(read_annotated(file, file.parent, ImageFolder(folder, 10**6), intake))
    assert not intake.rejected
    assert not sum(intake.reworded.values())
    return rows


def answer(folder: Path, picture: Path) -> str:
    """A greedy answer through plain transformers, as the model card says."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
    asked = [{"type": "image"}, {"type": "text", "text": "Describe the image in detail, step by step."}]
    text = processor.apply_chat_template([{"role": "user", "content": asked}], add_generation_prompt=True)
    inputs = processor(images=[open_image(picture.parent, picture.name, 10**6)], text=text, return_tensors="pt")
    with torch.inference_mode():
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=24)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :])


def front(card: Path) -> dict[str, Any]:
    _, header, body = card.read_text().split("---\n", 2)
    assert "{{" not in body
    return yaml.safe_load(header)


@pytest.mark.parametrize("logged", [True, False])
def test_the_model_is_that_of_the_run(runs: Runs, tmp_path: Path, world_images: list[Path], logged: bool) -> None:
    if not logged:
        runs.forget_models()
    made = export(f"{runs.id}:G1", tmp_path / "new" / "out")
    assert made.model_from == ("MLflow" if logged else "the step store")
    stored, model = runs.store / runs.summary["models"][1], made.directory / "model"
    wanted = json.loads((stored / MANIFEST).read_text())["outputs"]
    assert {path.name: file_checksum(path) for path in model.iterdir() if path.name != "README.md"} == wanted
    assert answer(model, world_images[0]) == answer(stored, world_images[0])


def test_both_files_of_the_self_data_read_back_to_the_same_messages(runs: Runs, tmp_path: Path) -> None:
    made = export(f"{runs.id}:G2", tmp_path / "out")
    folder, wanted = made.directory / "self-data", read_records(runs.curated(2) / "self.parquet")
    assert made.rows == len(wanted) > 0
    for i, name in enumerate((LLAVA, CHAT)):
        found = read_back(folder / name, tmp_path / str(i))
        assert [(r.id, r.kind, r.messages) for r in found] == [(r.id, r.kind, r.messages) for r in wanted]
    names = {image for record in wanted for image in record.images}
    assert {str(path.relative_to(folder)) for path in (folder / "images").iterdir()} == names
    first = json.loads((folder / LLAVA).read_text())[0]
    assert [turn["from"] for turn in first["conversations"]] == ["human", "gpt"]
    assert first["conversations"][0]["value"].startswith("<image>\n")


def test_cards_recipe_and_scores_tell_where_it_comes_from(runs: Runs, tmp_path: Path) -> None:
    made = export(runs.generations[2], tmp_path / "out")
    card, data_card = made.directory / "model/README.md", made.directory / "self-data/README.md"
    assert front(card)["pipeline_tag"] == "image-text-to-text"
    assert front(card)["library_name"] == "transformers"
    assert front(data_card)["license"] == "cc-by-sa-4.0"
    given = {d.dataset.name: d.dataset.digest for d in
             runs.client.get_run(runs.generations[2]).inputs.dataset_inputs}  # fmt: skip
    for text in ("generation 1", "seed 3", "OpenMoji", runs.id, *given.values()):
        assert text in card.read_text()
    for text in ("written by a model", f"{made.rows} about", given["self-data"], "Known errors", "OpenMoji"):
        assert text in data_card.read_text()
    assert str(runs.store.parent) not in card.read_text() + data_card.read_text(), "a card names no machine's paths"
    assert yaml.safe_load((made.directory / "recipe.yaml").read_text())["name"] == "tiny"
    scores = json.loads((made.directory / "scores.json").read_text())
    for task, score in runs.summary["generations"][2].items():
        assert score.items() <= scores["scores"][task].items()
        assert f"{100 * score['mean']:.1f} [{100 * score['low']:.1f}" in card.read_text()
    assert [(d["before"], d["after"]) for d in scores["differences_to_G0"]] == [("G0", "G2")] * 2


def test_the_hub_s_own_readers_take_the_cards(runs: Runs, tmp_path: Path) -> None:
    import datasets
    from huggingface_hub import DatasetCard, ModelCard

    made = export(f"{runs.id}:G1", tmp_path / "out")
    assert ModelCard.load(made.directory / "model/README.md").data.eval_results
    assert DatasetCard.load(made.directory / "self-data/README.md").data.configs
    for name in ("chat", "llava"):
        rows = datasets.load_dataset(str(made.directory / "self-data"), name, cache_dir=str(tmp_path / "cache"))
        assert rows["train"].num_rows == made.rows


def test_an_experiment_s_run_stands_for_its_champion(runs: Runs, tmp_path: Path) -> None:
    runs.client.set_tag(runs.id, "sicog.champion", "G1")
    assert export(runs.id, tmp_path / "a").generation == "G1 of tiny"
    runs.client.delete_tag(runs.id, "sicog.champion")
    assert export(runs.id, tmp_path / "b").generation == "G2 of tiny"


def test_the_first_generation_has_no_self_data_and_says_so(runs: Runs, tmp_path: Path,
                                                           capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    assert main(["export", f"{runs.id}:G0", str(tmp_path / "out")]) == 0
    assert "no self-data" in capsys.readouterr().out
    assert not (tmp_path / "out/self-data").exists()
    assert "without any\nself-generated data" in (tmp_path / "out/model/README.md").read_text()


def test_without_the_store_the_texts_are_there_and_the_pictures_are_named(runs: Runs, away: None,
                                                                          tmp_path: Path) -> None:  # fmt: skip
    made = export(f"{runs.id}:G1", tmp_path / "out")
    (note,) = made.notes
    assert "missing: self-data/images" in note
    assert "sicog iterate" in note
    assert made.images == 0
    assert len(json.loads((made.directory / "self-data" / LLAVA).read_text())) == made.rows > 0
    assert "**is missing**" in (made.directory / "self-data/README.md").read_text()


def test_a_run_of_before_without_its_store_gives_the_rest(runs: Runs, away: None, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Runs logged their curated rows only later."""
    from sicog_exp.reporting import export as module

    download = module._download
    monkeypatch.setattr(module, "_download", lambda client, run, name, folder: (
        None if name == "self-data" else download(client, run, name, folder)))  # fmt: skip
    made = export(f"{runs.id}:G1", tmp_path / "out")
    assert "missing: self-data/:" in made.notes[0]
    assert not (made.directory / "self-data").exists()
    assert (made.directory / "model/model.safetensors").is_file()


def test_no_model_anywhere_is_an_error_that_leaves_nothing(runs: Runs, away: None, tmp_path: Path) -> None:
    runs.forget_models()
    with pytest.raises(ExportError, match=r"no model of G1: none is logged in .* holds no "):
        export(f"{runs.id}:G1", tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_damaged_model_is_not_passed_on(runs: Runs, tmp_path: Path) -> None:
    runs.forget_models()
    victim = runs.store / runs.summary["models"][1] / "config.json"
    before = victim.read_bytes()
    victim.write_bytes(before + b" ")
    try:
        with pytest.raises(ExportError, match=r"damaged \(config.json\)"):
            export(f"{runs.id}:G1", tmp_path / "out")
    finally:
        victim.write_bytes(before)


def recipe_reads(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], Any]) -> None:
    """As if the run had been one of a changed recipe."""
    from sicog_exp.reporting import export as module

    download = module._download

    def changed(client: Any, run: Any, name: str, folder: Path) -> Path | None:
        path = download(client, run, name, folder)
        if path and name == "recipe.yaml":
            values = yaml.safe_load(path.read_text())
            change(values)
            path.write_text(yaml.safe_dump(values))
        return path

    monkeypatch.setattr(module, "_download", changed)


def test_a_recipe_of_another_version_exports(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def older(values: dict[str, Any]) -> None:
        del values["closing_steps"]
        values["mixture"] = {"self_caption": 1.0, "self_reasoning": 3.0}

    recipe_reads(monkeypatch, older)
    made = export(f"{runs.id}:G1", tmp_path / "out")
    assert "self reasoning 75.0%" in (made.directory / "model/README.md").read_text()


def test_the_control_without_self_data_exports_none(runs: Runs, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    recipe_reads(monkeypatch, lambda values: values.update(self_data=False))
    made = export(f"{runs.id}:G2", tmp_path / "out")
    assert made.notes == ("no self-data/: G2 was trained on annotated and instruction rows alone",)
    assert not (made.directory / "self-data").exists()


@pytest.mark.parametrize(("base", "named"), [("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf"),
                                             ("/home/someone/secret/llava", None)])  # fmt: skip
def test_cards_of_own_data_claim_no_licence_and_name_hub_bases_only(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str, named: str | None) -> None:  # fmt: skip
    def own(values: dict[str, Any]) -> None:
        values["data"] |= {"source": "own", "annotated": "/home/someone/secret/a.json"}
        values["model"]["base"] = base
        values["curation"]["select"] = "random"

    recipe_reads(monkeypatch, own)
    made = export(f"{runs.id}:G2", tmp_path / "out")
    card, data_card = made.directory / "model/README.md", made.directory / "self-data/README.md"
    assert front(card).get("base_model") == named
    assert "license" not in front(data_card)
    assert "secret" not in card.read_text() + data_card.read_text()
    assert "drawn at random" in card.read_text()
    assert "Not at all: one valid candidate" in data_card.read_text()


def test_cards_name_an_upper_bound_and_every_scorer(runs: Runs, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def bound(values: dict[str, Any]) -> None:
        scorers = {"reasoning_scorer": "listing", "reasoning_blend": {"likelihood": 0.5}}
        values["curation"] |= {"select": "oracle", **scorers}

    recipe_reads(monkeypatch, bound)
    made = export(f"{runs.id}:G2", tmp_path / "out")
    assert "an upper bound, not a self-improved model" in (made.directory / "model/README.md").read_text()
    data_card = (made.directory / "self-data/README.md").read_text()
    assert "Not self-data: an upper bound" in data_card
    assert "all that is listed about the image + 0.5 x mean probability of its tokens" in data_card


@pytest.mark.parametrize(("suffix", "message"), [
    ("", "no run of sqlite"), (":G1", "no run of sqlite"), (":Gx", "named as in")])  # fmt: skip
def test_an_unknown_run(runs: Runs, tmp_path: Path, suffix: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export(f"nothing{suffix}", tmp_path / "out")


def test_a_run_of_another_level_or_generation(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="neither an experiment nor a generation"):
        export(runs.step, tmp_path / "out")
    with pytest.raises(ExportError, match="has no G7; it has G0, G1, G2"):
        export(f"{runs.id}:G7", tmp_path / "out")
    with pytest.raises(ExportError, match="is generation 1; name its experiment"):
        export(f"{runs.generations[1]}:G2", tmp_path / "out")
    idle = runs.client.create_run(runs.experiment_id, tags={"sicog.finished_run": runs.id}).info.run_id
    with pytest.raises(ExportError, match=f"its work is in run {runs.id}"):
        export(idle, tmp_path / "out")


def test_a_run_that_did_not_finish(runs: Runs, tmp_path: Path) -> None:
    killed = runs.client.create_run(runs.experiment_id, tags={"sicog.level": "experiment"}).info.run_id
    with pytest.raises(ExportError, match="has no generation yet"):
        export(killed, tmp_path / "out")
    runs.client.create_run(runs.experiment_id, tags={"sicog.level": "generation", "sicog.generation": "0",
                                                     "mlflow.parentRunId": killed})  # fmt: skip
    with pytest.raises(ExportError, match="logged no summary"):
        export(killed, tmp_path / "out")


def test_the_folder_must_be_new_or_empty(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("kept")
    assert main(["export", runs.id, str(full)]) == 2
    assert f"sicog export: {full}: not an empty folder" in capsys.readouterr().err
    assert [path.name for path in full.iterdir()] == ["mine.txt"]
    empty = tmp_path / "empty"
    empty.mkdir()
    made: Exported = export(runs.id, empty)
    assert (made.directory / "model/config.json").is_file()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match="current folder"):
        export(runs.id, Path())


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "images/../../out.png"])
def test_no_image_is_taken_from_or_written_to_elsewhere(tmp_path: Path, world_images: list[Path], name: str) -> None:
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    shutil.copyfile(world_images[0], tmp_path / "secret.png")
    row = Record("1", conversation("What?", "A dog.", (name,)), (name,), "direct", "self_direct")
    write_self_data([row], tmp_path / "out")
    with pytest.raises((ImageError, ExportError)):
        copy_images([row], root, tmp_path / "out")
