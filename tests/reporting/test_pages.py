"""The pages of reports in a real browser: axe finds no serious fault, a phone need not scroll sideways, nothing is
loaded from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chromium import needs_chromium
from chromium import start as start_chromium
from mlflow import MlflowClient
from test_ablation import demo as ablation_demo
from test_report import demo
from test_side_by_side import finished

from sicog_exp.reporting import ablation, report, side_by_side

pytestmark = needs_chromium
SERIOUS = ("serious", "critical")
WIDTHS = (390, 1600)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = start_chromium()
    yield driver
    driver.quit()


@pytest.fixture(scope="module", params=["one run", "side by side", "ablation"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    if request.param == "ablation":
        report.write_page(ablation.render(ablation_demo()), folder / "page.html")
        return folder / "page.html"
    names = ["embedded", "random"] if request.param == "side by side" else ["embedded"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.chdir(folder)
        client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
        for place, name in enumerate(names):
            finished(client, folder, replace(demo(), name=name), 0.5 + 0.25 * place)
        side_by_side.rebuild(names, folder / "page.html")
    return folder / "page.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_anybody_can_read_it(browser: Any, page: Path, scheme: str, width: int) -> None:
    shown = {"width": width, "height": 1200, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shown)
    emulated = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", emulated)
    browser.get(page.as_uri())
    assert [fault for fault in faults(browser) if fault["impact"] in SERIOUS] == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []


def test_axe_sees_faults(browser: Any, tmp_path: Path) -> None:
    """The checker itself: a picture without a text is found."""
    path = tmp_path / "bad.html"
    path.write_text("<html><body><img src='data:image/gif;base64,R0lGODlhAQABAAAAACw='></body></html>")
    browser.get(path.as_uri())
    assert {"image-alt", "html-has-lang"} <= {fault["id"] for fault in faults(browser)}


def faults(browser: Any) -> list[dict[str, Any]]:
    """What axe finds on the open page: rule, impact and the elements."""
    from axe_core_python.selenium import Axe

    found = Axe().run(browser)["violations"]
    return [{"id": v["id"], "impact": v["impact"], "at": json.dumps([n["target"] for n in v["nodes"]][:5])}
            for v in found]  # fmt: skip
