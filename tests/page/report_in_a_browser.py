"""The page of `microvlm-bench report --html` in Chromium, light and dark, on a phone and a desktop; `nox -s page`.

AXE names axe-core's axe.min.js, CHROMIUM the browser. With SHOTS, screenshots are written to that folder.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from microvlm.bench.page.html_page import html_page

RESULTS = Path(__file__).parent.parent.parent / "docs" / "results"
RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
SCREENS = (("phone", 390), ("desktop", 1280))
WAIT_MS = 120_000


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(html_page([RESULTS]))
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(
    params=[
        ("phone", 390, "dark"),
        ("phone", 390, "light"),
        ("desktop", 1280, "light"),
        ("desktop", 1280, "dark"),
    ]
)
def page(request: pytest.FixtureRequest, browser: Browser, file: Path) -> Iterator[Page]:
    name, width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    # Not a script of the page, whose policy would refuse it.
    context.add_init_script(path=os.environ["AXE"])
    context.set_default_timeout(WAIT_MS)
    page, complaints = context.new_page(), []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda line: complaints.append(line.text))
    page.on("request", lambda asked: complaints.append(asked.url) if asked.url.startswith("http") else None)
    page.goto(file.as_uri())
    if folder := os.environ.get("SHOTS"):
        page.screenshot(path=f"{folder}/report-{name}-{scheme}.png")
    yield page
    context.close()
    assert complaints == []


def test_the_report_is_accessible_and_no_wider_than_its_screen(page: Page) -> None:
    found = page.evaluate(f"axe.run(document, {RULES})")
    assert [(each["id"], each["nodes"][0]["html"]) for each in found["violations"]] == []
    assert found["passes"]
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_maps_are_large_enough_to_look_at_and_charts_to_read(page: Page) -> None:
    maps = page.locator(".maps img")
    assert maps.count() >= 12
    boxes = [maps.nth(number).bounding_box() for number in range(maps.count())]
    assert min(box["width"] for box in boxes) >= 96
    assert all(image.evaluate("image => image.naturalWidth > 0") for image in maps.all())
    # Words of a chart are 11 pixels and more at its full width of 640.
    assert all(chart.bounding_box()["width"] >= 540 for chart in page.locator("figure svg").all())
    numbers = page.locator("details:has(caption)").first
    numbers.locator("summary").focus()
    page.keyboard.press("Enter")
    assert numbers.locator("table").first.is_visible()


def test_a_chart_is_dark_on_a_dark_page_and_light_on_a_light_one(page: Page) -> None:
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    chart = page.locator("figure svg").first
    chart.scroll_into_view_if_needed()
    picture = Image.open(io.BytesIO(chart.screenshot())).convert("L")
    # Its corner is paper.
    assert (picture.getpixel((3, 3)) < 60) == dark


def test_a_wide_table_scrolls_by_keyboard(page: Page) -> None:
    table = page.locator(".scroll").first
    table.evaluate("element => element.style.width = '150px'")
    table.focus()
    page.keyboard.press("ArrowRight")
    # The page's policy lets no text be run as a script, which wait_for_function does.
    for _ in range(200):
        if table.evaluate("element => element.scrollLeft") > 0:
            break
        page.wait_for_timeout(50)
    assert table.evaluate("element => element.scrollLeft") > 0
