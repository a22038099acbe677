"""The reference of recipe keys: complete, explained, true to the code, and the page in docs/ is its output."""

from __future__ import annotations

from pathlib import Path

from runs import REPOSITORY

from sicog_exp.recipe import Recipe, load
from sicog_exp.reference import keys, markdown
from sicog_exp.tracking import flat


def test_every_key_is_there_once_and_explained() -> None:
    from dataclasses import asdict

    found = [key.name for key in keys()]
    assert sorted(found) == sorted(flat(asdict(Recipe())))
    assert [key.name for key in keys() if not key.meaning] == []


def test_all_defaults_together_are_the_default_recipe(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert load(tmp_path / "empty.yaml", [f"{key.name}={key.default}" for key in keys()]) == Recipe()


def test_the_page_in_docs_is_current() -> None:
    assert (REPOSITORY / "docs" / "recipe-keys.md").read_text() == markdown()
