"""Every key of a recipe with its type, default and meaning, read from the dataclasses themselves."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import yaml

from sicog_exp.recipe import Recipe, RecipeError, StageConfig


@dataclass(frozen=True)
class Key:
    """One key; `name` is dotted, as an override takes it."""

    name: str
    type: str
    default: str
    meaning: str


def meanings(cls: type) -> dict[str, str]:
    """Field name -> the docstring under it, in the class itself or in one that it extends."""
    found = {name: text for base in reversed(cls.__bases__) if dataclasses.is_dataclass(base)
             for name, text in meanings(base).items()}  # fmt: skip
    (node,) = ast.parse(inspect.getsource(cls)).body
    body = typing.cast(ast.ClassDef, node).body
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[typing.cast(ast.Name, field.target).id] = " ".join(str(text.value.value).split())
    return found


def keys(config: Any = None, prefix: str = "") -> Iterator[Key]:
    """All keys of a configuration (a recipe's defaults if none is given): its own first, then its sections'."""
    config = config or Recipe()
    texts, hints = meanings(type(config)), typing.get_type_hints(type(config))
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    sections = {name: value for name, value in values.items() if dataclasses.is_dataclass(value)}
    for name in (name for name in values if name not in sections):
        default = yaml.safe_dump(values[name], default_flow_style=True).removesuffix("...\n").strip()
        yield Key(f"{prefix}{name}", shown(hints[name]), default, texts.get(name, ""))
    for name, section in sections.items():
        yield from keys(section, f"{prefix}{name}.")


def no_such_key(prefix: str) -> RecipeError:
    """The error for a prefix that no key has."""
    names = [key.name for key in keys()]
    heads = dict.fromkeys(name.partition(".")[0] for name in names)
    close = difflib.get_close_matches(prefix, [*names, *heads], n=3)
    meant = f"did you mean {' or '.join(close)}?" if close else f"they begin with {', '.join(heads)}"
    return RecipeError(f"no key begins with {prefix!r}; {meant}")


def shown(hint: Any) -> str:
    """A type as a user would say it: the allowed words, or its name."""
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is Mapping:
        return f"names, each with a {shown(typing.get_args(hint)[1])}"
    if typing.get_origin(hint) is tuple:
        return f"list of {shown(typing.get_args(hint)[0])}"
    names = [getattr(part, "__name__", str(part)) for part in typing.get_args(hint) or (hint,)]
    return " or ".join({"str": "text", "int": "whole number", "float": "number", "bool": "true, false",
                        "NoneType": "null"}.get(name, name) for name in names)  # fmt: skip


STAGES = tuple(name for name, hint in typing.get_type_hints(Recipe).items() if hint is StageConfig)


def markdown() -> str:
    """The reference page, `docs/recipe-keys.md`."""
    lines = ["# Every recipe key", "",
             "Written by `sicog keys --markdown`; defaults are those of the code, the recipes in",
             f"`experiments/` set their own. The stages {', '.join(STAGES)} have the same keys, shown once."]
    section = None
    for key in keys():
        head, _, rest = key.name.rpartition(".")
        if head in STAGES[1:]:
            continue
        if head != section:
            section = head
            title = " | ".join(STAGES) if head in STAGES else head
            lines += ["", f"## {title or 'the run'}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        lines.append(f"| `{rest if head else key.name}` | {key.type} | `{key.default}` | {key.meaning} |")
    return "\n".join(lines) + "\n"
