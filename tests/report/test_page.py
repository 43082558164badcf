"""The page in a browser: at two widths, light and dark, without an error, a request or a scroll."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_forms import HOSTILE, named, points_of

from onnx_attnround.pipeline import QuantizeResult
from onnx_attnround.report.page import check_page, compared_page, points_page, run_page
from onnx_attnround.report.result import Compared
from onnx_attnround.verify import Advice, LayerPair, PairComparison
from onnx_attnround.verify.advice import Remedy

pytestmark = pytest.mark.slow
LONG = "/model/" + "very_long_name_of_a_block" * 8 + "/Conv"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window, which keeps a log of errors and of requests."""
    webdriver = pytest.importorskip("selenium.webdriver")
    driver = shutil.which("chromedriver")
    if driver is None or shutil.which("chromium") is None:
        pytest.skip("needs Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.chrome.service.Service(driver)
    with webdriver.Chrome(options=options, service=service) as started:
        yield started


def compared(result: QuantizeResult) -> Compared:
    """Two layers of two files, of which one parts."""
    layers = [
        LayerPair(
            node=node, float_node=HOSTILE, matched="weights", bits=8, sqnr_db=30.0,
            inherited_db=math.inf, own_db=math.inf, expected_db=45.0, input_db=None, parts=parts,
            mend=parts,
        )
        for node, parts in ((LONG, None), (HOSTILE, f"the codes of '{LONG}' are cut off"))
    ]  # fmt: skip
    assert result.verification is not None
    found = PairComparison(
        verification=result.verification, layers=tuple(layers), alone=(LONG, HOSTILE)
    )
    return Compared(names=("float.onnx", f"{LONG}.onnx"), found=found, notes=(LONG,), seconds={})


@pytest.fixture(params=["run", "points", "check", "compared"])
def page(request: pytest.FixtureRequest, result: QuantizeResult, tmp_path: Path) -> Path:
    """A page of each kind, with names that are long and that look like tags."""
    changed = named(replace(result, notes=(LONG,)), HOSTILE)
    layers = (replace(changed.plan.layers[0], node=LONG), changed.plan.layers[1])
    bits = {LONG: 4, HOSTILE: 8}
    changed = replace(
        changed,
        plan=replace(changed.plan, layers=layers, skipped={LONG: "op LSTM is not supported"}),
        allocation=replace(changed.allocation, bits=bits),
        roundings={LONG: next(iter(result.roundings.values()))},
        advice=Advice(
            remedies=(Remedy(key="layer_bits", name=LONG, bits=8, alone_db=9.5),), share=0.5
        ),
    )
    pages = {
        "run": lambda: run_page(changed, f"onnx-attnround {LONG}"),
        "points": lambda: points_page(points_of(changed)),
        "check": lambda: check_page(changed.checked),
        "compared": lambda: compared_page(compared(changed)),
    }
    path = tmp_path / "page.html"
    path.write_text(pages[request.param](), encoding="utf-8")
    return path


def show(browser: Any, page: Path, width: int, scheme: str) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for log in ("browser", "performance"):
        browser.get_log(log)  # what is read is gone
    browser.get(page.as_uri())


def requests(browser: Any) -> list[str]:
    """The addresses asked for."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event for event in events if event["method"] == "Network.requestWillBeSent"]
    return [event["params"]["request"]["url"] for event in sent]


LIGHTNESS = """
const share = value => value <= .03928 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4;
const lightness = color => {
  const [r, g, b] = color.match(/[\\d.]+/g).map(each => share(each / 255));
  return .2126 * r + .7152 * g + .0722 * b;
};
const back = lightness(getComputedStyle(document.body).backgroundColor);
const least = [...document.querySelectorAll("body *")]
  .filter(each => [...each.childNodes].some(node => node.nodeType === 3 && node.data.trim()))
  .filter(each => !each.closest("svg, pre, style"))
  .map(each => lightness(getComputedStyle(each).color))
  .map(fore => (Math.max(fore, back) + .05) / (Math.min(fore, back) + .05));
return [back, Math.min(...least)];
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_it_shows_without_a_fault(browser: Any, page: Path, width: int, scheme: str) -> None:
    show(browser, page, width, scheme)
    assert browser.get_log("browser") == []
    assert [url for url in requests(browser) if not url.startswith("data:")] == [page.as_uri()]
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= width
    back, contrast = browser.execute_script(LIGHTNESS)
    assert back > 0.8 if scheme == "light" else back < 0.05
    assert contrast >= 4.5  # that of WCAG 2.1 for text


def test_marks_are_seen(browser: Any, result: QuantizeResult, tmp_path: Path) -> None:
    """The dots of a chart are as large as they should be, and lie within it."""
    path = tmp_path / "page.html"
    path.write_text(run_page(result), encoding="utf-8")
    show(browser, path, 1280, "light")
    script = "const one = document.querySelector(arguments[0]).getBoundingClientRect();"
    plot, dots = (
        browser.execute_script(f"{script} return [one.left, one.right, one.width, one.height]", css)
        for css in (".plot", ".plot path.dot")
    )
    assert plot[2] > 600 and plot[3] > 100
    assert plot[0] <= dots[0] and dots[1] <= plot[1]


def test_it_prints_in_ink_on_paper(browser: Any, result: QuantizeResult, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(run_page(result), encoding="utf-8")
    show(browser, path, 1280, "dark")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    back = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert back == "rgb(255, 255, 255)"
