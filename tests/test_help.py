"""Every command explains itself, completely and quickly."""

from __future__ import annotations

import argparse
import os
import resource
import signal
import statistics
import subprocess
import sys

import pytest
from runs import REPOSITORY

from sicog_exp.cli import build_parser, main
from sicog_exp.completion import subcommands

COMMANDS = subcommands(build_parser())
HEAVY = {"torch", "transformers", "mlflow", "optuna", "datasets", "lmms_eval", "numpy"}
LIMIT = 2.0
"""Seconds of CPU time that help may take."""


def summaries() -> dict[str, str | None]:
    (action,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return {choice.dest: choice.help for choice in action._choices_actions}


def test_every_command_has_a_line_in_the_overview() -> None:
    assert list(summaries()) == list(COMMANDS)
    for name, line in summaries().items():
        assert line, name
        assert not line.endswith("."), name


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_argument_is_described(name: str) -> None:
    command = COMMANDS[name]
    assert command.description, "no description"
    assert command.description.endswith("."), command.description
    assert command.description[0].isupper(), command.description
    for action in command._actions:
        assert action.help, f"{action.dest} has no help"
        assert not action.help.endswith("."), action.help
        shown = isinstance(action.default, bool | None) or action.default in ("", [], argparse.SUPPRESS)
        assert shown or "default" in action.help, f"{action.dest}: its default is not said"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", ["keys", "keys seed"])
def test_output_that_nobody_reads_any_more_is_no_defect(words: str, unbuffered: str) -> None:
    """As behind `| head`: longer than a pipe's buffer, or so short that it is written at the end."""
    started = subprocess.Popen([sys.executable, "-m", "sicog_exp.cli", *words.split()], cwd=REPOSITORY, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, "PYTHONUNBUFFERED": unbuffered})  # fmt: skip
    assert started.stdout
    started.stdout.close()
    assert started.stderr
    assert started.stderr.read() == ""
    assert started.wait(60) == 128 + signal.SIGPIPE


def test_another_broken_pipe_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: argparse.Namespace) -> int:
        raise BrokenPipeError

    monkeypatch.setattr("sicog_exp.cli._keys", broken)
    with pytest.raises(BrokenPipeError):
        main(["keys"])


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_is_quick_and_imports_nothing_heavy(name: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "sicog_exp.cli", *name.split(), "--help"]
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, env=os.environ)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: sicog")
    imported = {row.rpartition("|")[2].strip().partition(".")[0] for row in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not HEAVY & imported
    assert statistics.median(taken) < LIMIT, taken
