"""The guide is true: it builds without a warning, its links lead somewhere, its commands, keys and files exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from runs import REPOSITORY

from sicog_exp.cli import _parse, build_parser
from sicog_exp.completion import _config_class, key_hints, subcommands

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(REPOSITORY)) for page in PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DEFINED = re.compile(r"^`([^`\n]+)`[^`\n]*\n\n```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
OURS = ("sicog_exp", "tests", "docs", "evals", "experiments", "benchmarks")
RETIRED = {"evidence": "ablate"}
"""Commands that results were made with, and what replaces them; the page says so."""
SUFFIXES = (".yaml", ".yml", ".md", ".py", ".json", ".jsonl")
each_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


@pytest.mark.skipif(not importlib.util.find_spec("properdocs"), reason="no properdocs: pip install -e .[docs]")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "properdocs", "build", "-f", "mkdocs.yml", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    for page in (REPOSITORY / "docs").glob("*.md"):
        assert (tmp_path / f"{page.stem}.html").is_file(), f"{page.name} is not in the site"


@each_page
def test_links_lead_to_files(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    targets = [link.partition("#")[0] for link in LINK.findall(text) if "://" not in link and not link.startswith("#")]
    assert [target for target in targets if not (page.parent / target).exists()] == []


@each_page
def test_commands_of_ours_are_understood(page: Path) -> None:
    parser = build_parser()
    for words in commands(page):
        if words[0] == "sicog" and len(words) > 1 and words[1] != "COMMAND":
            if words[1] in RETIRED and page.parent.name == "results":
                assert f"`sicog {RETIRED[words[1]]}" in page.read_text(), f"{words} is not said to be replaced"
                continue
            assert words[1] in subcommands(parser), words
            if len(words) > 2 and "<TAB>" not in words[-1]:
                check_overrides(words[1], _parse(parser, words[1:]))
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE), words
        elif words[:3] == ["mlflow", "run", "."] and "-e" in words:
            entry = words[words.index("-e") + 1]
            assert re.search(rf"^  {entry}:", (REPOSITORY / "MLproject").read_text(), re.MULTILINE), words


def check_overrides(command: str, args: object) -> None:
    """Every KEY=VALUE names a key of what the command configures."""
    given = [*getattr(args, "overrides", []), *shlex.split(getattr(args, "more", "")), getattr(args, "recipe", "")]
    keys = [word.partition("=")[0] for word in given if "=" in word]
    assert set(keys) <= {key for key, _ in key_hints(_config_class(command))}


@each_page
def test_files_that_are_named_exist(page: Path) -> None:
    defined = {name for name, _ in DEFINED.findall(page.read_text())}
    words = {word for command in commands(page) for word in command[1:] if "=" not in word or word.startswith("data.")}
    paths = {word.rpartition("=")[2] for word in words}
    paths |= {word for word in inline(page) if word.partition("/")[0] in OURS and "<" not in word}
    named = [path for path in paths if path.endswith(SUFFIXES) and not is_placeholder(path) and path not in defined]
    assert [path for path in named if not list(REPOSITORY.glob(path))] == []


def is_placeholder(path: str) -> bool:
    """Written in capitals, at least in one part: FILE.jsonl, STORE/data-..., https://..., results that a run writes."""
    parts = [part.partition(".")[0] for part in path.split("/")]
    return any(re.fullmatch(r"[A-Z_]+", part) for part in parts) or "..." in path or "://" in path


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command line in a page's code blocks and inline code."""
    for language, block in FENCE.findall(page.read_text()):
        if language in ("", "bash", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                yield from _words(line.removeprefix("$ "))
    for text in inline(page):
        yield from _words(text)


def _words(line: str) -> Iterator[list[str]]:
    known = ("sicog", "make", "mlflow")
    if line.split(" ")[0] in known:
        words = shlex.split(line.replace("'A=1 B=2'", "seed=1"), comments=True)
        if len(words) > 1:
            yield words


def inline(page: Path) -> list[str]:
    text = FENCE.sub("", page.read_text())
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def test_the_benchmark_of_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of docs/your-benchmark.md as they stand there, scored on an engine that answers the truth."""
    monkeypatch.syspath_prepend(REPOSITORY / "tests" / "evaluation")
    from oracle import OracleEngine
    from PIL import Image

    from sicog_exp.evaluation.benchmarks import evaluate, read_samples
    from sicog_exp.evaluation.ready import check_suite
    from sicog_exp.evaluation.suites import load_suite, suite_state
    from sicog_exp.recipe import EvaluationConfig

    for name, text in DEFINED.findall((REPOSITORY / "docs" / "your-benchmark.md").read_text()):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    for name in ("cat", "cup"):
        Image.new("RGB", (8, 8)).save(tmp_path / "mine" / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    check_suite("mine.yaml", "benchmark")
    suite = load_suite("mine.yaml")
    engine = OracleEngine(lambda request: "No." if "asleep" in request.messages[0].content else "the Cat")
    scores = evaluate(engine, suite, tmp_path, EvaluationConfig(batch_size=2, max_new_tokens=16), tmp_path / "out")
    assert scores.tasks["animals"].accuracy == pytest.approx(2 / 3)
    assert [sample.image for sample in read_samples(tmp_path / "out")] == ["cat.png", "cat.png", "cup.png"]
    before = suite_state("mine.yaml")
    questions = tmp_path / "mine" / "questions.jsonl"
    questions.write_text(questions.read_text().replace("coffee", "tea"))
    assert suite_state("mine.yaml") != before


def test_tools_that_the_guide_names_are_installed() -> None:
    assert shutil.which("register-python-argcomplete", path=str(Path(sys.executable).parent))


def test_a_plain_mlflow_run_installs_what_the_package_asks_for() -> None:
    """python_env.yaml says it a second time, since MLflow reads no pyproject.toml."""
    wanted = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    assert yaml.safe_load((REPOSITORY / "python_env.yaml").read_text())["dependencies"] == wanted
