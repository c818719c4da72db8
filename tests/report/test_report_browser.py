"""The page in headless Chromium: its curves, its browser of images, and who can use them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attention_transfer.report import group_runs, read_run, write_report
from attention_transfer.report.browser import make_browser

sync_api = pytest.importorskip("playwright.sync_api")

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Playwright's own Chromium, or that of the system."""
    with sync_api.sync_playwright() as playwright:
        program = playwright.chromium.executable_path
        if not os.path.exists(program):
            program = shutil.which("chromium") or shutil.which("google-chrome")
        if program is None:
            pytest.skip("there is no Chromium: python -m playwright install chromium")
        # A container has no sandbox and little shared memory.
        flags = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        yield browser
        browser.close()


class Visit:
    """A page that is open, and what went wrong on it."""

    def __init__(self, chromium: Any, file: Path, width: int = 1280, scheme: str = "light"):
        size = {"width": width, "height": 900}
        self.page = chromium.new_context(viewport=size, color_scheme=scheme).new_page()
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: self.problems.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())
        self.own = file.as_uri()

    def pick(self, name: str, value: int) -> None:
        self.page.locator(f"input[name={name}][value='{value}']").check()

    def source(self, view: str) -> str:
        return self.page.locator(f"#view-{view}").get_attribute("src")

    def check(self) -> None:
        assert self.problems == []
        outside = [url for url in self.requests if not url.startswith(("data:", self.own))]
        assert outside == []


@pytest.fixture(scope="module")
def file(runs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    write_report(runs, out)
    return out


@pytest.fixture(scope="module")
def browser_data(runs) -> dict[str, Any]:
    from attention_transfer.report.teachers import with_teachers

    return make_browser(with_teachers(group_runs(runs))).data


def test_the_pickers_choose_image_network_and_stage(chromium, file, browser_data):
    visit = Visit(chromium, file)
    labels = [network["label"] for network in browser_data["networks"]]
    student, teacher = labels.index("AT+KD"), labels.index("WRN-16-2 teacher")
    # At first the best student and its last stage.
    assert visit.source("map") == browser_data["images"][0]["seen"][student]["stages"][2]["map"]
    visit.pick("image", 3)
    visit.pick("stage", 1)
    maps = browser_data["images"][3]["seen"][student]["stages"][1]
    assert visit.source("map") == visit.source("over") == maps["map"]
    assert visit.source("difference") == maps["difference"]
    visit.pick("network", teacher)
    # The stage at the same resolution stays; a teacher has no difference to itself.
    maps = browser_data["images"][3]["seen"][teacher]["stages"][1]
    assert visit.source("map") == maps["map"]
    assert not visit.page.locator("#view-difference").is_visible()
    rows = visit.page.locator("#view-rows tr").all_inner_texts()
    assert len(rows) == len(labels)
    for row, seen in zip(rows, browser_data["images"][3]["seen"], strict=True):
        assert seen["answer"] in row
        assert ("wrong" in row) == (not seen["correct"])
        assert f"{100 * seen['stages'][1]['inside']:.1f} %" in row
    visit.check()


def test_the_box_lies_over_the_object(chromium, file, browser_data):
    visit = Visit(chromium, file)
    left, top, width, height = browser_data["images"][0]["box"]
    view = visit.page.locator("#view-image").bounding_box()
    box = visit.page.locator("#view-image + .box").bounding_box()
    assert box["x"] == pytest.approx(view["x"] + left / 100 * view["width"], abs=1)
    assert box["y"] == pytest.approx(view["y"] + top / 100 * view["height"], abs=1)
    assert box["width"] == pytest.approx(width / 100 * view["width"], abs=1)
    assert box["height"] == pytest.approx(height / 100 * view["height"], abs=1)


def test_the_pickers_work_by_keyboard(chromium, file):
    visit = Visit(chromium, file)
    before = visit.source("map"), visit.source("image")
    visit.page.locator("input[name=image]:checked").focus()
    visit.page.keyboard.press("ArrowRight")
    assert visit.page.locator("input[name=image]:checked").get_attribute("value") == "1"
    assert visit.source("map") != before[0] and visit.source("image") != before[1]
    assert visit.page.locator("#view-status").inner_text().startswith("image 2, ")
    visit.check()


def test_the_pointer_and_the_slider_show_values(chromium, file, runs):
    visit = Visit(chromium, file)
    plot = visit.page.locator("#chart-error .plot")
    plot.scroll_into_view_if_needed()
    area = plot.bounding_box()
    visit.page.mouse.move(area["x"] + 0.4 * area["width"], area["y"] + 0.5 * area["height"])
    tip = visit.page.locator("#chart-error .tip")
    assert tip.is_visible()
    assert "AT+KD" in tip.inner_text()
    visit.page.mouse.move(area["x"], area["y"] - 60)
    assert not tip.is_visible()
    slider = visit.page.locator("#chart-error-epoch")
    slider.focus()
    visit.page.keyboard.press("Home")
    errors = [
        100 * (1 - run.metrics[0]["val_accuracy"]) for run in runs if "at+kd" in str(run.folder)
    ]
    expected = f"AT+KD {np.mean(errors):.3g}"
    assert expected in slider.get_attribute("aria-valuetext")
    assert expected.replace(" ", "") in tip.inner_text().replace("\n", "").replace(" ", "")
    visit.check()


def test_a_row_is_switched_off_in_all_curves(chromium, file):
    visit = Visit(chromium, file)
    labels = visit.page.locator("#legend label").all_inner_texts()
    row = [label.strip() for label in labels].index("KD")
    marks = visit.page.locator(f"#curves ~ figure [data-row='{row}']")
    assert marks.count() >= 4
    visit.page.locator(f"#legend input[value='{row}']").uncheck()
    assert not any(marks.nth(i).is_visible() for i in range(marks.count()))
    visit.page.locator("#chart-error-epoch").focus()
    rows = visit.page.locator("#chart-error .tip span:not([data-key])").all_inner_texts()
    assert "KD" not in rows and "AT+KD" in rows
    visit.page.locator(f"#legend input[value='{row}']").check()
    assert marks.first.is_visible()
    visit.check()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_everybody_can_read_the_page(chromium, file, width, scheme):
    """Nothing is wider than a phone, and axe finds no fault, with all details open."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    visit = Visit(chromium, file, width, scheme)
    visit.page.evaluate("document.querySelectorAll('details').forEach((each) => each.open = true)")
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    faults = axe.run(visit.page).response["violations"]
    assert [f"{fault['id']}: {fault['help']}" for fault in faults] == []
    visit.check()


def test_hostile_names_stay_text(chromium, tmp_path, make_run):
    classes = [HOSTILE, "</script><script>alert(2)</script>"]
    folders = [
        make_run(tmp_path, "x", method, 0, error, classes=classes, recipe=HOSTILE)
        for method, error in (("none", 60), ("at", 30))
    ]
    out = tmp_path / "r.html"
    write_report([read_run(folder) for folder in folders], out, title=HOSTILE)
    visit = Visit(chromium, out)
    for image in range(4):
        visit.pick("image", image)
    assert HOSTILE in visit.page.locator("h1").inner_text()
    assert visit.page.locator("img[onerror]").count() == 0
    visit.check()


def test_the_page_forbids_what_it_does_not_need(chromium, file):
    visit = Visit(chromium, file)
    visit.page.evaluate(
        "document.body.append(Object.assign(new Image(), {src: 'https://example.com/x.png'}))"
    )
    visit.page.wait_for_timeout(100)
    assert any("Content Security Policy" in problem for problem in visit.problems)
