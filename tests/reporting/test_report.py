"""The report: everything given appears, nothing given escapes or loads from elsewhere, every part may be missing."""

from __future__ import annotations

import dataclasses
import io
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sicog_exp.curation.curate import Group
from sicog_exp.curation.diversity import Diversity
from sicog_exp.prompts import structured
from sicog_exp.reporting import charts
from sicog_exp.reporting import report as r

FAMILIES = ("naming", "existence", "attribute", "counting", "comparison", "relation", "category")
VOID = {"meta", "img", "input", "br", "link", "hr"}
ATTACK = "<script>alert('x')</script>\"'><img src=x onerror=alert(1)>"


def picture(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (96, 96), tuple(int(v) for v in rng.integers(180, 255, 3)))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y = (int(v) for v in rng.integers(4, 66, 2))
        draw.ellipse((x, y, x + 24, y + 24), fill=tuple(int(v) for v in rng.integers(0, 200, 3)))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def task(generation: int, name: str, answer_format: str, base: float, gain: float) -> r.TaskScore:
    mean, half = base + gain * generation, 0.019
    priors = (0.18, 0.5, 0.17, 0.38, 0.36, 0.27, 0.31)
    families = []
    for i, (family, prior) in enumerate(zip(FAMILIES, priors)):
        level = min(0.97, prior + 0.06 + (mean - 0.35) * (0.35 + 0.22 * i))
        families.append(r.FamilyScore(family, level, level - 0.05, min(1.0, level + 0.05), 290, prior))
    shown = tuple(families) if name == "world" else ()
    return r.TaskScore(name, answer_format, mean, mean - half, mean + half, 2000, shown)


def delta(before: str, after: str, name: str, answer_format: str, difference: float, **more) -> r.Delta:
    half = 0.022
    return r.Delta(before, after, name, answer_format, difference, difference - half, difference + half, 2000,
                   more.pop("mcnemar_p", 1e-6), more.pop("holm_p", 8e-6), **more)  # fmt: skip


def curation(iteration: int) -> r.Curation:
    rng = np.random.default_rng(iteration)
    similar = np.clip(rng.beta(6, 1.6 - 0.2 * iteration, 1200), 0, 1)
    captions = tuple(r.BestScore(float(s), float(np.clip(rng.normal(0.2 + 0.6 * s, 0.12), 0, 1))) for s in similar)
    agreed = rng.choice([1 / 3, 2 / 3, 1.0], 4700, p=[0.12, 0.36, 0.52])
    answers = tuple(r.BestScore(float(s), float(rng.random() < 0.15 + 0.6 * s)) for s in agreed)
    return r.Curation(
        iteration, "lexical", True,
        (r.CurationGroup("captions", 0.85, 540, captions, 0.52, "facts right"),
         r.CurationGroup("reasoning", 0.85, 2300, answers, 0.51)),
        (("broken format", 214), ("cut at the limit", 35), ("below the threshold", 2870), ("near duplicate", 12)),
        (("near-duplicate limit", "0.95"),),
    )  # fmt: skip


def cost() -> r.Cost:
    stages = (("develop", 41.0), ("generate", 58.0), ("curate", 6.5), ("pretrain", 66.0), ("instruct", 22.0))
    rows = [r.CostRow(0, "evaluate", 17.5, 2000, 160_000, 2.1e11, 1340.0, cached=True)]
    for g in (1, 2):
        for i, (stage, seconds) in enumerate((*stages, ("evaluate", 18.2))):
            flops = None if stage == "curate" else 3.1e12 * seconds
            rows.append(
                r.CostRow(g, stage, seconds * (1 + 0.1 * g), 1200 * (i + 1), 48_000 * (i + 2), flops, 1500.0 + 90 * i)
            )
    return r.Cost(tuple(rows), 0.073, "2 CPU cores")


def gallery() -> tuple[r.Sample, ...]:
    samples = []
    for i in range(12):
        answer = ("apple", "red", "3", "left")[i % 4]
        cot = structured("cot", ("find furthest left", "red apple top left, green car middle, blue ball bottom right",
                                 f"top left {answer}", answer))  # fmt: skip
        cod = structured(
            "cod",
            (
                "apple, car, ball",
                "red apple, green car, blue ball",
                "apple above car",
                "white background",
                "red apple top left, green car middle, blue ball bottom right.",
            ),
        )
        question = ("Which thing is furthest left?", "What color is the fruit?", "How many animals are there?",
                    "Where is the apple relative to the car?")[i % 4]  # fmt: skip
        if i % 3 == 0:
            candidates = (
                r.SampleCandidate("cod", cod, 0.91, "stop", True),
                r.SampleCandidate("cod", cod[:150], None, "length"),
                r.SampleCandidate("dd", "red apple top left, green car middle.", 0.88, "stop"),
            )
            samples.append(r.Sample(f"unlabeled-{i:05d}", i % 2, "captions", i % 4 != 0, candidates, png=picture(i)))
            continue
        candidates = (r.SampleCandidate("cot", cot, 0.67, "stop", True, True),
                      r.SampleCandidate("cot", cot.replace(answer, "green"), 0.33, "stop", False, False),
                      r.SampleCandidate("direct", answer, 0.67, "stop", False, True))  # fmt: skip
        samples.append(
            r.Sample(f"unlabeled-{i:05d}-q1", i % 2, "reasoning", i % 4 != 0, candidates, question, answer, picture(i))
        )
    return tuple(samples)


def variety(left: float) -> dict[Group, Diversity]:
    captions = Diversity(540, 30.5, 140, 0.3 * left, 0.6 * left, None, 0.21, None, 0.99, 0.01)
    return {"caption": captions, "reasoning": Diversity(9, 28.0, 90, None, None, 2.5 * left, 0.3, None, 0.97, 0.0)}


def questions() -> tuple[r.Question, ...]:
    outcomes = ((False, False, True), (True, False, False), (True, True, True), (False, True, False))
    return tuple(
        r.Question(f"benchmark-{i:03d}", "world", ("direct", "cot")[i % 2], FAMILIES[i % 3], f"What is {i}?", "red",
                   tuple(r.Answer(g, "red" if right else "", right) for g, right in enumerate(rights)), picture(i))
        for i, rights in enumerate(outcomes * 2)
    )  # fmt: skip


def lineage() -> tuple[r.Node, ...]:
    nodes = [r.Node(0, "data", "d0"), r.Node(0, "base", "b0"), r.Node(0, "instruct", "i0", ("b0", "d0"))]
    for g in (1, 2):
        before = "i0" if g == 1 else "p1"
        nodes += [r.Node(g, "generate", f"g{g}", (before, "d0")), r.Node(g, "curate", f"c{g}", (f"g{g}", "g1")),
                  r.Node(g, "pretrain", f"p{g}", (f"c{g}", "b0", "d0"))]  # fmt: skip
    return tuple(nodes)


def demo() -> r.ReportData:
    formats = (("direct", 0.41, 0.06), ("cot", 0.38, 0.075))
    easy = (("direct", 0.36, 0.006), ("cot", 0.33, -0.017))
    tasks = [
        [task(g, n, *of) for n, group in (("world", formats), ("easyvqa", easy)) for of in group] for g in range(3)
    ]
    deltas = [
        delta(f"G{a}", f"G{b}", "world", f, gain * (b - a))
        for a, b in ((0, 1), (1, 2), (0, 2))
        for f, _, gain in formats
    ]
    deltas += [delta("G0", "G2", "easyvqa", "direct", 0.012, mcnemar_p=0.21, holm_p=0.42),
               delta("G0", "G2", "easyvqa", "cot", -0.034, mcnemar_p=0.002, holm_p=0.006),
               delta("annotated only", "curated", "world", "cot", 0.103, seeds=3, spread=0.011),
               delta("random candidate", "curated", "world", "cot", 0.004, mcnemar_p=None, holm_p=None)]  # fmt: skip
    return r.ReportData(
        "embedded",
        "name: embedded\nseed: 0\niterations: 2\ncuration:\n  encoder: lexical\n",
        "2026-01-31 12:00 UTC",
        tuple(r.GenerationScores(g, tuple(found)) for g, found in enumerate(tasks)),
        "5f2c9a7e1b",
        "sqlite:///mlflow.db",
        "sicog iterate experiments/embedded.yaml seed=0",
        {"torch": "2.13.0", "transformers": "5.20.0"},
        tuple(deltas),
        (curation(0), curation(1)),
        (variety(1.0), variety(0.6)),
        cost(),
        gallery(),
        questions(),
        lineage(),
        (
            "Curated data beat a random candidate by no more than noise on world (cot).",
            "One seed: seed noise is not in the intervals.",
        ),
    )


class Outline(HTMLParser):
    """Checks that tags nest, and collects what the tests ask about."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another tag, at {self.getpos()}"

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_the_page_is_well_formed_and_accessible():
    parser = outline(r.render(demo()))
    names = [tag for tag, _ in parser.tags]
    assert names.count("h1") == 1
    assert {"main", "header", "nav", "section", "figure", "table", "details"} <= set(names)
    assert all(attrs.get("alt") for tag, attrs in parser.tags if tag == "img")
    assert all(attrs.get("aria-label") and attrs["role"] == "img" for tag, attrs in parser.tags if tag == "svg")
    assert all(attrs.get("scope") for tag, attrs in parser.tags if tag == "th")
    ids = [attrs["id"] for _, attrs in parser.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_charts_are_well_formed_xml_inside_their_frame():
    page = r.render(demo())
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == 2 + 2 + 2 + 2 * 6 + 1 + 2 + 1
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        width, height = map(float, root.attrib["viewBox"].split()[2:])
        for element in root.iter():
            for name, limit in (
                ("x", width),
                ("x1", width),
                ("x2", width),
                ("cx", width),
                ("y", height),
                ("cy", height),
            ):
                assert -1 <= float(element.attrib.get(name, 0)) <= limit + 1
        assert "nan" not in drawing


def test_nothing_is_loaded_from_elsewhere():
    page = r.render(demo())
    parser = outline(page)
    for tag, attrs in parser.tags:
        assert tag not in {"script", "link", "iframe", "object", "base", "form"}
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert (attrs.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    assert not re.search(r"@import|url\(", page)
    assert "default-src 'none'" in page


def test_numbers_and_words_appear():
    words = " ".join(outline(r.render(demo())).words)
    for expected in (
        "G2 answers 12.0 points [9.8, 14.2] more questions right than G0 (direct).",
        "+15.0",
        "41.0%",
        "53.0%",
        "\N{MINUS SIGN}3.4",
        "<0.001",
        "0.420",
        "7.3%",
        "broken format 214",
        "0.67",
        "2.13.0",
        "sicog iterate experiments/embedded.yaml",
        "3 (1.1)",
        "blind prior",
        "One seed",
    ):
        assert expected in words, expected


def test_verdict_follows_the_intervals():
    data = demo()

    def said(difference: float) -> str:
        return r.verdict(dataclasses.replace(data, deltas=(delta("G0", "G2", "world", "direct", difference),)))[0]

    assert said(0.1) == "G2 answers 10.0 points [7.8, 12.2] more questions right than G0 (direct)."
    assert said(-0.1) == "G2 answers 10.0 points [7.8, 12.2] fewer questions right than G0 (direct)."
    assert said(0.01) == ("No clear difference between G2 and G0 (direct): +1.0 points, "
                          "and the interval [\N{MINUS SIGN}1.2, 3.2] includes zero.")  # fmt: skip
    assert "No paired comparison of G2 with G0" in r.verdict(dataclasses.replace(data, deltas=()))[0]
    assert "nothing to compare" in r.verdict(dataclasses.replace(data, generations=data.generations[:1]))[0]


def hostile() -> r.ReportData:
    """The demo with an attack in every text."""

    def poisoned(value):
        if isinstance(value, str):
            return ATTACK + value
        if dataclasses.is_dataclass(value):
            return type(value)(**{f.name: poisoned(getattr(value, f.name)) for f in dataclasses.fields(value)})
        if isinstance(value, tuple):
            return tuple(poisoned(item) for item in value)
        if isinstance(value, dict):
            return {poisoned(k): poisoned(v) for k, v in value.items()}
        return value

    return poisoned(demo())


def test_every_text_is_escaped():
    page = r.render(hostile())
    parser = outline(page)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert all(not name.startswith("on") for _, attrs in parser.tags for name in attrs)
    assert all((attrs["src"] or "").startswith("data:") for tag, attrs in parser.tags if tag == "img")


@pytest.mark.parametrize("missing", ["generations", "deltas", "curation", "gallery", "notes", "cost", "libraries"])
def test_any_part_may_be_missing(missing):
    empty = {"cost": None, "libraries": {}}.get(missing, ())
    outline(r.render(dataclasses.replace(demo(), **{missing: empty})))


def test_the_smallest_report_renders():
    words = " ".join(outline(r.render(r.ReportData("x", "name: x\n", "today", ()))).words)
    assert "nothing to compare yet" in words


def test_one_generation_and_unknown_truth():
    data = demo()
    group = r.CurationGroup("captions", 0.9, 1, (r.BestScore(0.4), r.BestScore(0.95)))
    bare = r.Sample("a", 0, "captions", True, (r.SampleCandidate("other", "text", None, "length"),))
    data = dataclasses.replace(
        data, generations=data.generations[:1], deltas=(), gallery=(bare,),
        curation=(r.Curation(0, "minilm", False, (group, r.CurationGroup("reasoning", 0.9, 0, ()))),),
        cost=r.Cost((r.CostRow(0, "evaluate", 0.0),)),
    )  # fmt: skip
    page = r.render(data)
    outline(page)
    assert "track quality" not in page


def test_generations_may_lack_a_task_or_a_family():
    data = demo()
    first = r.GenerationScores(0, data.generations[0].tasks[:1])
    fewer = dataclasses.replace(data.generations[1].tasks[0], families=data.generations[1].tasks[0].families[:2])
    second = r.GenerationScores(1, (fewer, data.generations[1].tasks[3]))
    outline(r.render(dataclasses.replace(data, generations=(first, second, data.generations[2]))))


def test_similarities_below_zero_stay_in_the_picture():
    group = r.CurationGroup("captions", -0.5, 2, (r.BestScore(-0.25, 0.0), r.BestScore(1.0, 1.0)))
    data = dataclasses.replace(demo(), curation=(r.Curation(0, "minilm", False, (group,)),))
    for drawing in re.findall(r"<svg.*?</svg>", r.render(data), re.DOTALL):
        assert all(float(x) >= 0 for x in re.findall(r' x="([-\d.]+)"', drawing))


def test_the_file_is_bounded_and_says_what_it_left_out(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (500, 500, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    big = tuple(
        dataclasses.replace(gallery()[1], id=f"s{i}", png=buffer.getvalue(),
                            candidates=(r.SampleCandidate("dd", "word " * 50_000, 0.5, "length"),))
        for i in range(40)
    )  # fmt: skip
    asked = tuple(dataclasses.replace(questions()[0], id=f"q{i}", png=buffer.getvalue()) for i in range(40))
    path = tmp_path / "report.html"
    r.write_report(dataclasses.replace(demo(), gallery=big, questions=asked), path)
    assert path.stat().st_size < 10_000_000
    assert re.search(r"\d+ more samples are not shown", path.read_text())
    assert re.search(r"\d+ more questions are not shown", path.read_text())


def test_a_lone_surrogate_does_not_stop_the_report(tmp_path):
    r.write_report(dataclasses.replace(demo(), notes=("broken \ud800 text",)), tmp_path / "report.html")
    assert "broken ? text" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_equal_data_give_equal_bytes(tmp_path):
    r.write_report(demo(), tmp_path / "a.html")
    r.write_report(demo(), tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert (tmp_path / "a.html").stat().st_size < 500_000


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0), (-0.3, 1), (0, 100), (41.2, 58.9), (0, 3e6), (0, 1e-3)])
def test_ticks_are_few_round_and_inside(low, high):
    ticks = charts.Scale(low, high, 0, 100).ticks()
    assert len(ticks) <= 6
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    assert len(ticks) >= 2 or low == high


def test_small_words():
    assert [charts.signed(v) for v in (1.26, -1.26, 0.01, -0.01)] == ["+1.3", "\N{MINUS SIGN}1.3", "0.0", "0.0"]
    assert [charts.duration(s) for s in (3.21, 65, 7260)] == ["3.2 s", "1 min 05 s", "2 h 01 min"]
    assert [r.si(v) for v in (None, 950, 1_234_567, 2.5e13)] == ["\N{EN DASH}", "950", "1.2 M", "25.0 T"]
    assert [r.p_value(p) for p in (None, 0.0004, 0.0421)] == ["\N{EN DASH}", "<0.001", "0.042"]


def test_a_report_is_drawn_again_from_its_json() -> None:
    data = demo()
    again = r.from_json(r.to_json(data))
    assert again == data
    assert r.render(again) == r.render(data)


def test_a_gallery_filters_by_what_tells_its_items_apart() -> None:
    given = ("Change", ["lost", "gained", "lost"]), ("Task", ["world"] * 3), ("Family", ["a", "", "b"])
    made = r.facets("question", *given)
    assert [(f.name, f.values, f.of) for f in made] == [
        ("question-change", ("gained", "lost"), (1, 0, 1)), ("question-family", ("a", "b"), (0, None, 1))]  # fmt: skip
    page = r.render(demo())
    assert ".gallery:has(#question-change-0:checked) article:not(.question-change-0)" in page
    assert [q.change for q in questions()[:4]] == ["gained", "lost", "right", "wrong"]


def test_the_lineage_graph_links_what_was_read_except_the_data() -> None:
    drawing = ElementTree.fromstring(charts.lineage(lineage(), "Lineage"))
    read = [node for node in lineage() for source in node.inputs if source != "d0"]
    lines = [part for part in drawing if part.tag in ("line", "path")]
    assert len(lines) == len(read)
    assert sum(part.tag == "rect" for part in drawing) == len(lineage())
