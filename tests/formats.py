"""The same rows written in every format that users' files may have."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Plain:
    """A row as a person thinks of it: images by name, turns as (role, text)."""

    id: str
    images: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]


def qa(id: str, images: tuple[str, ...], *texts: str, system: str = "") -> Plain:
    """Questions and answers in turn."""
    turns = tuple(("assistant" if i % 2 else "user", text) for i, text in enumerate(texts))
    return Plain(id, images, ((("system", system),) if system else ()) + turns)


GOOD = (
    qa("one", ("a.png",), "<image>\nWhat is it?", "cat"),
    qa("two", ("b.png", "a.png"), "<image>\nand\n<image>\nSame?", "no"),
    qa("talk", ("c.jpg",), "<image>\nWas ist das für ein Ding? 猫", "eine Katze", "Why?", "it is"),
    qa("rules", ("a.png",), "Look: <image>", "a cat", system="Be brief."),
    qa("text", (), "Say hello.", "hello"),
)
BAD = (
    (qa("missing", ("none.png",), "<image>\nWhat?", "cat"), "image"),
    (qa("damaged", ("broken.png",), "<image>\nWhat?", "cat"), "image"),
    (qa("unplaced", ("a.png",), "What?", "cat"), "placeholder"),
    (qa("mute", ("a.png",), "<image>\nWhat?", "  "), "response"),
    (qa("order", ("a.png",), "<image>\nWhat?", "cat", "And?"), "response"),
    (Plain("robot", ("a.png",), (("robot", "<image>\nWhat?"), ("assistant", "cat"))), "roles"),
    (Plain("outside", ("../a.png",), (("user", "<image>\nWhat?"), ("assistant", "cat"))), "image"),
)
BAD_ROWS = tuple(row for row, _ in BAD)
ROWS = tuple(row for pair in zip(BAD_ROWS, GOOD, strict=False) for row in pair) + BAD_ROWS[len(GOOD) :]
"""Bad and good rows in turn."""


def save_images(folder: Path) -> None:
    for i, name in enumerate(("a.png", "b.png", "c.jpg")):
        pixels = np.random.default_rng(i).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")


# Rows in the three wordings.


def llava(row: Plain) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names.get(role, role), "value": text} for role, text in row.turns]
    image: Any = row.images[0] if len(row.images) == 1 else list(row.images)
    return {"id": row.id, **({"image": image} if row.images else {}), "conversations": turns}


def chat(row: Plain) -> dict[str, Any]:
    turns = [{"role": role, "content": text} for role, text in row.turns]
    return {"id": row.id, "images": list(row.images), "messages": turns}


def sharegpt(row: Plain) -> dict[str, Any]:
    """As exported from several services: the system message beside the turns, names of their own."""
    names = {"user": "user", "assistant": "chatgpt"}
    system = next((text for role, text in row.turns if role == "system"), "")
    turns = [{"from": names.get(role, role), "value": text} for role, text in row.turns if role != "system"]
    return {"id": row.id, "system": system, "images": list(row.images), "conversations": turns}


# Formats. A writer fills a folder that holds the images and returns the source.

Writer = Callable[[Path, Sequence[Plain]], Path]


def _lines(word: Callable[[Plain], dict[str, Any]]) -> Writer:
    def write(folder: Path, rows: Sequence[Plain]) -> Path:
        text = "".join(json.dumps(word(row), ensure_ascii=False) + "\n" for row in rows)
        (folder / "rows.jsonl").write_text(text, encoding="utf-8")
        return folder / "rows.jsonl"

    return write


def json_list(folder: Path, rows: Sequence[Plain]) -> Path:
    (folder / "rows.json").write_text(json.dumps([llava(row) for row in rows], indent=1), encoding="utf-8")
    return folder / "rows.json"


def _struct(folder: Path, name: str) -> dict[str, Any]:
    """An image as `datasets` stores it: bytes where there is such a file."""
    inside = (folder / name).is_file() and not name.startswith("..")
    return {"bytes": (folder / name).read_bytes() if inside else None, "path": name}


def _table(folder: Path, rows: Sequence[Plain], embedded: bool) -> Any:
    import pyarrow as pa

    made = [chat(row) if embedded else llava(row) for row in rows]
    for row, plain in zip(made, rows):
        row.pop("image", None)
        row["images"] = [_struct(folder, name) for name in plain.images] if embedded else list(plain.images)
    return pa.Table.from_pylist(made)


def parquet(folder: Path, rows: Sequence[Plain]) -> Path:
    import pyarrow.parquet as pq

    pq.write_table(_table(folder, rows, embedded=False), folder / "rows.parquet")
    return folder / "rows.parquet"


def parquet_shards(folder: Path, rows: Sequence[Plain]) -> Path:
    """A folder of two, with the images inside."""
    import pyarrow.parquet as pq

    shards = folder / "shards"
    shards.mkdir()
    for i, part in enumerate((rows[:4], rows[4:])):
        pq.write_table(_table(folder, part, embedded=True), shards / f"part-{i}.parquet")
    return shards


def saved(folder: Path, rows: Sequence[Plain]) -> Path:
    import datasets

    data = datasets.Dataset(_table(folder, rows, embedded=True))
    if all(image["bytes"] for images in data["images"] for image in images):  # it will not save what is not there
        data = data.cast_column("images", datasets.List(datasets.Image()))
    data.save_to_disk(folder / "saved")
    return folder / "saved"


def write_shard(file: Path, folder: Path, rows: Sequence[Plain]) -> None:
    with tarfile.open(file, "w") as tar:
        for row in rows:
            for name in row.images:
                if (folder / name).is_file() and not name.startswith(".."):
                    _add(tar, f"{row.id}.{name}", (folder / name).read_bytes())
            _add(tar, f"{row.id}.json", json.dumps(llava(row), ensure_ascii=False).encode())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def shards(folder: Path, rows: Sequence[Plain]) -> Path:
    """A brace pattern of three."""
    for i, part in enumerate((rows[:4], rows[4:5], rows[5:])):
        write_shard(folder / f"part-{i:03d}.tar", folder, part)
    return folder / "part-{000..002}.tar"


def one_shard(folder: Path, rows: Sequence[Plain]) -> Path:
    write_shard(folder / "rows.tar", folder, rows)
    return folder / "rows.tar"


FORMATS: dict[str, Writer] = {
    "LLaVA JSON": json_list, "LLaVA JSONL": _lines(llava), "chat JSONL": _lines(chat), "ShareGPT": _lines(sharegpt),
    "Parquet": parquet, "Parquet shards with bytes": parquet_shards, "datasets directory": saved,
    "WebDataset shard": one_shard, "WebDataset shards": shards,
}  # fmt: skip
