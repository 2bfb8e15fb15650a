"""The web page in a browser: what people do on it, at desktop and phone width, light and dark.

SCREENSHOTS=DIR keeps pictures of it.
"""

import os
import shutil
from pathlib import Path

import pytest

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, url):
    """Opens the page as a new user, who must see no error and load from no other host."""
    contexts, hosts, errors = [], set(), []

    def open_page(width=1100, height=900, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        page.wait_for_selector("#message textarea")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert hosts == {url.split("/")[2]} and not errors


def picture(page, name):
    if directory := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(directory) / f"{name}.png", full_page=True)


def set_length(page, length, block):
    if not page.is_visible("text=Answer length"):
        page.click("text=Settings")
    page.get_by_label("Answer length").fill(str(length))
    page.get_by_label("Block length").fill(str(block))
    page.get_by_label("Ends last").check()  # of a random model the end of text is soon the surest
    page.keyboard.press("Tab")


def send(page, text):
    page.fill("#message textarea", text)
    page.get_by_role("button", name="Send").click()


@pytest.mark.parametrize("width, scheme", [(1100, "light"), (390, "dark")])
def test_type_send_watch_and_replay(opened, width, scheme):
    page = opened(width, 850, scheme)
    set_length(page, 64, 64)
    send(page, "the quick fox")
    page.wait_for_selector("#dialogue .m")
    picture(page, f"{scheme}_begins")
    slider = page.wait_for_selector("#dialogue .replay input")
    assert page.locator("#dialogue .m").count() == 0
    slider.evaluate("slider => { slider.value = 20; slider.oninput() }")
    assert page.locator("#dialogue .m").count() > 0
    assert page.locator("#dialogue output").inner_text() == "pass 20 of 64"
    picture(page, f"{scheme}_replayed")
    page.get_by_role("button", name="Play").click()
    page.wait_for_function("document.querySelector('#dialogue output').textContent == 'pass 64 of 64'")
    assert page.locator("#dialogue .m").count() == 0
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0  # nothing sticks out to the side


def test_masks_are_filled(opened):
    page = opened()
    page.get_by_role("tab", name="Fill masks").click()
    page.fill("#text textarea", "the [MASK*4] fox ${1+1} {{x}}")
    page.get_by_role("button", name="Fill").click()
    page.wait_for_selector("#filled .replay")
    assert page.locator("#filled .answer").inner_text().endswith(" fox ${1+1} {{x}}")
    picture(page, "filled")


def test_stop_keeps_the_page_alive(opened):
    page = opened()
    set_length(page, 256, 256)
    send(page, "fox")
    page.wait_for_selector("#dialogue .m")
    page.get_by_role("button", name="Stop").first.click()
    page.wait_for_selector("text=stopped; the dialogue goes on without this message")
    assert page.input_value("#message textarea") == "fox"
    set_length(page, 8, 8)
    send(page, "quick")
    page.wait_for_selector("text=8 tokens, 8 passes")


def test_mistakes_are_said_on_the_page(opened):
    page = opened()
    set_length(page, 8, 3)
    send(page, "fox")
    page.wait_for_selector("text=block_length 3 does not divide gen_length 8")
    set_length(page, 8, 8)
    send(page, "x" * 1020)
    page.wait_for_selector("text=exceed the model's context of 1024 tokens")
    picture(page, "mistake")


def test_two_users_wait_for_each_other(opened):
    one, two = opened(), opened()
    set_length(one, 256, 256)
    set_length(two, 8, 8)
    send(one, "fox")
    one.wait_for_selector("#dialogue .m")
    send(two, "quick")
    two.wait_for_selector("text=waiting: 1 before you")
    two.wait_for_selector("text=8 tokens, 8 passes")
    assert one.locator("text=256 tokens, 256 passes").count() == 1
    assert two.locator("text=fox").count() == 0
