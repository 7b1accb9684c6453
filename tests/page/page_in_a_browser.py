"""The page of `microvlm serve` in Chromium, on a phone's and a desktop's screen; run by `nox -s page`.

AXE names axe-core's axe.min.js, CHROMIUM the browser. With SHOTS, screenshots are written to that folder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, expect, sync_playwright
from served import Server, picture, serving

TOKEN = "a-token-for-the-page-0123"
SCREENS = {"phone": (390, 844), "desktop": (1280, 900)}
WAIT_MS = 120_000
RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--token", TOKEN) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=WAIT_MS)
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=SCREENS)
def screen(request, browser) -> Iterator[BrowserContext]:
    width, height = SCREENS[request.param]
    is_phone = request.param == "phone"
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="light",
        reduced_motion="reduce",
        is_mobile=is_phone,
        has_touch=is_phone,
    )
    # Not a script of the page, whose policy would refuse it.
    context.add_init_script(path=os.environ["AXE"])
    context.set_default_timeout(WAIT_MS)
    context.name = request.param  # type: ignore[attr-defined]
    yield context
    context.close()


@pytest.fixture
def page(screen, server) -> Iterator[Page]:
    page, complaints = screen.new_page(), []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda line: complaints.append(line.text) if is_complaint(line) else None)
    page.goto(f"{server.url}/#token={TOKEN}")
    expect(page.locator("#work")).to_be_visible()
    yield page
    assert complaints == []


@pytest.fixture
def cat(tmp_path) -> Path:
    path = tmp_path / "squares.png"
    path.write_bytes(picture(1, 300))
    return path


def is_complaint(line: ConsoleMessage) -> bool:
    """Whether a line of the console is about the page; a refused request is said on the page itself."""
    return line.type == "error" and "Failed to load resource" not in line.text


def check(page: Page, name: str) -> None:
    """Nothing that axe-core finds, nothing that is wider than the screen; and a screenshot."""
    found = page.evaluate("rules => axe.run(document, rules)", RULES)["violations"]
    assert [f"{each['id']}: {[node['html'] for node in each['nodes']]}" for each in found] == []
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    if folder := os.environ.get("SHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{folder}/{page.context.name}-{name}.png", full_page=True)  # type: ignore[attr-defined]


def ask(page: Page, question: str) -> None:
    """Ask, and wait for the answer."""
    turns = page.locator(".turn .how span").count()
    page.get_by_label("Question", exact=True).fill(question)
    page.keyboard.press("Enter")
    expect(page.locator(".turn .how span").nth(turns)).to_be_visible()


def test_a_picture_is_asked_about_a_fact_told_found_and_forgotten(page, cat):
    check(page, "empty")
    page.locator("#file").set_input_files(cat)
    expect(page.get_by_alt_text("The picture in view")).to_be_visible()
    ask(page, "what is this?")
    first = page.locator(".answer .said").last.inner_text()
    assert first
    expect(page.locator("#turns-title")).to_have_text("Said (2)")
    page.get_by_label("When asked").fill("whose is this?")
    page.get_by_label("Answer", exact=True).fill("zuzana")
    page.keyboard.press("Enter")
    expect(page.locator("#facts li")).to_have_count(1)
    shares = page.locator(".slots i").evaluate_all(
        "all => all.map(each => each.style.getPropertyValue('--full'))"
    )
    assert len(shares) == 64
    assert "100%" in shares
    ask(page, "whose is this?")
    expect(page.locator(".answer .said").last).to_have_text("zuzana")
    expect(page.locator(".answer .how").last).to_contain_text("from the memory")
    expect(page.locator(".answer meter").last).to_be_visible()
    page.get_by_role("button", name="Show what it rests on").first.click()
    expect(page.locator("#map")).to_be_visible()
    assert [text.strip() for text in page.locator("#words button").all_inner_texts()] == first.split()
    check(page, "light")
    page.get_by_role("button", name="Dark theme").click()
    check(page, "dark")
    page.get_by_role("button", name="Forget zuzana").click()
    expect(page.locator("#facts li")).to_have_count(0)
    ask(page, "whose is this?")
    expect(page.locator(".answer .how").last).to_contain_text("from the picture")


def test_the_page_works_with_keys_alone(page, cat):
    page.locator("#file").set_input_files(cat)
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.type("what is this?")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Show what it rests on")).to_be_visible()
    seen = []
    for _ in range(25):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("() => document.activeElement.id || document.activeElement.className"))
    wanted = {
        "ask-button",
        "tell-question",
        "tell-text",
        "tell-button",
        "forget-all",
        "theme",
        "file",
        "away",
    }
    assert wanted <= set(seen), seen


def test_what_is_refused_is_said_and_the_question_stays(page, tmp_path):
    path = tmp_path / "text.png"
    path.write_text("no picture")
    page.locator("#file").set_input_files(path)
    expect(page.get_by_role("alert")).to_have_text("This is not a picture that the browser can show.")
    page.get_by_label("Question", exact=True).fill("what was in the ninth image?")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("no picture was shown as the ninth")
    expect(page.get_by_label("Question", exact=True)).to_have_value("what was in the ninth image?")
    check(page, "refused")


def test_the_token_is_asked_for(screen, server):
    page = screen.new_page()
    page.goto(server.url)
    page.get_by_label("Token", exact=True).fill("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#login")).to_be_visible()
    check(page, "login")
    page.get_by_label("Token", exact=True).fill(TOKEN)
    page.keyboard.press("Enter")
    expect(page.locator("#work")).to_be_visible()
    assert TOKEN not in page.url


def test_a_program_that_is_not_the_pages_does_not_run(screen, server):
    page = screen.new_page()
    page.goto(server.url)
    page.evaluate("""() => {
        const program = document.createElement('script');
        program.textContent = 'window.ran = true';
        document.body.append(program);
    }""")
    assert page.evaluate("() => window.ran") is None
