"""What the shell offers on TAB behind `sicog`; argcomplete speaks with bash, zsh and fish.

Every TAB starts a process, so nothing heavy is imported: keys and their values come from the dataclasses.
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

YAML = (".yaml", ".yml")


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell and end the process, if it is the shell that asks; else do nothing."""
    import argcomplete

    for name, command in subcommands(parser).items():
        for action in command._actions:
            offer = {"recipe": offered_files, "study": offered_files, "overrides": offered_keys, "more": offered_keys,
                     "prefix": offered_names}.get(action.dest)  # fmt: skip
            if offer:
                action.completer = _completer(offer, name)  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser, always_complete_options=False)


def _completer(offer: Callable[[str, str], list[str]], command: str) -> Callable[..., list[str]]:
    def completer(prefix: str, **_: Any) -> list[str]:
        return offer(prefix, command)

    return completer


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Name -> parser of every command."""
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return commands.choices


def chosen(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.ArgumentParser:
    """The parser of the command that was given, or of the task behind it: `data check`, say."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return chosen(action.choices[getattr(args, action.dest)], args)
    return parser


# Files.


def offered_files(prefix: str, command: str) -> list[str]:
    """The shipped recipes or studies where nothing is typed yet; then folders and YAML files that begin so."""
    if not prefix:
        shipped = Path({"sweep": "experiments/sweeps", "ablate": "experiments/ablations"}.get(command, "experiments"))
        return sorted(str(path) for path in shipped.glob("*.yaml"))
    typed = Path(prefix)
    folder = typed if prefix.endswith("/") else typed.parent
    start = prefix[: prefix.rfind("/") + 1]
    return sorted(start + name for name in _entries(folder.expanduser()) if (start + name).startswith(prefix))


def _entries(folder: Path) -> Iterable[str]:
    try:
        for path in folder.iterdir():
            if path.is_dir() and not path.name.startswith("."):
                yield f"{path.name}/"
            elif path.suffix in YAML:
                yield path.name
    except OSError:
        return


# Keys and values.


def offered_keys(prefix: str, command: str) -> list[str]:
    """`key=` of every key that begins so, a section as `section.` while several fit; behind `=` the allowed values."""
    hints = dict(key_hints(_config_class(command)))
    key, equals, _ = prefix.partition("=")
    if equals:
        return [f"{key}={value}" for value in allowed(key, hints[key])] if key in hints else []
    found = [name for name in hints if name.startswith(prefix)]
    heads = list(dict.fromkeys(f"{name.partition('.')[0]}." if "." in name else f"{name}=" for name in found))
    return heads if "." not in prefix and len(heads) > 1 else [f"{name}=" for name in found]


def offered_names(prefix: str, command: str) -> list[str]:
    """What `sicog keys` takes: keys and sections without a value."""
    return [word.removesuffix("=") for word in offered_keys(prefix, command)]


def _config_class(command: str) -> type:
    """What a command's overrides change."""
    if command == "base":
        from sicog_exp.base import BaseRecipe

        return BaseRecipe
    if command == "sweep":
        from sicog_exp.studies.sweep import StudyConfig

        return StudyConfig
    from sicog_exp.recipe import CurationConfig, DataConfig, Recipe

    if command == "ablate":
        from sicog_exp.studies.ablate import AblationConfig

        return type("Ablation", (AblationConfig, Recipe), {})
    if command == "curate":
        return dataclasses.make_dataclass("Curation", [("curation", CurationConfig)])
    if command == "data":
        return dataclasses.make_dataclass("Data", [("data", DataConfig)])
    return Recipe


def key_hints(cls: type, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """(dotted key, type) of every key below a configuration class."""
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from key_hints(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint


def allowed(key: str, hint: Any) -> list[str]:
    """The words that a key takes, where they can be listed."""
    if typing.get_origin(hint) is Literal:
        return [str(word) for word in typing.get_args(hint)]
    if key == "evaluation.suite":
        return sorted(path.stem for path in Path("evals/suites").glob("*.yaml"))
    return ["true", "false"] if hint is bool else []
