"""What TAB offers, asked the way the shell asks: in a process of its own, without anything heavy imported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import REPOSITORY

RECIPE = "experiments/embedded.yaml"
HEAVY = {"torch", "transformers", "mlflow", "optuna", "datasets", "lightning", "PIL", "lmms_eval"}
SHELL = """
eval "$(register-python-argcomplete {options} sicog)"
COMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}; COMP_TYPE=9
read -ra COMP_WORDS <<< "$COMP_LINE"
_python_argcomplete sicog
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def asked(line: str, folder: Path) -> tuple[set[str], set[str]]:
    """The words offered behind `line`, and the top-level packages that were imported for them."""
    answer = folder / "answer"
    own = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "COMP_LINE": line, "COMP_POINT": str(len(line)),
           "COMP_TYPE": "9", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}  # fmt: skip
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "sicog_exp.cli"], cwd=REPOSITORY, text=True,
                          env={**os.environ, **own}, capture_output=True, timeout=60)  # fmt: skip
    assert answer.exists(), done.stderr[-2000:]
    imported = {row.rpartition("|")[2].strip().partition(".")[0] for row in done.stderr.splitlines()}
    assert "argcomplete" in imported
    return {word.strip() for word in answer.read_text().split("\n")}, imported


OFFERS = [
    ("sicog ", {"iterate", "curate", "compare", "keys"}, {"experiments/"}),
    ("sicog it", {"iterate"}, {"base"}),
    ("sicog iterate ", {RECIPE, "seed=", "curation."}, {"curation.encoder=", "--help"}),
    ("sicog iterate --", {"--help", "--overrides"}, {RECIPE}),
    ("sicog iterate experiments/e", {RECIPE, "experiments/evidence.yaml"}, {"experiments/own.yaml"}),
    ("sicog iterate exp", {"experiments/"}, set()),
    (f"sicog iterate {RECIPE} cur", {"curation.encoder=", "curation.dedup="}, {"seed="}),
    (f"sicog iterate {RECIPE} curation.reas", {"curation.reasoning_scorer=", "curation.reasoning_threshold="},
     {"curation.encoder="}),
    (f"sicog iterate {RECIPE} seed=1 data.source=", {"data.source=world", "data.source=own"}, {"seed="}),
    ("sicog iterate curation.dedup=", {"curation.dedup=true", "curation.dedup=false"}, set()),
    ("sicog iterate evaluation.suite=", {"evaluation.suite=embedded", "evaluation.suite=own"}, set()),
    ("sicog base experiments/base.yaml shape.w", {"shape.width="}, {"seed="}),
    ("sicog sweep ", {"experiments/sweeps/own.yaml", "trials="}, {RECIPE}),
    ("sicog sweep experiments/sweeps/own.yaml pruner=", {"pruner=median", "pruner=none"}, set()),
    ("sicog curate --out DIR cur", {"curation.encoder="}, set()),
    ("sicog keys curation.enc", {"curation.encoder"}, set()),
    ("sicog ablate ", {"experiments/ablations/evidence.yaml", "reference=", "curation."}, {RECIPE}),
    ("sicog ablate experiments/ablations/evidence.yaml curation.sel", {"curation.select="}, set()),
    ("sicog ablate --se", {"--seeds"}, set()),
    ("sicog plan --dev", {"--device", "--devices"}, {"--json"}),
    ("sicog plan experiments/paper_lowres.yaml plan.sh", {"plan.shape="}, {"plan.cod_tokens="}),
]  # fmt: skip


@pytest.mark.parametrize(("line", "offered", "not_offered"), OFFERS, ids=[line for line, *_ in OFFERS])
def test_tab_offers_what_fits(line: str, offered: set[str], not_offered: set[str], tmp_path: Path) -> None:
    found, imported = asked(line, tmp_path)
    assert offered <= found
    assert not not_offered & found
    assert not HEAVY & imported


def test_nothing_is_offered_for_a_key_that_is_none(tmp_path: Path) -> None:
    assert asked("sicog iterate smapling.cod=", tmp_path)[0] == {""}


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash here")
def test_bash_completes_keys_and_values() -> None:
    found = _shell("bash", SHELL.format(options="", line="sicog iterate experiments/own.yaml curation.enc"))
    assert found == ["curation.encoder="]
    assert _shell("bash", SHELL.format(options="", line="sicog iterate data.source=ea")) == ["easyvqa"]


@pytest.mark.skipif(not shutil.which("fish"), reason="no fish here")
def test_fish_completes_keys() -> None:
    script = 'register-python-argcomplete --shell fish sicog | source; complete -C "sicog iterate data.source=ea"'
    assert _shell("fish", script) == ["data.source=easyvqa"]


@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh here")
def test_zsh_takes_the_same_script() -> None:
    script = 'autoload -U compinit; compinit -u; eval "$(register-python-argcomplete sicog)"; print $_comps[sicog]'
    assert _shell("zsh", script) == ["_python_argcomplete"]


def _shell(shell: str, script: str) -> list[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # bash sets this one in interactive shells alone
    own = {"PATH": path, "COMP_WORDBREAKS": " \t\n\"'><=;|&(:"}
    done = subprocess.run([shell, "-c", script], cwd=REPOSITORY, env={**os.environ, **own}, capture_output=True,
                          text=True, timeout=60)  # fmt: skip
    return [line.strip() for line in done.stdout.splitlines()]
