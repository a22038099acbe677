"""Small data sets in the schemas that the stock tasks of the paper's suite read, and the answers that are right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

MMSTAR_README = """---
configs:
- config_name: val
  data_files:
  - split: val
    path: "mmstar.parquet"
---
# MMStar
"""


@dataclass(frozen=True)
class Stock:
    """A stock task's documents, each with its right answer, and where the hub keeps them."""

    files: tuple[str, ...]
    rows: tuple[tuple[dict[str, Any], str], ...]
    readme: str = ""

    @property
    def answers(self) -> list[str]:
        return [answer for _, answer in self.rows]


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (12, 10), (20 * number % 256, 7 * number % 256, 90))


def mmbench() -> Iterator[tuple[dict[str, Any], str]]:
    """Two questions in two circular variants each: the right option moves, all must be right."""
    for index, answer in ((1, "A"), (2, "B"), (1_000_001, "B"), (1_000_002, "A")):
        options = {"A": "a cat", "B": "a dog"} if index < 1_000_000 else {"A": "a dog", "B": "a cat"}
        yield {"index": index, "question": f"Which animal is in picture {index}?", "hint": "nan", "answer": answer,
               **options, "C": "nan", "D": "nan", "category": "object_recognition", "image": picture(index % 1_000_000),
               "source": "made", "L2-category": "perception", "comment": "nan", "split": "dev"}, answer  # fmt: skip


def mme() -> Iterator[tuple[dict[str, Any], str]]:
    """Pairs of questions about a picture, perception and cognition."""
    names = (("existence", 1), ("count", 2), ("code_reasoning", 3))
    for category, number in names:
        for answer in ("Yes", "No"):
            question = f"Is this picture {number} if {answer}? Please answer yes or no."
            yield {"question_id": f"{category}/{number}.png", "image": picture(number), "question": question,
                   "answer": answer, "category": category}, answer.lower()  # fmt: skip


def pope() -> Iterator[tuple[dict[str, Any], str]]:
    for i, answer in enumerate(("yes", "no", "no", "yes")):
        yield {"id": str(i), "question_id": str(i + 1), "question": f"Is there a dog {i} in the image?",
               "answer": answer, "image_source": f"COCO_{i // 2}", "image": picture(i // 2),
               "category": ("random", "adversarial")[i % 2]}, answer  # fmt: skip


def mmstar() -> Iterator[tuple[dict[str, Any], str]]:
    for i, (category, answer) in enumerate((("math", "A"), ("math", "C"), ("logical reasoning", "D"))):
        yield {"index": i, "question": f"What is {i}?\nOptions: A: 1, B: 2, C: 3, D: 4", "image": picture(i),
               "answer": answer, "category": category, "l2_category": f"{category} {i}",
               "meta_info": {"source": "made"}}, answer  # fmt: skip


def realworldqa() -> Iterator[tuple[dict[str, Any], str]]:
    for i, answer in enumerate(("A", "Downhill", "3")):
        yield {"image": picture(i), "question": f"Question {i}?", "answer": answer}, answer


def ocrbench() -> Iterator[tuple[dict[str, Any], str]]:
    kinds = (("IIIT5K", "Regular Text Recognition"), ("docVQA", "Doc-oriented VQA"), ("HME100k",
             "Handwritten Mathematical Expression Recognition"))  # fmt: skip
    for i, (dataset, kind) in enumerate(kinds):
        yield {"dataset": dataset, "question": f"What is written in image {i}?", "question_type": kind,
               "answer": [f"word {i}"], "image": picture(i)}, f"It is {'Word' if i < 2 else 'word'} {i}."  # fmt: skip


def docvqa() -> Iterator[tuple[dict[str, Any], str]]:
    for i in range(3):
        yield {"questionId": str(i), "question": f"What is the date {i}?", "question_types": ["form"],
               "image": picture(0), "docId": 7, "answers": [f"January 1{i}", f"Jan. 1{i}"],
               "data_split": "val"}, f"january 1{i}"  # fmt: skip


def chartqa() -> Iterator[tuple[dict[str, Any], str]]:
    for i, (kind, truth, said) in enumerate((("human_test", "20", "20.5"), ("augmented_test", "Spain", "spain"))):
        yield {"type": kind, "question": f"Which value {i}?", "answer": truth, "image": picture(i)}, said


def scienceqa() -> Iterator[tuple[dict[str, Any], str]]:
    for i in range(3):
        yield {"image": picture(i), "question": f"Which rock {i}?", "choices": ["granite", "slate", "marble"],
               "answer": i, "hint": "A rock." if i else "", "subject": "natural science"}, "ABC"[i]  # fmt: skip


def ai2d() -> Iterator[tuple[dict[str, Any], str]]:
    for i in range(3):
        yield {"question": f"What is part {i}?", "options": ["leaf", "root", "stem", "seed"], "answer": str(i),
               "image": picture(i)}, "ABC"[i]  # fmt: skip


def mmvet() -> Iterator[tuple[dict[str, Any], str]]:
    for i, (answer, said) in enumerate((("14", "14"), ("a red car<AND>a bus", "a red car and a bus"))):
        yield {"question_id": f"v1_{i}", "image": picture(i), "question": f"What is {i}?", "answer": answer,
               "image_source": "made", "capability": "ocr,math"}, said  # fmt: skip


def mathvista() -> Iterator[tuple[dict[str, Any], str]]:
    """Answers that the stock rules read without the judge: a number as asked for, a choice word for word."""
    kinds = (("multi_choice", "text", ["Yes", "No"], "No", None), ("free_form", "integer", None, "12", None),
             ("free_form", "float", None, "1.5", 1.0))  # fmt: skip
    metadata = {"category": "math-targeted-vqa", "context": "chart", "grade": "high school", "language": "english",
                "skills": ["arithmetic"], "source": "made", "split": "testmini", "task": "geometry"}  # fmt: skip
    for i, (kind, answer_type, choices, answer, precision) in enumerate(kinds):
        yield {"pid": str(i), "question": f"How many {i}?", "image": f"images/{i}.jpg", "decoded_image": picture(i),
               "choices": choices, "unit": None, "precision": precision, "answer": answer, "question_type": kind,
               "answer_type": answer_type, "metadata": metadata, "query": f"How many {i}?"}, answer  # fmt: skip


def stock() -> dict[str, Stock]:
    """Stock task -> its data, laid out in the several ways in which the hub's repositories are."""
    return {
        "mmbench_en_dev_static": Stock(("lmms-lab-encoder/MMBench/en/dev-00000-of-00001.parquet",), tuple(mmbench())),
        "mmstar": Stock(("Lin-Chen/MMStar/mmstar.parquet",), tuple(mmstar()), MMSTAR_README),
        "mme": Stock(("lmms-lab-encoder/MME/data/test-00000-of-00002-a1.parquet",
                      "lmms-lab-encoder/MME/data/test-00001-of-00002-b2.parquet"), tuple(mme())),
        "realworldqa": Stock(("RealWorldQA/data/test-00000-of-00001.parquet",), tuple(realworldqa())),
        "pope": Stock(("lmms-lab-encoder/POPE/data/test-00000-of-00001.parquet",), tuple(pope())),
        "ocrbench": Stock(("echo840/OCRBench/default/test/0000.parquet",), tuple(ocrbench())),
        "docvqa_val": Stock(("lmms-lab-encoder/DocVQA/DocVQA/validation-00000-of-00001.parquet",), tuple(docvqa())),
        "chartqa": Stock(("lmms-lab-encoder/ChartQA/test.parquet",), tuple(chartqa())),
        "scienceqa_img": Stock(("lmms-lab-encoder/ScienceQA/ScienceQA-IMG/test-00000-of-00001.parquet",),
                               tuple(scienceqa())),
        "ai2d": Stock(("lmms-lab-encoder/ai2d/data/test-00000-of-00001.parquet",), tuple(ai2d())),
    }  # fmt: skip


def judged() -> dict[str, Stock]:
    """The same for the tasks that a judge scores."""
    return {
        "mmvet": Stock(("lmms-lab-encoder/MMVet/data/test-00000-of-00001.parquet",), tuple(mmvet())),
        "mathvista_testmini_format": Stock(("AI4Math/MathVista/data/testmini-00000-of-00001.parquet",),
                                           tuple(mathvista())),
    }  # fmt: skip


def write(root: Path, made: Mapping[str, Stock]) -> None:
    """Parquet as the hub has it: pictures as encoded bytes, what is a picture in the schema's metadata."""
    for one in made.values():
        rows = [row for row, _ in one.rows]
        share = -(-len(rows) // len(one.files))
        for number, name in enumerate(one.files):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(rows[number * share : (number + 1) * share]).to_parquet(path)
            if one.readme:
                (path.parent / "README.md").write_text(one.readme)
