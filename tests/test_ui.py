"""The MLflow UI in a real browser: the way of a researcher who compares generations, judged by what the page shows."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from chromium import needs_chromium
from chromium import start as start_chromium
from runs import arguments, environment, finish

from sicog_exp.experiment import MEAN_ACCURACY
from sicog_exp.tracking import PARENT, table_link

pytestmark = needs_chromium
PATIENCE = 120
"""Seconds for a page; the machine may be busy."""
TASK = "accuracy/sicog_world_direct"
Found = TypeVar("Found")


class Browser:
    """A page of the UI, read and clicked as a person does."""

    def __init__(self, driver: Any, address: str) -> None:
        self.driver, self.address = driver, address

    def open(self, path: str, *expected: str) -> str:
        """Load a page; the text it shows once everything expected is there."""
        self.driver.get("about:blank")  # a change behind the # alone loads nothing
        self.driver.get(f"{self.address}/{path}")
        return self.shows(*expected)

    def text(self) -> str:
        from selenium.webdriver.common.by import By

        return self.driver.find_element(By.TAG_NAME, "body").text

    def shows(self, *expected: str) -> str:
        self.until(lambda: all(words in self.text() for words in expected), f"{expected} on the page")
        return self.text()

    def click(self, xpath: str) -> None:
        from selenium.webdriver.common.by import By

        self.until(lambda: self.driver.find_element(By.XPATH, xpath).click() or True, f"a click on {xpath}")

    def listed(self) -> list[str]:
        """The ids of the list's runs, from above."""
        from selenium.webdriver.common.by import By

        links = self.driver.find_elements(By.CSS_SELECTOR, ".ag-row a[href*='/runs/']")
        placed = sorted((link.location["y"], link.get_attribute("href").rpartition("/")[2]) for link in links)
        return [run for _, run in placed]

    def until(self, condition: Callable[[], Found], what: str) -> Found:
        from selenium.common.exceptions import TimeoutException, WebDriverException
        from selenium.webdriver.support.ui import WebDriverWait

        try:
            return WebDriverWait(self.driver, PATIENCE, 0.3, (WebDriverException,)).until(lambda _: condition())
        except TimeoutException:
            raise AssertionError(f"no {what}; {self.driver.current_url} shows:\n{self.text()[:3000]}") from None


@pytest.fixture(scope="module")
def folder(tiny_run: tuple[Path, str], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs, in a copy of the session's own: the second has another name alone, so that all of its steps
    are read from the store."""
    from mlflow import MlflowClient

    given, folder = tiny_run[0], tmp_path_factory.mktemp("ui")
    shutil.copytree(given / "store", folder / "store")
    shutil.copyfile(given / "mlflow.db", folder / "mlflow.db")
    finish([*arguments(tiny_model, folder / "store"), "name=other", "tracking.experiment=end-to-end"], folder)
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    for index, run in enumerate(found(client, "tags.`sicog.level` = 'generation'")):
        for name in (MEAN_ACCURACY, TASK):  # so small a model's own scores are all alike
            client.log_metric(run.info.run_id, name, 0.125 + 0.01 * (5 * index % 17))
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{folder}/mlflow.db")


@pytest.fixture(scope="module")
def browser(folder: Path) -> Iterator[Browser]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "sicog_exp.cli", "ui", "--port", str(port)]
    quiet = {**environment(folder), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    server = subprocess.Popen(command, cwd=folder, env=quiet, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              start_new_session=True)  # fmt: skip
    driver = start_chromium()
    page = Browser(driver, f"http://127.0.0.1:{port}")
    try:
        page.until(lambda: answers(page.address), "answer of the server")
        driver.get(page.address)
        driver.execute_script("localStorage['mlflow.assistant.panelOpen_v1'] = 'false';"
                              "localStorage['mlflow.assistant.fab.autoOpenedOnFirstLoad_v1'] = 'true'")  # fmt: skip
        yield page
    finally:
        driver.quit()
        os.killpg(server.pid, 15)
        server.wait(60)


def answers(address: str) -> bool:
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def parent(client: Any) -> Any:
    """The run of the first experiment."""
    return found(client, "tags.`sicog.level` = 'experiment' and params.name = 'tiny'")[0]


def found(client: Any, query: str) -> list[Any]:
    experiment = client.get_experiment_by_name("end-to-end").experiment_id
    return client.search_runs([experiment], f"{query} and attributes.status = 'FINISHED'", order_by=["start_time ASC"])


def generations(client: Any, parent: Any) -> list[Any]:
    return found(client, f"tags.`{PARENT}` = '{parent.info.run_id}'")


def runs_page(parent: Any) -> str:
    return f"#/experiments/{parent.info.experiment_id}/runs?workflowType=machine_learning"


def cell(run: Any) -> str:
    """The cell of the list that holds a run's name."""
    return f"//a[contains(@href, '{run.info.run_id}')]/ancestor::*[contains(@class, 'ag-cell')][1]"


def test_the_list_is_a_tree_of_run_generation_and_step(browser: Browser, client: Any, parent: Any) -> None:
    before = browser.open(runs_page(parent), "s3 tiny", "s3 other", "matching runs")
    assert "G1 s3 tiny" not in before
    browser.click(cell(parent) + "//button")
    shown = browser.shows("G0 s3 tiny", "G1 s3 tiny", "G2 s3 tiny")
    assert "G1 curate" not in shown
    browser.click(cell(generations(client, parent)[1]) + "//button")
    browser.shows("G1 curate", "G1 pretrain", "G1 evaluate")


def test_generations_are_listed_best_first(browser: Browser, client: Any, parent: Any) -> None:
    """By the very link that the terminal ends with."""
    link = table_link(parent.info.experiment_id, MEAN_ACCURACY)
    browser.open(link, f"Sort: {MEAN_ACCURACY}", "G2 s3 tiny", "G2 s3 other")
    scores = {run.info.run_id: run.data.metrics[MEAN_ACCURACY]
              for run in found(client, "tags.`sicog.level` = 'generation'")}  # fmt: skip
    assert len(set(scores.values())) == len(scores) >= 6
    assert browser.listed() == sorted(scores, key=lambda run: -scores[run])


def test_two_generations_are_compared(browser: Browser, client: Any, parent: Any) -> None:
    first, *_, last = generations(client, parent)
    browser.open(table_link(parent.info.experiment_id, TASK), f"Sort: {TASK}", "G2 s3 tiny")
    for run in (first, last):
        browser.click(f"{cell(run)}/ancestor::*[@role='row']//input[@type='checkbox']")
    browser.click("//*[@data-testid='runs-compare-button']")
    shown = browser.shows("Comparing 2 Runs", TASK, "origin.pools", "parent_generation", "code.package")
    for run in (first, last):
        assert run.info.run_name in shown
        assert run.data.params["origin.model"] in shown
        assert str(round(run.data.metrics[TASK], 3)) in shown
    assert last.data.params["origin.curated_digest"] in shown


def test_charts_of_the_parent_begin_with_accuracy_over_generations(browser: Browser, parent: Any) -> None:
    from selenium.webdriver.common.by import By

    page = f"#/experiments/{parent.info.experiment_id}/runs/{parent.info.run_id}/model-metrics"
    shown = browser.open(page, "accuracy\n(3)", "sicog_world_direct", "s3 tiny")
    assert shown.index("accuracy\n(3)") < shown.index("curation/caption")
    points = ".js-plotly-plot .scatterlayer .point"
    browser.until(lambda: len(browser.driver.find_elements(By.CSS_SELECTOR, points)) >= 9, "points of three charts")
    ticks = {tick.text for tick in browser.driver.find_elements(By.CSS_SELECTOR, ".js-plotly-plot .xtick text")}
    assert {"0", "1", "2"} <= ticks, "one point a generation"


def test_the_report_opens_among_the_artifacts(browser: Browser, parent: Any) -> None:
    from selenium.webdriver.common.by import By

    page = f"#/experiments/{parent.info.experiment_id}/runs/{parent.info.run_id}/artifacts"
    browser.open(page, "recipe.yaml", "summary.json", "report.html")
    browser.click("//*[normalize-space()='report.html']")
    frame = browser.until(lambda: browser.driver.find_element(By.TAG_NAME, "iframe"), "frame with the report")
    browser.driver.switch_to.frame(frame)
    try:
        browser.shows("tiny: 3 generations compared", parent.info.run_id)
    finally:
        browser.driver.switch_to.default_content()


def test_a_generation_names_its_data_sets_and_origin(browser: Browser, client: Any, parent: Any) -> None:
    from selenium.webdriver.common.by import By

    last = generations(client, parent)[-1]
    page = f"#/experiments/{parent.info.experiment_id}/runs/{last.info.run_id}"
    browser.open(page, "s3 tiny", "Parent run", "Datasets", "benchmark", "+1")
    search = browser.driver.find_element(By.XPATH, "//input[@placeholder='Search parameters']")
    search.send_keys("origin.")
    browser.shows(*(value for name, value in last.data.params.items() if name.startswith("origin.")))
    browser.click("//*[starts-with(normalize-space(), 'benchmark (')]")
    digests = {given.dataset.name: given.dataset.digest for given in last.inputs.dataset_inputs}
    assert set(digests) == {"benchmark", "self-data"}
    browser.shows("2 datasets used", *(f"{name} ({digest})" for name, digest in digests.items()), "num rows: 18")


def test_a_registered_version_leads_back_to_its_run(browser: Browser, client: Any) -> None:
    version = client.get_model_version_by_alias("sicog-tiny", "gen-2")  # of the run that finished last
    last = client.get_run(version.run_id)
    parent = client.get_run(last.data.tags[PARENT])
    assert last.data.tags["sicog.generation"] == "2"
    browser.open(f"#/models/sicog-tiny/versions/{version.version}", "gen-2", "Source Run", "origin.pools",
                 last.data.params["origin.pools"].split()[0])  # fmt: skip
    browser.click("//a[contains(normalize-space(), 'its run')]")
    browser.driver.switch_to.window(browser.driver.window_handles[-1])  # links of a description open one
    browser.shows("About this run", last.info.run_id, "G2 s3 tiny")
    browser.click("//a[normalize-space()='s3 tiny']")
    browser.shows(parent.info.run_id, "G0 s3 tiny", "G1 s3 tiny")
    assert json.loads(parent.data.params["iterations"]) == 2
