"""`sicog data check` says what a run would do with the same rows, and says it for every row."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families import build
from formats import BAD, BAD_ROWS, FORMATS, GOOD, ROWS, Plain, qa, save_images
from PIL import Image

from sicog_exp.cli import build_parser, main
from sicog_exp.completion import subcommands
from sicog_exp.data.chat import ChatEncoder, ChatError
from sicog_exp.data.check import Drawing, Findings, ImageLengths, Options, check, histogram, quantiles
from sicog_exp.data.formats import DataError, default_root
from sicog_exp.data.images import ImageFolder, ImageHeaders, open_image
from sicog_exp.data.mixture import ImageTensors, RecordSource
from sicog_exp.data.preview import marked, summary, write_page
from sicog_exp.data.readers import Intake, read_annotated
from sicog_exp.models.loading import EMBEDDED_BASE, ModelSource, load_processor
from sicog_exp.recipe import DataConfig

LIMIT = 10**6


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(load_processor(ModelSource(str(EMBEDDED_BASE))))


def looked_at(tmp_path: Path, rows: tuple[Plain, ...] | list[Plain], format: str = "LLaVA JSONL",
              **options: Any) -> Findings:  # fmt: skip
    save_images(tmp_path)
    return check(FORMATS[format](tmp_path, rows), Options(**options))


@pytest.mark.parametrize("format", FORMATS)
def test_counts_add_up_in_every_format(format: str, tmp_path: Path) -> None:
    found = looked_at(tmp_path, ROWS, format)
    assert (found.read, found.usable, found.bad) == (len(ROWS), len(GOOD), len(BAD))
    assert found.kinds.total() == found.turns.total() == len(found.lengths.of) == len(GOOD)
    assert found.kinds == {"direct": 4, "text": 1}
    assert found.turns == {1: 4, 2: 1}
    assert found.too_many_bad
    assert [len(shown.pictures) for shown in found.shown if shown.record.images]
    assert not any(shown.problem for shown in found.shown)


def test_lengths_are_those_of_training(tmp_path: Path, encoder: ChatEncoder) -> None:
    """Counted from image sizes alone, they equal what the encoder makes of the decoded pictures."""
    found = looked_at(tmp_path, GOOD, every=True)
    source, intake = tmp_path / "rows.jsonl", Intake()
    records = list(read_annotated(source, default_root(source), ImageFolder(tmp_path / "out", LIMIT), intake))
    wanted = []
    for record in records:
        pictures = [open_image(tmp_path / "out", name, LIMIT) for name in record.images]
        wanted.append(encoder.example(record.messages, encoder.pixels(pictures) if pictures else None, 10**6))
    assert found.lengths.of == [len(example) for example in wanted]
    assert found.lengths.responses == [sum(label >= 0 for label in example.labels) for example in wanted]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2.5-VL in everything but size."""
    return build("qwen2_5_vl", tmp_path_factory.mktemp("models") / "qwen").folder


@pytest.mark.parametrize("every", [False, True])
def test_a_picture_that_the_model_s_processor_refuses_is_set_aside_as_in_training(
    every: bool, tmp_path: Path, qwen: Path
) -> None:
    Image.new("RGB", (2500, 10)).save(tmp_path / "ribbon.png")
    rows = [*GOOD, qa("ribbon", ("a.png", "ribbon.png"), "<image><image>\nSame?", "no")]
    found = looked_at(tmp_path, rows, model=str(qwen), every=every)
    assert (found.read, found.usable, found.bad) == (len(rows), len(GOOD), 0)
    assert not found.too_many_bad, "the data step reads it, so no run stops there"
    [aside] = found.intake.rejected
    assert (aside.id, aside.row, aside.problem) == ("ribbon", len(rows), "model")
    assert aside.reason.startswith("image 'ribbon.png', 2500 x 10 pixels: Qwen2_5_VLProcessor refuses it (absolute")
    assert aside.fix.startswith("crop the picture")
    encoder = ChatEncoder(load_processor(ModelSource(str(qwen))))
    record = next(read_annotated(tmp_path / "rows.jsonl", tmp_path, ImageHeaders(LIMIT), Intake()))
    record = replace(record, images=("ribbon.png",))
    reasons: list[str] = []
    trained = RecordSource("x", [record], ImageTensors(tmp_path, encoder, LIMIT), encoder, LIMIT,
                           lambda _, id, reason: reasons.append(reason))  # fmt: skip
    with pytest.raises(ChatError):
        trained.row(0)
    assert reasons == [aside.reason.partition(": ")[2] + "; " + aside.fix]


def test_pictures_that_the_model_s_processor_refuses_are_no_requests(tmp_path: Path, qwen: Path) -> None:
    (tmp_path / "pool").mkdir()
    Image.new("RGB", (10, 2500)).save(tmp_path / "pool" / "ribbon.png")
    found = check(tmp_path / "pool", Options(unlabeled=True, model=str(qwen)))
    assert [(row.row, row.problem) for row in found.intake.rejected] == [(1, "model")]
    assert found.too_many_bad, "nothing is left"


@pytest.mark.parametrize("every", [False, True])
def test_rows_over_the_limit_are_those_that_training_cuts_or_sets_aside(
    every: bool, tmp_path: Path, encoder: ChatEncoder
) -> None:
    rng = random.Random(0)
    words = ["cat", "tree", "Straßenbahn", "猫", "a", "\n", "12", "x" * 30]
    rows = [qa(str(i), ("a.png",), "<image>\n" + " ".join(rng.choices(words, k=rng.randrange(1, 40))) + "?",
               " ".join(rng.choices(words, k=rng.randrange(1, 60))) + " end") for i in range(150)]  # fmt: skip
    found = looked_at(tmp_path, rows, max_length=100, every=every)
    source = tmp_path / "rows.jsonl"
    folder = ImageFolder(tmp_path / "out", LIMIT)
    records = list(read_annotated(source, tmp_path, folder, Intake()))
    images = ImageTensors(tmp_path / "out", encoder, LIMIT)
    aside: set[str] = set()
    trained = RecordSource("annotated", records, images, encoder, 100, lambda _, id, reason: aside.add(id))
    whole = RecordSource("annotated", records, images, encoder, 10**6, lambda *_: pytest.fail("nothing is too long"))
    over = {record.id for i, record in enumerate(records) if len(whole.row(i).example) > 100}
    for i in range(len(records)):
        with suppress(ChatError):
            trained.row(i)
    assert set(found.lengths.too_long) == aside
    assert set(found.lengths.cut) == over - aside
    assert len(over) > 10
    assert aside


def test_a_check_tells_how_far_it_is_over_bad_rows_and_pictures_too(tmp_path: Path) -> None:
    save_images(tmp_path)
    told: list[tuple[int, float | None]] = []
    check(FORMATS["Parquet"](tmp_path, ROWS), Options(), lambda reading: told.append((reading.rows, reading.share)))
    assert told == [(i, i / len(ROWS)) for i in range(1, len(ROWS) + 1)]
    told.clear()
    (tmp_path / "pool").mkdir()
    save_images(tmp_path / "pool")
    options = Options(unlabeled=True)
    check(tmp_path / "pool", options, lambda reading: told.append((reading.rows, reading.share)))
    assert told == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]


def test_requests_are_read_without_responses(tmp_path: Path) -> None:
    found = looked_at(tmp_path, [qa("1", ("a.png",), "<image>\nWhat?"), qa("2", ("b.png",), "<image>")], unlabeled=True)
    assert (found.usable, found.bad, dict(found.kinds)) == (2, 0, {"cot": 1, "cod": 1})
    assert not any(piece.trained for shown in found.shown for piece in shown.pieces)
    folder = tmp_path / "folder"
    folder.mkdir()
    save_images(folder)
    pictures = check(folder, Options(unlabeled=True))
    assert (pictures.read, pictures.usable, pictures.bad, pictures.images) == (4, 3, 1, 3)
    (folder / "labels.csv").touch()
    (folder / ".DS_Store").touch()
    said = "\n".join(summary(check(folder, Options(unlabeled=True))))
    assert "4 rows read" in said
    assert "left out  2 files that are no pictures: hidden 1, .csv 1" in said


def test_pixels_are_decoded_where_asked(tmp_path: Path) -> None:
    """A picture cut behind its header: the header does not show it, the drawn row and --images all do."""
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) * 4 // 5])
    rows = [qa("cut", ("cut.png",), "<image>\nWhat?", "cat")]
    quick = looked_at(tmp_path, rows)
    assert (quick.usable, quick.bad) == (1, 0)
    assert "damaged" in quick.shown[0].problem
    assert looked_at(tmp_path, rows, decode=True).bad == 1


def test_a_picture_lying_on_its_side_has_its_upright_size(tmp_path: Path) -> None:
    for orientation in range(1, 9):
        image = Image.new("RGB", (8, 4))
        exif = image.getexif()
        exif[0x0112] = orientation
        for name in (f"{orientation}.jpg", f"{orientation}.png", f"{orientation}.webp"):
            image.save(tmp_path / name, exif=exif)
            sizes = []
            for decode in (False, True):
                headers = ImageHeaders(LIMIT, decode)
                headers.add(tmp_path, name)
                sizes.append(headers.sizes[name])
            assert sizes[0] == sizes[1], name


class BySize:
    """An encoder whose image tokens depend on the size, as with tiles."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def image_length(self, image: Any) -> int:
        self.asked.append(image.size)
        return 9 * -(-image.width // 336) * -(-image.height // 336)


def test_image_tokens_by_size_are_asked_once_a_size() -> None:
    tiles = BySize()
    lengths = ImageLengths(tiles)  # type: ignore[arg-type]
    assert [lengths.of(size) for size in ((700, 300), (10, 10), (700, 300), (10, 10))] == [27, 9, 27, 9]
    assert tiles.asked.count((700, 300)) == 1


def test_a_drawing_is_uniform_and_the_same_each_time() -> None:
    def drawn(size: int, stream: int) -> list[int]:
        drawing: Drawing[int] = Drawing(size)
        for item in range(stream):
            if drawing.wants_next():
                drawing.put(item)
        return drawing.items

    assert drawn(5, 3) == [0, 1, 2]
    assert sorted(drawn(5, 5)) == [0, 1, 2, 3, 4]
    many = drawn(2000, 50_000)
    assert many == drawn(2000, 50_000)
    assert len(set(many)) == 2000
    quarters = [sum(low <= item < low + 12_500 for item in many) for low in range(0, 50_000, 12_500)]
    assert all(400 < quarter < 600 for quarter in quarters), quarters


def test_quantiles_and_ranges_hold_every_row() -> None:
    counts = [5, 1, 9, 7, 3]
    assert quantiles(counts, [0, 0.5, 1]) == [1, 5, 9]
    for counts in ([7], [1, 1, 2], list(range(100)), [3, 1000]):
        ranges = histogram(counts)
        assert sum(rows for _, _, rows in ranges) == len(counts)
        assert len(ranges) <= 10
        assert (ranges[0][0], ranges[-1][1] >= max(counts)) == (min(counts), True)


def test_the_mask_shows_what_carries_loss(tmp_path: Path) -> None:
    found = looked_at(tmp_path, GOOD)
    talk = next(shown for shown in found.shown if shown.record.id == "text")
    assert "[[hello" in marked(talk)
    assert "Say hello." in marked(talk).partition("[[")[0]
    assert any("[9 image tokens]" in piece.text for shown in found.shown for piece in shown.pieces)


def test_the_page_escapes_what_data_say(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> \"'&"
    found = looked_at(tmp_path, [qa(evil, ("a.png",), f"<image>\n{evil}?", evil), *BAD_ROWS])
    write_page(found, tmp_path / "new" / "page.html")
    page = (tmp_path / "new" / "page.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert page.count("data:image/png;base64,") == sum(len(shown.pictures) for shown in found.shown) > 0
    assert "src=\"http" not in page
    assert any(line.startswith("set aside, image: 3") for line in summary(found))


# The command.


def test_the_command_ends_with_1_where_too_many_rows_are_bad(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_images(tmp_path)
    source = FORMATS["chat JSONL"](tmp_path, ROWS)
    assert main(["data", "check", str(source)]) == 1
    printed = capsys.readouterr().out
    assert "12 rows read" in printed
    assert "row 1 (missing): image 'none.png': not found" in printed
    listed = [json.loads(line) for line in Path("data-check.rejected.jsonl").read_text().splitlines()]
    assert len(listed) == len(BAD)
    assert main(["data", "check", str(source), "data.max_bad_share=0.9", "--out", "other.html"]) == 0
    assert Path("other.html").is_file()
    source.write_text("")
    assert main(["data", "check", str(source)]) == 2
    assert f"{source}: holds no rows or images; name a file" in capsys.readouterr().err


def test_mistakes_at_the_command_are_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, said in (("nowhere.jsonl", "nowhere.jsonl: no such file"),
                          (f"{tmp_path}/empty", "a folder with neither"),
                          (f"{tmp_path}/x.jsonl --root /nowhere", "/nowhere: no such folder"),
                          (f"{tmp_path}/x.jsonl --model {tmp_path}", "cannot load its processor"),
                          (f"{tmp_path}/x.jsonl data.max_bad_share=3", "max_bad_share"),
                          (f"{tmp_path}/{{a,b}}.tar", "no such file")):  # fmt: skip
        (tmp_path / "x.jsonl").write_text("{}\n")
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert main(["data", "check", *command.split(), "--out", str(tmp_path / "p.html")]) == 2, command
        assert said in capsys.readouterr().err, command


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_images(tmp_path)
    FORMATS["WebDataset shards"](tmp_path, GOOD)
    with pytest.raises(DataError, match=r"1 of its 4 shards are missing, such as .*part-003\.tar"):
        check(tmp_path / "part-{000..003}.tar", Options())


def test_the_root_is_where_names_are_looked_up(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    save_images(tmp_path / "pictures")
    source = FORMATS["LLaVA JSONL"](tmp_path, GOOD[:1])
    assert check(source, Options()).bad == 1
    assert check(source, Options(DataConfig(root=str(tmp_path / "pictures")))).usable == 1


def test_every_argument_is_described() -> None:
    command = subcommands(subcommands(build_parser())["data"])["check"]
    assert command.description
    for action in command._actions:
        assert action.help, action.dest
        assert not action.help.endswith("."), action.help
