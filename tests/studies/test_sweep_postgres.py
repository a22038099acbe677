"""A study on a PostgreSQL server: two workers, one set of trials, nothing drawn or run twice."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from optuna.trial import TrialState
from runs import start_sweep

from sicog_exp.studies.findings import finished
from sicog_exp.studies.sweep import StudyConfig, load_study, open_study, recipe_of

pytest.importorskip("psycopg", reason="needs psycopg: pip install -e '.[postgres]'")
GIVEN = "SICOG_TEST_POSTGRES"
"""Names the environment variable with the URL of a database that the test may fill, postgresql+psycopg://..."""
NOBODY = "nobody"
"""PostgreSQL refuses to run as root."""
BINARY = shutil.which("postgres")
pytestmark = [
    pytest.mark.postgres,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not (BINARY or os.environ.get(GIVEN)), reason=f"no postgres binary, and no {GIVEN} with a URL"),
]


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """The URL of a running server: the given one, or one of our own that listens on a socket in a temporary folder."""
    if os.environ.get(GIVEN):
        yield os.environ[GIVEN]
        return
    user = NOBODY if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="sicog-postgres-") as folder:
        if user:
            shutil.chown(folder, user)
        programs, data = Path(str(BINARY)).resolve().parent, f"{folder}/data"
        name = user or getpass.getuser()
        subprocess.run([programs / "initdb", "-D", data, "-A", "trust", "-U", name, "--no-sync"], user=user, cwd=folder,
                       check=True, capture_output=True)  # fmt: skip
        server = subprocess.Popen([programs / "postgres", "-D", data, "-k", folder, "-c", "listen_addresses=",
                                   "-c", "fsync=off"], user=user, cwd=folder, stderr=subprocess.DEVNULL)  # fmt: skip
        try:
            _wait(folder, name)
            yield f"postgresql+psycopg://{name}@/postgres?host={folder}"
        finally:
            server.send_signal(signal.SIGINT)  # SIGTERM would wait for our own connection to close
            server.wait(60)


def _wait(folder: str, user: str) -> None:
    import psycopg

    for _ in range(600):
        try:
            psycopg.connect(host=folder, user=user, dbname="postgres").close()
            return
        except psycopg.OperationalError:
            time.sleep(0.1)
    raise TimeoutError("the PostgreSQL server did not start")


def written(database: str, model: Path, folder: Path) -> Path:
    space = {"curation.reasoning_threshold": {"low": 0.0, "high": 0.6}}
    fixed = [f"store={folder}/store", f"model.base={model}", "iterations=1", "tracking.register=false"]
    name = f"tiny-{folder.name}-{time.time_ns()}"  # a given database may hold the studies of earlier tests
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"name": name, "recipe": "tests/tiny.yaml", "trials": 4, "space": space,
                                    "overrides": fixed, "storage": database}))  # fmt: skip
    return path


def test_two_workers_share_a_study(database: str, tiny_model: Path, tmp_path: Path) -> None:
    path = written(database, tiny_model, tmp_path)
    workers = [start_sweep(path, tmp_path) for _ in range(2)]
    printed = [worker.communicate(timeout=1500)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n\n".join(printed)
    config: StudyConfig = load_study(path)
    search = open_study(config, recipe_of(config, {}, "development"))
    trials = search.get_trials()
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    # the last trials begin together: each worker may be one beyond what was asked for
    assert config.trials <= len(finished(search)) <= config.trials + 1
    assert len({trial.user_attrs["owner"] for trial in trials}) == 2, "both workers took part"
    values = [tuple(trial.params.values()) for trial in trials]
    assert len(set(values)) == len(values)
    assert all("the winner's recipe" in text for text in printed)
