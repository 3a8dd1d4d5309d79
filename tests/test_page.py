"""The report's page in a real browser: Chromium without a window, driven through chromedriver.

Debian: `apt-get install chromium chromium-driver`. Skipped, with the reason, where there is none.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_report import FAULT, one_tap, sample_report, several_files, with_nan
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from validation import page
from validation import report as reports

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
PLOTS = ("depth", "frames", "channels", "scatter")
SVG = "{http://www.w3.org/2000/svg}"


def without_semantic(report: dict) -> dict:
    return {**report, "semantic": None}


def not_injected(report: dict) -> dict:
    return {**report, "taps": [{**tap, "injected": None} for tap in report["taps"]]}


def stopped_early(report: dict) -> dict:
    """As --fail-fast leaves it: nothing after the first tap that fails."""
    end = [tap["name"] for tap in report["taps"]].index(FAULT) + 1
    return {**report, "taps": report["taps"][:end], "final": None}


def without_plots(report: dict) -> dict:
    return {**report, "plots": {}}


def short(report: dict) -> dict:
    """Twelve taps around the fault: the browser is slow at walking through all of them."""
    at = [tap["name"] for tap in report["taps"]].index(FAULT)
    return {**report, "taps": report["taps"][at - 6 : at + 6]}


CASES: dict[str, Callable[[], dict]] = {
    "pass": sample_report,
    "fail": lambda: sample_report("fail"),
    "several files": lambda: several_files(sample_report("fail")),
    "one tap": lambda: one_tap(sample_report()),
    "NaN": lambda: with_nan(sample_report("fail")),
    "one NaN tap": lambda: one_tap(with_nan(sample_report("fail"))),
    "no semantic": lambda: without_semantic(sample_report("fail")),
    "not injected": lambda: not_injected(sample_report("fail")),
    "fail fast": lambda: stopped_early(sample_report("fail")),
    "no plots": lambda: without_plots(sample_report()),
}


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no Chromium with chromedriver here (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()


class Browser:
    """One page at a time, from a file, and what the browser logged since it was opened."""

    def __init__(self, chrome: webdriver.Chrome, folder: Path):
        self.chrome, self.folder = chrome, folder
        self.look()

    def look(self, scheme: str = "light", width: int = 1280, media: str = "") -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        emulated = {"media": media, "features": [*features, still]}
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", emulated)
        self.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def open(self, text: str, name: str = "page.html") -> str:
        path = self.folder / name
        path.write_text(text)
        self.chrome.get("about:blank")
        for kind in ("browser", "performance"):
            self.chrome.get_log(kind)  # what was logged before is read away
        self.chrome.get(path.as_uri())
        return path.as_uri()

    def console(self) -> list[str]:
        return [entry["message"] for entry in self.chrome.get_log("browser")]

    def requests(self) -> dict[str, str | None]:
        """Every address that the page made the browser ask for, itself included, but data:; with
        the reason where the browser refused it."""
        found, ids = dict[str, str | None](), {}
        for entry in self.chrome.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            about = message["params"]
            if message["method"] == "Network.requestWillBeSent":
                ids[about["requestId"]] = about["request"]["url"]
                found[about["request"]["url"]] = None
            elif message["method"] == "Network.loadingFailed" and about["requestId"] in ids:
                found[ids[about["requestId"]]] = about.get("blockedReason", about["errorText"])
        return {url: why for url, why in found.items() if not url.startswith("data:")}

    def js(self, program: str, *args: Any) -> Any:
        return self.chrome.execute_script(program, *args)

    def all(self, selector: str) -> list[WebElement]:
        return self.chrome.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.chrome.find_element(By.CSS_SELECTOR, selector)

    def press(self, *keys: str) -> None:
        self.chrome.switch_to.active_element.send_keys(*keys)


@pytest.fixture
def browser(chromium: webdriver.Chrome, tmp_path: Path) -> Browser:
    return Browser(chromium, tmp_path)


# It stands alone


@pytest.mark.parametrize("case", CASES)
def test_it_loads_without_a_request_and_without_an_error(browser: Browser, case: str):
    uri = browser.open(page.html(CASES[case]()))
    assert browser.js("return performance.getEntriesByType('resource').map(e => e.name)") == []
    assert browser.requests() == {uri: None}
    assert browser.console() == []
    assert browser.js("return document.readyState") == "complete"
    assert len(browser.all("#taps tbody tr")) == len(CASES[case]()["taps"])


def test_requests_and_errors_would_be_seen(browser: Browser):
    """The control of the test above: a page that does both."""
    address = "http://127.0.0.1:9/picture.png"
    text = f"<!DOCTYPE html><img src='{address}'><script>console.error('so')</script>"
    browser.open(text)
    assert address in browser.requests()
    assert any("so" in message for message in browser.console())


def test_the_policy_forbids_what_is_added(browser: Browser):
    browser.open(page.html(sample_report()))
    violated = browser.chrome.execute_async_script(
        """
        const done = arguments[0], seen = [];
        document.addEventListener("securitypolicyviolation", event => {
          seen.push(event.effectiveDirective);
          if (seen.length === 3) done(seen.sort());
        });
        const script = document.createElement("script");
        script.textContent = "document.title = 'changed'";
        const image = document.createElement("img");
        image.src = "http://127.0.0.1:9/x.png";
        const style = document.createElement("style");
        style.textContent = "*{color:red}";
        document.body.append(script, image, style);
        """
    )
    assert violated == ["img-src", "script-src-elem", "style-src-elem"]
    assert browser.js("return document.title").startswith("Parity: pass")
    assert browser.requests()["http://127.0.0.1:9/x.png"] == "csp"


def hostile(value: Any, key: str = "") -> Any:
    """Every text of a report made hostile, but those that the page reads itself."""
    if isinstance(value, str) and key not in ("verdict", "kind", "name", "first_diverging", "tap"):
        return f"<script>document.title='x'</script>\"'><img src=x onerror=x>&amp;\x00\x1b{value}"
    if isinstance(value, dict):
        return {k: hostile(v, k) for k, v in value.items()}
    return [hostile(v, key) for v in value] if isinstance(value, list) else value


def test_every_text_is_escaped(browser: Browser):
    browser.open(page.html(hostile(several_files(sample_report("fail")))))
    assert browser.console() == []
    assert browser.js("return document.title").startswith("Parity: fail")
    assert len(browser.all("script")) == 1
    assert browser.all("img") == []
    assert "<img src=x onerror=x>&amp;" in browser.one("pre").text
    root = ET.fromstring(page.svg_depth(hostile(sample_report("fail"))))
    assert root.findall(f".//{SVG}script") == []


# The plots


def test_four_plots_with_their_data(browser: Browser):
    report = sample_report("fail")
    browser.open(page.html(report))
    for name in PLOTS:
        box = browser.one(f"#{name} svg").rect
        assert min(box["width"], box["height"]) > 200, name
    counts = {name: len(report["plots"][name]["relative_l2"]) for name in ("frames", "channels")}
    for name, count in {**counts, "scatter": len(report["plots"]["scatter"]["reference"])}.items():
        path = f"document.querySelector('#{name} path[data-count]')"
        assert browser.js(f"return +{path}.dataset.count") == count
        drawn = browser.js(f"return {path}.getAttribute('d')")
        assert len(re.findall("[ML]", drawn)) == count
        box = browser.js(f"return {path}.getBBox()")
        assert box["width"] > 150, name
        assert box["height"] > 40, name
    assert len(browser.all("#depth a.point circle.free")) == len(report["taps"])
    assert len(browser.all("#depth a.point path.own")) == len(report["taps"])


def test_the_first_plot_shows_the_figures(browser: Browser):
    """A point's height is linear in the logarithm of its error; those past the limit are marked."""
    report = sample_report("fail")
    browser.open(page.html(report))
    program = """return [...document.querySelectorAll("#depth a.point circle.free")].map(
        c => [+c.getAttribute("cy"), c.classList.contains("bad")])"""
    points = browser.js(program)
    errors = np.log10([tap["free"]["relative_l2"] for tap in report["taps"][1:]])
    heights = np.array([y for y, _ in points[1:]])
    slope, offset = np.polyfit(errors, heights, 1)
    assert slope < -10  # upwards is less, in pixels
    assert np.abs(heights - (slope * errors + offset)).max() < 0.1
    assert points[0][0] == max(y for y, _ in points)  # mel, zero, lies on the axis
    assert [bad for _, bad in points] == ["free" in reports.past(tap) for tap in report["taps"]]
    floor = browser.js("return document.querySelector('#depth path.floor').getBBox().height")
    assert floor > 50


def test_the_plots_need_no_script():
    text = page.html(sample_report())
    before = text[: text.index("<script>")]
    assert before.count("<svg ") == before.count("</svg>") == 4
    assert text.count("<script") == 1


def test_what_is_not_finite_is_said_in_the_plots(browser: Browser):
    report = with_nan(sample_report("fail"))
    browser.open(page.html(report))
    lost = sum(tap["free"]["nonfinite"] > 0 for tap in report["taps"])
    top = "+document.querySelector('#depth .hit').getAttribute('y')"
    program = f"""return [...document.querySelectorAll("#depth a.point circle.free")].filter(
        c => +c.getAttribute("cy") === {top}).length"""
    assert browser.js(program) == lost > 0
    assert (
        browser.js("return document.querySelector('#depth').textContent").count("not finite") == 1
    )
    assert "100 not finite" in browser.one("#frames").text
    assert "1,950 values" in browser.one("#scatter").text
    assert browser.js(
        "return document.querySelector('#frames path[data-count]').getAttribute('d')"
    ).count("M") == 2  # the line is broken where nothing is known  # fmt: skip


TEXTS_IN_SVG = """
const found = [];
for (const svg of document.querySelectorAll("svg")) {
  const outer = svg.getBoundingClientRect(), boxes = [];
  for (const text of svg.querySelectorAll("text")) {
    const b = text.getBoundingClientRect();
    if (b.left < outer.left - 1 || b.right > outer.right + 1 || b.top < outer.top - 1 ||
        b.bottom > outer.bottom + 1) found.push("outside: " + text.textContent);
    for (const [o, other] of boxes) {
      const across = Math.min(b.right, o.right) - Math.max(b.left, o.left);
      const down = Math.min(b.bottom, o.bottom) - Math.max(b.top, o.top);
      if (across > 1 && down > 1) found.push(text.textContent + " on " + other);
    }
    boxes.push([b, text.textContent]);
  }
}
return [found, document.querySelectorAll("#depth text").length];
"""


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("case", ["pass", "fail", "NaN", "one tap", "fail fast"])
def test_no_label_lies_on_another(browser: Browser, case: str, width: int):
    browser.look(width=width)
    browser.open(page.html(CASES[case]()))
    wrong, count = browser.js(TEXTS_IN_SVG)
    assert wrong == []
    assert count > len(CASES[case]()["taps"])


def test_a_large_model_has_a_plot_too(browser: Browser):
    """32 layers, 391 taps: the labels of single taps give way, those of the blocks stay."""
    report = sample_report()
    blocks = [tap for tap in report["taps"] if tap["name"].split(".")[:2] == ["blocks", "1"]]
    copies = [
        {**tap, "name": tap["name"].replace("blocks.1", f"blocks.{i}")}
        for i in range(32)
        for tap in blocks
    ]
    report["taps"] = [*report["taps"][:6], *copies, report["taps"][-1]]
    browser.open(page.html(report))
    assert browser.js(TEXTS_IN_SVG)[0] == []
    assert len(browser.all("#depth a.point")) == 6 + 32 * 12 + 1
    assert "blocks.31" in browser.js("return document.querySelector('#depth').textContent")


def test_the_picture_is_an_svg_file_of_its_own(browser: Browser):
    text = page.svg_depth(sample_report("fail"))
    root = ET.fromstring(text)
    assert root.tag == f"{SVG}svg"
    assert len(root.findall(f".//{SVG}circle")) == 55 + 1  # one is the legend's
    assert root.findall(f".//{SVG}a") == []  # a picture leads nowhere
    uri = browser.open(text, "depth.svg")
    assert browser.requests() == {uri: None}
    assert browser.console() == []
    fills = {}
    for scheme in ("light", "dark"):
        browser.look(scheme)
        ground = "document.querySelector('.ground')"
        fills[scheme] = browser.js(f"return getComputedStyle({ground}).fill")
    assert fills["light"] != fills["dark"]


# The table


def column(browser: Browser, title: str, table: str = "taps") -> list[str]:
    """The cells under a heading, top to bottom, of the rows that are shown."""
    program = f"return [...document.querySelectorAll('#{table} thead th')].map(e => e.textContent)"
    heads = browser.js(program)
    program = f"""return [...document.querySelectorAll("#{table} tbody tr")].filter(r => !r.hidden)
        .map(r => r.cells[{heads.index(title)}].textContent)"""
    return browser.js(program)


def head(browser: Browser, title: str) -> WebElement:
    return next(e for e in browser.all("#taps thead button") if e.text.split(" \u2191")[0] == title)


def sorted_by(browser: Browser) -> list[tuple[str, str]]:
    marked = browser.all("#taps thead th[aria-sort]")
    return [(e.text.split(" ")[0], e.get_attribute("aria-sort") or "") for e in marked]


def test_the_table_sorts_by_a_click(browser: Browser):
    report = sample_report("fail")
    browser.open(page.html(report))
    assert sorted_by(browser) == [("#", "ascending")]
    head(browser, "free").click()
    assert sorted_by(browser) == [("free", "descending")]
    values = {tap["name"]: tap["free"]["relative_l2"] for tap in report["taps"]}
    assert column(browser, "tap") == sorted(values, key=values.__getitem__, reverse=True)
    head(browser, "free").click()
    assert sorted_by(browser) == [("free", "ascending")]
    assert column(browser, "tap") == sorted(values, key=values.__getitem__)
    head(browser, "#").click()
    assert column(browser, "tap") == list(values)


@pytest.mark.parametrize("key", [Keys.ENTER, Keys.SPACE], ids=["Enter", "Space"])
def test_the_table_sorts_from_the_keyboard(browser: Browser, key: str):
    report = sample_report()
    browser.open(page.html(report))
    browser.js("document.querySelector('#taps thead button').focus()")
    browser.press(Keys.TAB)
    browser.press(key)
    assert sorted_by(browser) == [("tap", "ascending")]
    names = column(browser, "tap")
    assert names[0] == "blocks.0"
    assert names[-1] == "positional_embedding"
    browser.press(key)
    assert sorted_by(browser) == [("tap", "descending")]
    assert column(browser, "tap") == names[::-1]


def test_not_finite_sorts_as_the_largest_and_absent_as_the_last(browser: Browser):
    browser.open(page.html(with_nan(sample_report("fail"))))
    head(browser, "free").click()
    assert column(browser, "free")[0] == "NaN"
    head(browser, "free").click()
    assert column(browser, "free")[-1] == "NaN"
    for _ in range(2):
        head(browser, "own").click()
        assert column(browser, "own")[-1] == "-"


def test_every_table_sorts(browser: Browser):
    browser.open(page.html(several_files(sample_report("fail"))))
    browser.js("document.querySelectorAll('details').forEach(d => d.open = true)")
    tables = [e.get_attribute("id") for e in browser.all("table")]
    assert tables == [
        *("taps", "measures-free", "measures-injected", "measures-own"),
        *("files", "windows", "tensors"),
    ]
    for name in ("measures-free", "files", "tensors"):
        browser.js(f"document.querySelectorAll('#{name} thead button')[1].click()")
        assert len(browser.all(f"#{name} th[aria-sort]")) == 1
    assert column(browser, "windows", "files") == ["3", "2", "1"]


def test_what_the_details_tell(browser: Browser):
    report = sample_report("fail")
    browser.open(page.html(report))
    shapes = [", ".join(map(str, tensor["shape"])) for tensor in report["inputs"]["tensors"]]
    assert column(browser, "shape", "tensors") == shapes
    assert "384, 384" in shapes
    for kind in ("free", "injected", "own"):
        kept = [tap[kind] for tap in report["taps"] if tap[kind]]
        worst = [", ".join(map(str, m["worst_index"])) for m in kept]
        assert column(browser, "worst at", f"measures-{kind}") == worst
        for title, key in (("mean abs", "mean_abs"), ("p99.9 abs", "p999_abs")):
            shown = column(browser, title, f"measures-{kind}")
            assert shown == [reports.figure(m[key]) for m in kept]
    needed = [reports.figure(tap["minimum_tolerance"]) for tap in report["taps"]]
    assert column(browser, "passes from", "measures-free") == needed


def test_the_filter(browser: Browser):
    report = sample_report("fail")
    browser.open(page.html(report))
    field, shown = browser.one("#filter"), browser.one("#shown")
    assert shown.text == "55 of 55 taps"
    field.send_keys("attn.OUT fail")
    names = [t["name"] for t in report["taps"] if "attn.out" in t["name"] and not t["passed"]]
    assert column(browser, "tap") == names == [FAULT, "blocks.3.attn.out"]
    assert shown.text == "2 of 55 taps"
    field.send_keys(" nothing has this")
    assert shown.text == "0 of 55 taps"
    field.send_keys(Keys.CONTROL + "a")
    field.send_keys(Keys.DELETE)
    assert shown.text == "55 of 55 taps"


def test_points_and_rows_lead_to_each_other(browser: Browser):
    report = sample_report("fail")
    browser.open(page.html(report))
    number = [tap["name"] for tap in report["taps"]].index(FAULT)
    point, row = f"#point-{number}", f"#tap-{number}"
    title = browser.js(f"return document.querySelector('{point} title').textContent")
    assert title == f"{FAULT}: free 3.1e-2, injected 3.1e-2, own 3.1e-2, " + title.split(", ", 3)[3]
    browser.one("#filter").send_keys("conv1")
    browser.js(f"document.querySelector('{point}').focus()")
    assert "on" in str(browser.one(row).get_attribute("class")).split()
    browser.press(Keys.ENTER)
    assert browser.js("return location.hash") == row
    assert browser.one(row).is_displayed()  # the filter that hid it is gone
    plain = browser.one("#tap-3").value_of_css_property("background-color")
    assert browser.one(f"{row} td").value_of_css_property("background-color") != plain
    browser.one(f"{row} a").click()
    assert browser.js("return location.hash") == point
    top = browser.js(f"return document.querySelector('{point}').getBoundingClientRect().top")
    assert -5 <= top <= 900


def test_the_table_tells_the_first_and_the_worst_tap(browser: Browser):
    browser.open(page.html(sample_report("fail")))
    assert browser.one("#taps tr.worst th").text == FAULT
    assert column(browser, "verdict").count("fail, first") == 1
    assert browser.one("h1").text == "Parity: fail"
    assert browser.one(".lead").text.endswith(f"explained to 1e-6 by {FAULT}.bias missing")
    assert browser.one(".lead code").text == f"{FAULT}.bias"


# For everyone

CONTRAST = """
const number = text => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(
  v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4
).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const ratio = (a, b) => {
  const [x, y] = [light(number(a)), light(number(b))];
  return (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
};
const behind = element => {
  for (let e = element; e; e = e.parentElement) {
    const c = number(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] > 0) return getComputedStyle(e).backgroundColor;
  }
};
const fill = selector => getComputedStyle(document.querySelector(selector)).fill;
const texts = [], marks = [];
for (const e of document.querySelectorAll("body *")) {
  const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  if (!own || e.closest("script,style,title") || !e.getClientRects().length) continue;
  const svg = e.closest("svg"), color = getComputedStyle(e)[svg ? "fill" : "color"];
  const grounds = svg ? [behind(e), fill(".panel")] : [behind(e)];
  for (const ground of grounds) texts.push([ratio(color, ground), e.tagName, e.textContent]);
}
const grounds = [getComputedStyle(document.body).backgroundColor, fill(".panel"), fill(".floor")];
for (const [selector, property] of [["circle.free", "fill"], ["path.own", "stroke"],
    ["path.limit", "stroke"], ["path.edge", "stroke"], ["path.curve", "stroke"],
    ["input", "borderTopColor"]]) {
  for (const element of document.querySelectorAll(selector)) {
    const color = getComputedStyle(element)[property];
    for (const ground of grounds) marks.push([ratio(color, ground), selector]);
  }
}
texts.sort((a, b) => a[0] - b[0]), marks.sort((a, b) => a[0] - b[0]);
return [texts.length, texts[0], marks[0], grounds[0]];
"""


def test_both_schemes_can_be_read(browser: Browser):
    """WCAG AA: text 4.5, marks 3, on whatever lies behind them; closed parts opened."""
    backgrounds = set()
    for scheme in ("light", "dark"):
        browser.look(scheme)
        browser.open(page.html(sample_report("fail")))
        browser.js("document.querySelectorAll('details').forEach(d => d.open = true)")
        browser.js("document.getElementById('point-3').focus()")  # a row with the mark behind it
        count, text, mark, ground = browser.js(CONTRAST)
        assert count > 1000
        assert text[0] >= 4.5, (scheme, text)
        assert mark[0] >= 3, (scheme, mark)
        backgrounds.add(ground)
    assert len(backgrounds) == 2


@pytest.mark.parametrize("case", ["several files", "one tap"])
@pytest.mark.parametrize("width", [320, 400, 1280])
def test_the_page_does_not_scroll_sideways(browser: Browser, case: str, width: int):
    browser.look(width=width)
    report = CASES[case]()
    report["command"] += " " + "x" * 300
    report["files"][0]["file"] = report["candidate"] = "npz:" + "y" * 200 + ".npz"
    browser.open(page.html(report))
    browser.js("document.querySelectorAll('details').forEach(d => d.open = true)")
    root = "document.documentElement"
    assert browser.js("return innerWidth") == width
    assert browser.js(f"return {root}.scrollWidth <= {root}.clientWidth")
    if width == 400:  # what is wide scrolls in its own frame
        wide = "document.querySelector('#depth .scroll')"
        assert browser.js(f"return {wide}.scrollWidth > {wide}.clientWidth")


def test_the_tab_key_goes_through_the_page_in_order(browser: Browser):
    browser.open(page.html(short(sample_report("fail"))))
    program = """
    const e = document.activeElement, style = getComputedStyle(e);
    const hit = e.matches(".point") && e.querySelector(".hit");
    const ring = hit ? getComputedStyle(hit).stroke !== "none"
                     : style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1;
    const place = window.last ? !!(window.last.compareDocumentPosition(e) & 4) : true;
    window.last = e;
    const box = e.getBoundingClientRect();
    const seen = box.bottom > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth;
    return [e.id || e.className || e.tagName, ring, place, seen];
    """
    stops = []
    for _ in range(100):
        browser.press(Keys.TAB)
        if browser.js("return document.activeElement === document.body"):
            break
        stops.append(browser.js(program))
        if browser.js("return document.activeElement.download === 'parity.json'"):
            break
    names = [name for name, *_ in stops]
    assert names[0] == "skip"
    assert [n for n in names if n.startswith("point")] == [f"point-{i}" for i in range(12)]
    after = names[names.index("point-11") + 1 :]
    assert after[0] == "filter"
    assert after.count("BUTTON") == 14
    assert after.count("SUMMARY") == 5
    assert browser.js("return document.activeElement.download") == "parity.json"
    for name, ring, in_order, seen in stops:
        assert (name, ring, in_order, seen) == (name, True, True, True)


def test_the_skip_link_skips_the_plot(browser: Browser):
    browser.open(page.html(sample_report()))
    browser.press(Keys.TAB)
    assert browser.js("return document.activeElement.getBoundingClientRect().left") >= 0
    browser.press(Keys.ENTER)
    browser.press(Keys.TAB)
    assert browser.js("return document.activeElement.id") == "filter"


NAMED = {"link", "button", "searchbox", "region", "image", "columnheader"}


@pytest.mark.parametrize("case", ["fail", "several files", "one tap"])
def test_its_structure(browser: Browser, case: str):
    browser.open(page.html(short(CASES[case]()) if case != "one tap" else CASES[case]()))
    assert browser.js("return document.documentElement.lang") == "en"
    assert [len(browser.all(tag)) for tag in ("h1", "header", "main", "footer")] == [1] * 4
    assert browser.js("return document.compatMode") == "CSS1Compat"
    ids = browser.js("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    targets = browser.js(
        "return [...document.querySelectorAll('a[href^=\"#\"]')].map(e => e.getAttribute('href'))"
    )
    assert {t[1:] for t in targets} <= set(ids)
    browser.js("document.querySelectorAll('details').forEach(d => d.open = true)")
    roles, nameless = set(), []
    for node in browser.chrome.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]:
        role, name = (node.get(key, {}).get("value") for key in ("role", "name"))
        roles.add(role)
        if role in NAMED and not name:
            nameless.append(node)
    assert nameless == []
    assert browser.all("svg:not([aria-label])") == []
    assert {"link", "button", "searchbox", "region", "rowheader"} <= roles
    levels = browser.js("return [...document.querySelectorAll('h1,h2,h3')].map(e => +e.tagName[1])")
    assert all(b <= a + 1 for a, b in pairwise(levels))


def test_on_paper_it_is_light_and_without_controls(browser: Browser):
    browser.look("dark", media="print")
    browser.open(page.html(sample_report()))
    colour = browser.one("body").value_of_css_property("background-color")
    assert min(int(v) for v in re.findall(r"\d+", colour)[:3]) > 240
    assert not browser.one("#filter").is_displayed()
    assert browser.one("#taps").is_displayed()


# What it says of itself


@pytest.mark.parametrize("case", ["fail", "NaN"])
def test_the_json_within(browser: Browser, case: str):
    report = CASES[case]()
    browser.open(page.html(report))
    link = browser.one("a[download]")
    assert link.get_attribute("download") == "parity.json"
    kind, _, data = str(link.get_attribute("href")).partition(";base64,")
    assert kind == "data:application/json"
    assert base64.b64decode(data).decode() == reports.dumps(report)


def test_the_provenance(browser: Browser):
    report = several_files(sample_report("fail"))
    browser.open(page.html(report))
    text = browser.one("body").text
    inputs = report["inputs"]
    for value in (inputs["audio"], inputs["mel"], inputs["weights"], inputs["candidate_weights"]):
        assert value in text
    for value in (report["command"], report["commit"], report["cpu"], "max 26.7.0", "yellow"):
        assert value in text
    assert column(browser, "file", "files") == [file["file"] for file in report["files"]]
    assert "The transcript was not compared." not in text
    browser.open(page.html(without_semantic(report)))
    assert "The transcript was not compared." in browser.one("body").text
