"""Sources become one data set directory; bad rows are set aside, counted and explained."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from formats import parquet_shards, qa, shards, write_shard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sicog_exp import prompts
from sicog_exp.data import sources
from sicog_exp.data.images import ImageFolder
from sicog_exp.data.readers import DataError, Intake, read_annotated, read_unlabeled
from sicog_exp.data.sources import SPLITS, build_dataset, check_disjoint, source_state
from sicog_exp.recipe import DataConfig
from sicog_exp.records import Message, Record, read_jsonl, read_records
from sicog_exp.store import checksums

LIMIT = 50_000_000
SMALL = DataConfig(annotated_images=4, unlabeled_images=6, instruction_images=3, development_images=5,
                   benchmark_images=5)  # fmt: skip


@lru_cache(maxsize=1)
def photographs() -> Path:
    spec = find_spec("skimage")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "data"


def save_picture(path: Path, seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path.name


def llava(id: str, image: str, asked: str = "What is it?", answer: str = "cat") -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": answer}]
    return {"id": id, "image": image, "conversations": turns}


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_all(tmp_path: Path, file: Path) -> tuple[list[Record], Intake]:
    intake = Intake()
    folder = ImageFolder(tmp_path / "out", LIMIT)
    return list(read_annotated(file, file.parent, folder, intake)), intake


def every(directory: Path) -> dict[str, list[Record]]:
    return {split: read_records(directory / f"{split}.parquet") for split in SPLITS}


# World and easy-vqa.


@pytest.fixture(scope="module", params=["world", "easyvqa"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, Path]:
    config = replace(SMALL, source=request.param)
    directory = tmp_path_factory.mktemp(request.param)
    build_dataset(config, directory)
    return config, directory


def test_splits_share_no_image(built: tuple[DataConfig, Path]) -> None:
    _, directory = built
    shown = {split: {image for r in records for image in r.images} for split, records in every(directory).items()}
    assert [len(shown[split]) for split in ("annotated", "unlabeled", "development", "benchmark")] == [4, 6, 5, 5]
    assert sum(map(len, shown.values())) == len(set().union(*shown.values()))
    pixels = {np.asarray(Image.open(directory / image)).tobytes() for image in set().union(*shown.values())}
    assert len(pixels) == sum(map(len, shown.values()))
    assert {f"images/{file.name}" for file in (directory / "images").iterdir()} == set().union(*shown.values())


def test_two_builds_are_equal(built: tuple[DataConfig, Path], tmp_path: Path) -> None:
    config, directory = built
    build_dataset(config, tmp_path)
    assert checksums(tmp_path) == checksums(directory)


def test_a_build_over_a_killed_one_is_equal(built: tuple[DataConfig, Path], tmp_path: Path) -> None:
    config, directory = built
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "stale.png").write_bytes(b"torn")
    build_dataset(config, tmp_path)
    assert checksums(tmp_path) == checksums(directory)


def test_no_ground_truth_in_unlabeled_records(built: tuple[DataConfig, Path]) -> None:
    records = every(built[1])["unlabeled"]
    assert all(record.response is None and len(record.messages) == 1 for record in records)
    assert {record.kind for record in records} == {"cod", "cot"}
    known = {row["id"] for row in read_jsonl(built[1] / "truth.jsonl")}
    assert known <= {record.id for record in records}


def test_the_truth_holds_whole_responses_where_the_source_writes_them(built: tuple[DataConfig, Path]) -> None:
    rows = list(read_jsonl(built[1] / "truth.jsonl"))
    for row in rows:
        known = row.get("answer") or row["description"]
        if "chain" in row:
            assert prompts.final_text("cot" if "answer" in row else "cod", row["chain"]) == known
    described = {row["id"].rpartition(":")[0] for row in rows if "description" in row}
    for row in rows:
        assert ("chain" in row) == (row["id"].rpartition(":")[0] in described), "a chain lists all that is there"
    assert described


def test_defect_one_prompt_table_words_every_row(built: tuple[DataConfig, Path]) -> None:
    for records in every(built[1]).values():
        for record in records:
            if record.source in ("instruction", "text"):
                continue
            words = record.messages[0].content.removeprefix("<image>\n")
            assert words == prompts.prompt(record.kind, prompts.question_of(record.kind, words))


def test_annotations_parse_and_agree(built: tuple[DataConfig, Path]) -> None:
    records = {record.id: record for record in every(built[1])["annotated"]}
    for id, record in records.items():
        other = {"cod": id.replace(":cod", ":dd"), "cot": id.replace(":cot", ":direct")}.get(record.kind)
        if other is not None and record.response is not None:
            assert prompts.final_text(record.kind, record.response) == records[other].response


def test_examined_records_have_answer_and_family(built: tuple[DataConfig, Path]) -> None:
    for split in ("development", "benchmark"):
        for record in every(built[1])[split]:
            assert record.kind == "direct"
            assert record.response
            assert record.family


def test_summary_counts_what_was_written(built: tuple[DataConfig, Path]) -> None:
    summary = json.loads((built[1] / "summary.json").read_text())
    for split, records in every(built[1]).items():
        assert summary["splits"][split]["records"] == len(records)
    assert all(0 < prior["share"] <= 1 for prior in summary["blind_prior"].values())


def test_world_instruction_has_conversations_and_text(tmp_path: Path) -> None:
    build_dataset(SMALL, tmp_path)
    records = every(tmp_path)["instruction"]
    talks = [record for record in records if record.kind == "direct"]
    assert len(talks) == len([record for record in records if record.kind == "text"]) == 3
    assert all(len(record.messages) == 12 and record.messages[0].content.startswith("<image>") for record in talks)


def test_easyvqa_facts_are_never_contradictory() -> None:
    import easy_vqa

    package = sources._Package("train", easy_vqa.get_train_image_paths(), easy_vqa.get_train_questions())
    for questions in package.asked.values():
        known = {word for text, answer in questions for word in sources._revealed(text, answer)} - {"shape"}
        assert len(known & set(sources.SHAPES)) <= 1
        assert len(known & set(sources.HUES)) <= 1


def test_easyvqa_asks_for_no_more_than_there_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.benchmark_images=1001"):
        build_dataset(replace(SMALL, source="easyvqa", benchmark_images=1001), tmp_path)


def test_a_shared_picture_is_found(tmp_path: Path) -> None:
    messages = (Message("user", "<image>"), Message("assistant", "cat"))
    records = [Record("a", messages, (name,), "direct", "x") for name in ("one.png", "two.png")]
    check_disjoint({"one.png": "1", "two.png": "2"}, {"annotated": records[:1], "benchmark": records[1:]})
    with pytest.raises(DataError, match=r"two\.png \(benchmark\) shows the pixels of one\.png \(annotated\)"):
        check_disjoint({"one.png": "1", "two.png": "1"}, {"annotated": records[:1], "benchmark": records[1:]})


# A user's own files.


@pytest.fixture
def own(tmp_path: Path) -> DataConfig:
    """Six photographs annotated, four unlabeled; all real."""
    home = tmp_path / "mine"
    (home / "pool" / "more").mkdir(parents=True)
    rows = []
    for name in ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "coins.png", "page.png"):
        shutil.copy(photographs() / name, home / name)
        rows += [llava(f"{name}-a", name), llava(f"{name}-b", name, "Describe it.", "word " * 20)]
    for name in ("brick.png", "camera.png", "grass.png", "more/moon.png"):
        shutil.copy(photographs() / Path(name).name, home / "pool" / name)
    write_lines(home / "rows.jsonl", rows)
    return DataConfig(source="own", annotated=str(home / "rows.jsonl"), unlabeled=str(home / "pool"))


def test_own_photographs(own: DataConfig, tmp_path: Path) -> None:
    build_dataset(own, tmp_path / "out")
    found = every(tmp_path / "out")
    assert {split: len(records) for split, records in found.items()} == {
        "annotated": 8, "unlabeled": 4, "instruction": 0, "development": 2, "benchmark": 2}  # fmt: skip
    assert {record.kind for record in found["annotated"]} == {"direct", "dd"}
    assert all(record.kind == "cod" and record.id.endswith(":caption") for record in found["unlabeled"])
    build_dataset(own, tmp_path / "again")
    assert checksums(tmp_path / "out") == checksums(tmp_path / "again")


def test_building_says_how_far_it_is(own: DataConfig, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    build_dataset(own, tmp_path / "out", lambda done, total: told.append((done, total)))
    assert {total for _, total in told} == {1000}
    done = [number for number, _ in told]
    assert done == sorted(set(done)), "each once, and never back"
    assert done[0] < 500 < done[-1] <= 1000


def test_own_development_and_benchmark_files(own: DataConfig, tmp_path: Path) -> None:
    """A picture of the benchmark leaves development, annotated and unlabeled; each one is listed."""
    home = Path(str(own.annotated)).parent
    shutil.copy(photographs() / "logo.png", home / "logo.png")
    shutil.copy(photographs() / "text.png", home / "text.png")
    shutil.copy(photographs() / "logo.png", home / "pool" / "copy.png")
    bench = write_lines(home / "bench.jsonl", [llava("1", "logo.png"), llava("2", "coffee.png")])
    dev = write_lines(home / "dev.jsonl", [llava("1", "text.png"), llava("2", "logo.png")])
    build_dataset(replace(own, benchmark=str(bench), development=str(dev)), tmp_path / "out")
    found = every(tmp_path / "out")
    assert [len(found[split]) for split in SPLITS] == [10, 4, 0, 1, 2]
    aside = [row for row in read_jsonl(tmp_path / "out" / "rejected.jsonl") if row["problem"] == "held out"]
    assert [(Path(row["file"]).name, row["row"]) for row in aside] == [
        ("dev.jsonl", 2), ("rows.jsonl", 3), ("rows.jsonl", 4), ("pool", 3)]  # fmt: skip


def test_public_sets_may_show_training_pictures_and_no_scored_one(own: DataConfig, tmp_path: Path) -> None:
    home = Path(str(own.annotated)).parent
    scored = write_lines(home / "scored.jsonl", [llava("s", "page.png")])
    rows = [llava("known", "coffee.png"), llava("scored", "page.png"), llava("own", save_picture(home / "new.png", 9))]
    text = {"id": "t", "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}
    public = write_lines(home / "public.jsonl", [*rows, text])
    config = replace(own, benchmark=str(scored), instruction=str(public), alignment=str(public),
                     holdout=0.0)  # fmt: skip
    build_dataset(config, tmp_path / "out")
    found = {split: read_records(tmp_path / "out" / f"{split}.parquet") for split in (*SPLITS, "alignment")}
    assert [record.id for record in found["instruction"]] == ["known", "own", "t"]
    assert [record.id for record in found["alignment"]] == ["known", "own", "t"]
    assert any(record.images == found["instruction"][0].images for record in found["annotated"])
    aside = [row for row in read_jsonl(tmp_path / "out/rejected.jsonl") if row["id"] == "scored"]
    assert [row["reason"] for row in aside] == ["shows an image of the benchmark split"] * 2
    assert not list((tmp_path / "out").glob(".*"))
    assert {"instruction", "alignment"} < set(source_state(config))
    assert len(found["unlabeled"]) == len(build_and_read(own, tmp_path / "without"))


def build_and_read(config: DataConfig, folder: Path) -> list[Record]:
    build_dataset(config, folder)
    assert not (folder / "alignment.parquet").exists(), "nothing was named"
    return read_records(folder / "unlabeled.parquet")


def test_own_unlabeled_rows_lose_their_answers(own: DataConfig, tmp_path: Path) -> None:
    home = Path(str(own.annotated)).parent
    rows = [{"image": "pool/brick.png", "question": "What is it?", "answer": "SECRET"},
            llava("x", "pool/brick.png", "Which color?", "SECRET"),
            {"image": "pool/camera.png"},
            {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]}],
             "images": ["pool/grass.png"]}]  # fmt: skip
    file = write_lines(home / "ask.jsonl", rows)
    build_dataset(replace(own, unlabeled=str(file)), tmp_path / "out")
    records = every(tmp_path / "out")["unlabeled"]
    assert [record.kind for record in records] == ["cod", "cot", "cot", "cod", "cod", "cot"]
    assert b"SECRET" not in (tmp_path / "out" / "unlabeled.parquet").read_bytes()
    assert [row["answer"] for row in read_jsonl(tmp_path / "out" / "truth.jsonl")] == ["SECRET", "SECRET"]


def test_own_limits_the_images_and_counts_the_rest(own: DataConfig, tmp_path: Path) -> None:
    build_dataset(replace(own, unlabeled_images=3), tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["splits"]["unlabeled"]["images"] == 3
    assert list(summary["unused"].values()) == [1]


def test_holdout_groups_by_picture(own: DataConfig, tmp_path: Path) -> None:
    """The same photograph under two names stays in one split."""
    home = Path(str(own.annotated)).parent
    Image.open(home / "coffee.png").save(home / "twin.bmp")
    with Path(str(own.annotated)).open("a") as file:
        file.write(json.dumps(llava("twin", "twin.bmp")) + "\n")
    build_dataset(own, tmp_path / "out")
    homes = [s for s, records in every(tmp_path / "out").items() for r in records if r.id in ("twin", "coffee.png-a")]
    assert len(homes) == 2
    assert len(set(homes)) == 1


@pytest.mark.parametrize("key", ["annotated", "unlabeled", "development", "benchmark", "root"])
def test_a_missing_path_names_its_key(own: DataConfig, tmp_path: Path, key: str) -> None:
    with pytest.raises(DataError, match=rf"nowhere.*data\.{key}"):
        build_dataset(replace(own, **{key: "/nowhere"}), tmp_path / "out")  # type: ignore[arg-type]


def test_an_empty_folder_and_an_empty_file(own: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="empty"):
        build_dataset(replace(own, unlabeled=str(tmp_path / "empty")), tmp_path / "out")
    with pytest.raises(DataError, match="holds no rows"):
        build_dataset(replace(own, annotated=str(tmp_path / "empty.jsonl")), tmp_path / "out")


def test_too_few_images_to_hold_out(own: DataConfig, tmp_path: Path) -> None:
    home = Path(str(own.annotated)).parent
    few = write_lines(home / "few.jsonl", [llava("1", "coffee.png"), llava("2", "page.png")])
    with pytest.raises(DataError, match="too few to hold out"):
        build_dataset(replace(own, annotated=str(few)), tmp_path / "out")


def test_no_image_left_for_unlabeled(own: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no usable row is left for data\.unlabeled"):
        build_dataset(replace(own, unlabeled=own.annotated), tmp_path / "out")


def test_the_state_follows_the_files(own: DataConfig) -> None:
    before = source_state(own)
    assert before == source_state(own)
    save_picture(Path(str(own.unlabeled)) / "new.png", 1)
    middle = source_state(own)
    assert middle["unlabeled"] != before["unlabeled"]
    save_picture(Path(str(own.annotated)).parent / "coffee.png", 2)
    assert source_state(own)["annotated"] != middle["annotated"]


def test_shards_make_a_data_set(own: DataConfig, tmp_path: Path) -> None:
    """Annotated rows from a pattern of .tar shards, unlabeled ones from a folder of Parquet with the images inside."""
    home = Path(str(own.annotated)).parent
    rows = [qa(Path(name).stem, (name,), "<image>\nWhat is it?", name) for name in
            ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "coins.png", "page.png")]  # fmt: skip
    asked = [qa(name, (f"pool/{name}.png",), "<image>\nWhere?") for name in ("brick", "camera", "grass")]
    sharded = replace(own, annotated=str(shards(home, rows)), unlabeled=str(parquet_shards(home, asked)))
    build_dataset(sharded, tmp_path / "out")
    assert [len(records) for records in every(tmp_path / "out").values()] == [4, 6, 0, 1, 1]
    assert {file.name for file in (tmp_path / "out").iterdir() if file.name.startswith(".")} == set()
    before = source_state(sharded)
    assert before == source_state(sharded)
    write_shard(home / "part-000.tar", home, rows[:1])
    assert source_state(sharded)["annotated"] != before["annotated"]
    assert source_state(sharded)["unlabeled"] == before["unlabeled"]


def test_the_hub_names_a_commit_or_says_why_not(own: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"hub:owner/name: the hub did not give it"):
        source_state(replace(own, annotated="hub:owner/name"))
    with pytest.raises(DataError, match=r"hub:owner/name: the hub did not give it"):
        build_dataset(replace(own, annotated="hub:owner/name"), tmp_path / "out")


def test_annotated_rows_are_not_held(own: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 kB or 20 kB a row: what a build holds does not grow with what rows say."""
    monkeypatch.setattr("sicog_exp.records.ROWS_PER_GROUP", 32)
    monkeypatch.setattr("sicog_exp.records.ROWS_READ", 32)
    home = Path(str(own.annotated)).parent
    names = [save_picture(home / f"p{i}.png", i) for i in range(20)]
    peaks = []
    for length in (2_000, 20_000):
        rows = [llava(f"{i}", names[i % 20], answer=f"{i} " + "x" * length) for i in range(300)]
        file = write_lines(home / f"{length}.jsonl", rows)
        del rows
        tracemalloc.start()
        build_dataset(replace(own, annotated=str(file)), tmp_path / str(length))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 1_000_000, peaks  # the file grew by 5.4 MB


# Bad input.


def _change(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda row: {**row, **changes}


def _turns(*pairs: tuple[Any, Any]) -> Callable[[dict[str, Any]], Any]:
    return _change(conversations=[{"from": speaker, "value": words} for speaker, words in pairs])


BAD: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "unreadable image": ("image", _change(image="broken.png")),
    "missing image": ("image", _change(image="missing.png")),
    "outside the root": ("image", _change(image="../outside.png")),
    "url": ("image", _change(image="http://example.org/a.png")),
    "no turns": ("keys", lambda row: {"id": row["id"], "image": row["image"]}),
    "empty turns": ("keys", _change(conversations=[])),
    "turn without words": ("keys", _change(conversations=[{"from": "human"}])),
    "truth value as words": ("keys", _turns(("human", "<image>\nA?"), ("gpt", True))),
    "no number as words": ("keys", _turns(("human", "<image>\nA?"), ("gpt", float("nan")))),
    "a video": ("keys", _change(video="a.mp4")),
    "videos": ("keys", _change(videos=["a.mp4"])),
    "tools": ("keys", _change(tools=[{"name": "search"}])),
    "tools as text": ("keys", _change(tools='[{"name": "search"}]')),
    "Qwen-VL's marks": ("placeholder", lambda row: {"id": row["id"], "conversations": [
        {"from": "user", "value": "Picture 1: <img>0.png</img>\nA?"}, {"from": "assistant", "value": "b"}]}),
    "a video's mark": ("placeholder", lambda row: {"id": row["id"], "conversations": [
        {"from": "user", "value": "<video>\nA?"}, {"from": "assistant", "value": "b"}]}),
    "api error object": ("keys", _turns(("human", "<image>\nA?"), ("gpt", {"error": {"code": 429}}))),
    "row is a list": ("keys", lambda row: [row]),
    "unknown kind": ("keys", _change(kind="poem")),
    "id is a list": ("keys", _change(id=["x"])),
    "placeholder without image": ("placeholder", _change(image=None)),
    "image without placeholder": ("placeholder", _turns(("human", "A?"), ("gpt", "b"))),
    "empty response": ("response", _turns(("human", "<image>\nA?"), ("gpt", "  "))),
    "no response": ("response", _turns(("human", "<image>\nA?"))),
    "unknown role": ("roles", _turns(("robot", "<image>\nA?"), ("gpt", "b"))),
    "wrong order": ("roles", _turns(("gpt", "b"), ("human", "<image>\nA?"), ("gpt", "b"))),
    "two answers": ("roles", _turns(("human", "<image>\nA?"), ("gpt", "b"), ("gpt", "c"))),
    "placeholder in an answer": ("roles", _turns(("human", "A?"), ("gpt", "<image>"))),
    "lone surrogate": ("encoding", _turns(("human", "<image>\nA?"), ("gpt", "\ud800"))),
    "the same row again, its image behind": ("repeated", lambda row: {**llava("row-0", "0.png"), "conversations": [
        {"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "cat"}]}),
    "the same row again": ("repeated", lambda row: llava("row-0", "0.png")),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_set_aside_with_reason_and_fix(tmp_path: Path, name: str) -> None:
    problem, change = BAD[name]
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    rows = [llava(f"row-{i}", save_picture(tmp_path / f"{i}.png", i)) for i in range(3)]
    file = write_lines(tmp_path / "rows.jsonl", [rows[0], change(rows[1]), rows[2]])
    records, intake = read_all(tmp_path, file)
    assert [record.id for record in records] == ["row-0", "row-2"]
    [bad] = intake.rejected
    assert (bad.row, bad.problem) == (2, problem)
    assert bad.reason
    assert bad.fix


def test_keys_and_marks_of_other_formats_that_say_nothing_are_no_fault(tmp_path: Path) -> None:
    """Columns of a table that other rows need, and HTML in a text."""
    html = "Why is <video src='a.mp4'></video> black, <video> and </video> too?"
    row = _turns(("human", html), ("gpt", "<img>x</img>"))({"id": "a"})
    empty = {"video": None, "videos": [], "audio": "", "tools": "[]", "image": "", "images": []}
    records, intake = read_all(tmp_path, write_lines(tmp_path / "rows.jsonl", [{**row, **empty}]))
    assert not intake.rejected
    assert (records[0].kind, records[0].messages[0].content) == ("text", html)


def test_marks_of_qwen_vl_say_what_to_write_instead(tmp_path: Path) -> None:
    row = _turns(("user", "Picture 1: <img>a.jpg</img>\nWhat?"), ("assistant", "cat"))({"id": "a"})
    _, intake = read_all(tmp_path, write_lines(tmp_path / "rows.jsonl", [row]))
    assert "<img>a.jpg</img>" in intake.rejected[0].reason
    assert intake.rejected[0].fix == "write <image> there and name the file under image"


@pytest.mark.parametrize("nothing", ["", None, []])
def test_an_image_that_is_empty_is_none(nothing: Any, tmp_path: Path) -> None:
    text = {"id": "t", "image": nothing, "conversations": [{"from": "human", "value": "Hi?"},
                                                          {"from": "gpt", "value": "yo"}]}  # fmt: skip
    seen = {**llava("a", ""), "image": nothing, "images": [save_picture(tmp_path / "a.png", 1)]}
    records, intake = read_all(tmp_path, write_lines(tmp_path / "rows.jsonl", [text, seen, llava("b", nothing)]))
    assert [(record.kind, len(record.images)) for record in records] == [("text", 0), ("direct", 1)]
    assert [bad.reason for bad in intake.rejected] == ["1 <image> but 0 images"]


def test_numbers_are_taken_as_text(tmp_path: Path) -> None:
    """Also those that a table has made into 2.0."""
    name = save_picture(tmp_path / "a.png", 1)
    rows = [{**llava("", name, "How many?", value), "id": id} for id, value in ((7, 42), (2.0, 3.0), (2.5, 1.5))]
    records, intake = read_all(tmp_path, write_lines(tmp_path / "rows.jsonl", rows))
    assert [(record.id, record.response) for record in records] == [("7", "42"), ("2", "3"), ("2.5", "1.5")]
    assert not intake.rejected
    asked = write_lines(tmp_path / "asked.jsonl", [{"id": 1.0, "image": name, "question": 12, "answer": 42}])
    [request] = read_unlabeled(asked, tmp_path, ImageFolder(tmp_path / "out", LIMIT), Intake())
    assert (request.question, request.answer) == ("12", "42")


@pytest.mark.parametrize(
    ("content", "wanted"),
    [("A?\n<image>", "<image>\nA?"), ("A? <image>\n", "<image>\nA?"), (" <image>\nA?", "<image>\nA?"),
     ("<image>\nA?", "<image>\nA?"), ("<image>A?", "<image>A?"), ("In <image>, a dog?", "In <image>, a dog?")],
)  # fmt: skip
@pytest.mark.parametrize("turn", [0, 2])
def test_a_row_s_only_image_stands_in_front_of_its_turn(content: str, wanted: str, turn: int, tmp_path: Path) -> None:
    """As sampling and evaluation ask, and as LLaVA's own training code puts it; inside the words it stays."""
    said = ["Hi.", "b", "Hi.", "c"]
    said[turn] = content
    talk = [("gpt" if i % 2 else "human", words) for i, words in enumerate(said)]
    row = _turns(*talk)(llava("talk", save_picture(tmp_path / "a.png", 1)))
    long = _turns(("human", content), ("gpt", "word " * 13))({**row, "id": "long", "kind": "direct"})
    records, _ = read_all(tmp_path, write_lines(tmp_path / "rows.jsonl", [row, long]))
    assert records[0].messages[turn].content == wanted
    assert records[1].messages[0].content == wanted


def test_several_images_stay_where_they_are(tmp_path: Path) -> None:
    row = {**_turns(("human", "A?\n<image>\n<image>"), ("gpt", "b"), ("human", "C?"), ("gpt", "d"))(llava("a", "")),
           "image": [save_picture(tmp_path / f"{i}.png", i) for i in range(2)]}  # fmt: skip
    records, _ = read_all(tmp_path, write_lines(tmp_path / "rows.jsonl", [row]))
    assert records[0].messages[0].content == "A?\n<image>\n<image>"


def test_a_file_s_address_is_its_path(own: DataConfig, tmp_path: Path) -> None:
    """Under the root alone; and the state of a data set follows that file."""
    home = Path(str(own.annotated)).parent
    rows = [llava("in", (home / "coffee.png").as_uri()), llava("out", (photographs() / "coffee.png").as_uri()),
            llava("far", "file://host/coffee.png")]  # fmt: skip
    file = write_lines(home / "addresses.jsonl", rows)
    records, intake = read_all(tmp_path, file)
    assert [record.id for record in records] == ["in"]
    assert ["outside" in bad.reason for bad in intake.rejected] == [True, False]
    config = replace(own, annotated=str(file))
    before = source_state(config)
    save_picture(home / "coffee.png", 1)
    assert source_state(config)["annotated"] != before["annotated"]


def test_suffixes_may_be_in_capitals(own: DataConfig, tmp_path: Path) -> None:
    home = Path(str(own.annotated)).parent
    file = write_lines(home / "MIX.JSONL", [llava("a", "coffee.png")])
    assert [record.id for record in read_all(tmp_path, file)[0]] == ["a"]
    (home / "shards").mkdir()
    write_shard(home / "shards" / "A.TAR", home, [qa("b", ("coffee.png",), "<image>\nWhat?", "cup")])
    assert [record.id for record in read_all(tmp_path, home / "shards")[0]] == ["b"]
    before = source_state(replace(own, annotated=str(home / "shards")))
    assert before == source_state(replace(own, annotated=str(home / "shards")))


def test_what_else_lies_in_a_folder_of_images_is_passed_over_and_counted(own: DataConfig, tmp_path: Path) -> None:
    pool = Path(str(own.unlabeled))
    before = source_state(own)
    for name in (".DS_Store", "._brick.png", "Thumbs.db", "labels.csv", "more/notes.TXT", ".cache/brick.png"):
        (pool / name).parent.mkdir(exist_ok=True)
        (pool / name).write_text("no picture")
    assert source_state(own) == before, "looking at a folder makes no other data set"
    Image.new("RGB", (8, 8)).save(pool / "scan.tif")
    shutil.copy(photographs() / "coins.png", pool / "nameless")
    shutil.copy(photographs() / "cell.png", pool / "CELL.PNG")
    build_dataset(replace(own, max_bad_share=0.5), tmp_path / "out")
    rejected = list(read_jsonl(tmp_path / "out" / "rejected.jsonl"))
    assert [row["id"] for row in rejected if row["problem"] == "image"] == ["scan.tif"], "a picture, and not decoded"
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["passed_over"] == {"hidden": 3, ".db": 1, ".csv": 1, ".txt": 1}
    assert summary["read"][str(pool)] == 7


def test_a_folder_without_a_picture_says_so(own: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "labels.csv").write_text("a,b")
    with pytest.raises(DataError, match="none of its 1 files is a picture; name a folder of images"):
        build_dataset(replace(own, unlabeled=str(tmp_path / "pool")), tmp_path / "out")


def test_llava_files_give_one_id_to_several_rows(tmp_path: Path) -> None:
    """As LLaVA-Instruct does, where the id is the image's: each row gets an id of its own and none is lost."""
    name = save_picture(tmp_path / "a.png", 1)
    rows = [llava("1", name, f"What is {word}?") for word in ("this", "that", "it")] + [llava("1#2", name, "Why?")]
    records, intake = read_all(tmp_path, write_lines(tmp_path / "rows.jsonl", rows))
    assert [record.id for record in records] == ["1", "1#2", "1#3", "1#2#2"]
    assert intake.renamed.total() == 3
    assert not intake.rejected


def test_malformed_and_undecodable_lines(tmp_path: Path) -> None:
    good = json.dumps(llava("a", save_picture(tmp_path / "a.png", 1))).encode()
    lines = [good, good[:-9], b'{"id": "\xff"}', b"", b"[" * 100_000, good.replace(b'"a"', b'"b"')]
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    records, intake = read_all(tmp_path, tmp_path / "rows.jsonl")
    assert [record.id for record in records] == ["a", "b"]
    assert [(bad.row, bad.problem) for bad in intake.rejected] == [(2, "json"), (3, "encoding"), (5, "json")]


def test_image_without_placeholder_says_where_to_write_it(tmp_path: Path) -> None:
    row = _turns(("human", "What?"), ("gpt", "cat"))(llava("a", save_picture(tmp_path / "a.png", 1)))
    _, intake = read_all(tmp_path, write_lines(tmp_path / "rows.jsonl", [row]))
    assert intake.rejected[0].fix.startswith("write <image>")


def test_defect_one_unreadable_image_does_not_kill_the_rest(own: DataConfig, tmp_path: Path) -> None:
    pool = Path(str(own.unlabeled))
    content = (pool / "brick.png").read_bytes()
    (pool / "brick.png").write_bytes(content[: len(content) // 2])
    (pool / "notes.txt").write_text("not an image")
    (pool / "escape.png").symlink_to(photographs() / "coffee.png")
    build_dataset(replace(own, max_bad_share=0.6), tmp_path / "out")
    assert len(every(tmp_path / "out")["unlabeled"]) == 3
    rejected = list(read_jsonl(tmp_path / "out" / "rejected.jsonl"))
    assert [row["id"] for row in rejected] == ["brick.png", "escape.png"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["rejected"] == {"rows": 2, "by_problem": {"image": 2}}
    assert summary["passed_over"] == {".txt": 1}


def test_defect_an_image_set_aside_never_shifts_the_others(own: DataConfig, tmp_path: Path) -> None:
    """Records name their picture by its pixels, so that nothing depends on positions in a list."""
    build_dataset(own, tmp_path / "whole")
    (Path(str(own.unlabeled)) / "brick.png").write_bytes(b"broken")
    build_dataset(replace(own, max_bad_share=0.5), tmp_path / "broken")
    whole = {record.id: record for record in every(tmp_path / "whole")["unlabeled"]}
    broken = every(tmp_path / "broken")["unlabeled"]
    assert len(broken) == len(whole) - 1
    assert all(whole[record.id] == record for record in broken)


def test_defect_an_api_error_object_is_no_caption(tmp_path: Path) -> None:
    reply = {"role": "assistant", "content": {"error": {"message": "rate limit"}}}
    name = save_picture(tmp_path / "a.png", 1)
    row = {"id": "a", "images": [name], "messages": [{"role": "user", "content": "<image>\nDescribe."}, reply]}
    records, intake = read_all(tmp_path, write_lines(tmp_path / "rows.jsonl", [row]))
    assert not records
    assert intake.rejected[0].problem == "keys"


def test_too_many_bad_rows_stop_the_run(own: DataConfig, tmp_path: Path) -> None:
    with Path(str(own.annotated)).open("a") as file:
        file.write("{broken\n" * 3)
    with pytest.raises(DataError, match=r"3 of 15 rows are unusable(.|\n)*rejected\.jsonl(.|\n)*row 13") as caught:
        build_dataset(own, tmp_path / "out")
    assert "max_bad_share=0.1" in str(caught.value)
    assert len(list(read_jsonl(tmp_path / "out" / "rejected.jsonl"))) == 3


def test_repeated_pictures_are_left_out_but_not_bad(own: DataConfig, tmp_path: Path) -> None:
    pool = Path(str(own.unlabeled))
    for i in range(5):
        shutil.copy(pool / "brick.png", pool / f"copy-{i}.png")
    build_dataset(own, tmp_path / "out")
    assert len(every(tmp_path / "out")["unlabeled"]) == 4
    assert len(list(read_jsonl(tmp_path / "out" / "rejected.jsonl"))) == 5


def test_a_broken_list_is_an_error_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"id": "a"}, {"id": }]')
    with pytest.raises(DataError, match=r"rows\.json: malformed JSON.*JSONL"):
        read_all(tmp_path, tmp_path / "rows.json")
    (tmp_path / "rows.json").write_text('[{"id": "a"}, ')
    with pytest.raises(DataError, match=r"rows\.json"):
        read_all(tmp_path, tmp_path / "rows.json")


# Formats and kinds.


@pytest.mark.parametrize("format", ["json", "jsonl", "parquet", "saved"])
def test_all_formats_give_the_same_records(tmp_path: Path, format: str) -> None:
    rows = [llava(f"r{i}", save_picture(tmp_path / f"{i}.png", i)) for i in range(3)]
    file = tmp_path / f"rows.{format}"
    if format == "json":
        file.write_text(json.dumps(rows, indent=2))
    elif format == "jsonl":
        write_lines(file, rows)
    else:
        import datasets

        table = datasets.Dataset.from_list(rows)
        table.to_parquet(file) if format == "parquet" else table.save_to_disk(file)
    records, intake = read_all(tmp_path, file)
    assert not intake.rejected
    assert [record.id for record in records] == ["r0", "r1", "r2"]
    words = "<image>\nWhat is it?\nAnswer with a word, phrase or option letter."
    assert records[0].messages == (Message("user", words), Message("assistant", "cat"))


def test_images_embedded_in_rows(tmp_path: Path) -> None:
    import datasets

    name = save_picture(tmp_path / "a.png", 1)
    rows = [{"id": "a", "messages": [{"role": "user", "content": "<image>\nA?"}, {"role": "assistant", "content": "b"}],
             "images": [{"bytes": (tmp_path / name).read_bytes(), "path": None}]}]  # fmt: skip
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    records, _ = read_all(tmp_path, tmp_path / "rows.parquet")
    assert (tmp_path / "out" / records[0].images[0]).read_bytes() == (tmp_path / name).read_bytes()


def test_content_parts_may_name_their_images(tmp_path: Path) -> None:
    parts = [{"type": "image", "image": save_picture(tmp_path / "a.png", 1)}, {"type": "text", "text": "A?"}]
    remote = [{"type": "image_url", "image_url": {"url": "https://example.org/x.png"}}, {"type": "text", "text": "A?"}]
    rows = [{"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "b"}]}
            for content in (parts, remote)]  # fmt: skip
    records, intake = read_all(tmp_path, write_lines(tmp_path / "rows.jsonl", rows))
    assert [record.id for record in records] == ["rows-000001"]
    assert "URL" in intake.rejected[0].reason


@pytest.mark.parametrize(
    ("asked", "answer", "explicit", "kind"),
    [("Describe.", prompts.structured("cod", ("a", "b", "c", "d", "e")), None, "cod"),
     ("Why?", prompts.structured("cot", ("a", "b", "c", "d")), None, "cot"),
     ("Describe.", "word " * 13, None, "dd"),
     (prompts.prompt("dd"), "a cat", None, "dd"),
     ("Why?", "word " * 13, None, "direct"),
     ("Why?", "so", None, "direct"),
     ("Why?", "so", "dd", "dd")],
)  # fmt: skip
def test_kinds_are_inferred(tmp_path: Path, asked: str, answer: str, explicit: str | None, kind: str) -> None:
    row = {**llava("a", save_picture(tmp_path / "a.png", 1), asked, answer), "kind": explicit}
    records, _ = read_all(tmp_path, write_lines(tmp_path / "rows.jsonl", [row]))
    assert records[0].kind == kind
    assert records[0].response == answer


def test_text_and_conversations_stay_as_written(tmp_path: Path) -> None:
    talk = [("human", "<image>\nA?"), ("gpt", "b"), ("human", "And?"), ("gpt", "c")]
    rows = [_turns(*talk)(llava("talk", save_picture(tmp_path / "a.png", 1))),
            _change(image=None)(_turns(("human", "Hi?"), ("gpt", "yo"))(llava("text", "")))]  # fmt: skip
    records, _ = read_all(tmp_path, write_lines(tmp_path / "rows.jsonl", rows))
    assert [m.content for m in records[0].messages] == ["<image>\nA?", "b", "And?", "c"]
    assert records[1].kind == "text"
    assert records[1].messages[0].content == "Hi?"


# Any damage at all.


@lru_cache(maxsize=1)
def _good_line() -> bytes:
    return json.dumps(llava("a", "a.png")).encode()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_mutated_line_is_a_record_or_rejected(tmp_path: Path, data: st.DataObject) -> None:
    save_picture(tmp_path / "a.png", 1)
    lines = []
    for _ in range(data.draw(st.integers(1, 4))):
        line = bytearray(_good_line())
        for position in data.draw(st.lists(st.integers(0, len(line) - 1), max_size=4)):
            line[position] = data.draw(st.integers(0, 255).filter(lambda byte: byte not in b"\n"))
        lines.append(bytes(line))
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    records, intake = read_all(tmp_path, tmp_path / "rows.jsonl")
    intake.write(tmp_path / "rejected.jsonl")
    assert len(records) + len(intake.rejected) == len([line for line in lines if line.strip()])


PART_KEYS = ["from", "value", "role", "content", "type", "text", "image", "url", "path"]
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(PART_KEYS), inner, max_size=3),
    max_leaves=8)  # fmt: skip
ROWS = st.dictionaries(
    st.sampled_from(["id", "image", "images", "conversations", "messages", "kind", "family", "question", "answer"]),
    JUNK, max_size=5)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROWS | JUNK, min_size=1, max_size=4))
def test_every_junk_row_is_used_or_rejected(tmp_path: Path, rows: list[Any]) -> None:
    file = write_lines(tmp_path / "rows.jsonl", rows)
    records, intake = read_all(tmp_path, file)
    assert len(records) + len(intake.rejected) == len(rows) == intake.read[str(file)]
    other = Intake()
    requests = list(read_unlabeled(file, tmp_path, ImageFolder(tmp_path / "out", LIMIT), other))
    assert len(requests) + len(other.rejected) == len(rows)
    other.write(tmp_path / "rejected.jsonl")
