"""The page at /, in headless Chromium: it streams, colours what was drafted, and plots the acceptance."""

import os
import re
import shutil
from dataclasses import replace

import pytest

from serve.requests import Request
from tests.serve import servers

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here; on Debian: make browser"),
]
QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync",
         "--disable-component-update"]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=[*QUIET, *root])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page whose errors, and requests that leave the server, fail the test."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(30_000)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: faults.append(request.url) if "//127.0.0.1:" not in request.url else None)
    yield page
    context.close()
    assert faults == []


def ask(page, text: str, **fields: str) -> None:
    for name, value in fields.items():
        page.fill(f"#{name}", value)
    page.fill("#prompt", text)
    page.click("#send")


def test_a_completion(served, page, monkeypatch):
    plain = replace(served.engine.pair, tokenizer=servers.without_template(served.tokenizer))
    monkeypatch.setattr(served.engine, "pair", plain)
    expected = served.engine.submit(Request("def fibonacci(n):", max_new_tokens=90)).result()
    page.goto(served.url)
    page.wait_for_selector("text=tiny, completion")
    ask(page, "def fibonacci(n):", max_tokens="90")
    page.wait_for_selector("#stop:disabled")
    assert page.locator(".asked").inner_text() == "def fibonacci(n):"
    assert page.locator(".answer").text_content() == expected.text
    rounds = expected.acceptance_lengths
    drafted = page.locator(".answer .drafted")
    assert 0.8 * (sum(rounds) - len(rounds)) < drafted.count() <= sum(rounds)
    colours = {
        page.locator(s).first.evaluate("e => getComputedStyle(e).color") for s in (".answer", ".answer .drafted")
    }
    assert len(colours) == 2
    # The plot: a bar a round, as high as its tokens.
    heights = page.locator("#plot rect").evaluate_all("bars => bars.map(bar => Number(bar.getAttribute('height')))")
    assert heights == pytest.approx([95 * length / 6 for length in rounds])
    assert page.locator("#plot polyline").get_attribute("points").count(",") == len(rounds)
    assert page.locator("#acceptance").inner_text() == f"{sum(rounds) / len(rounds):.2f}"
    assert page.locator("#most").inner_text() == "6"
    assert page.locator("#tokens").inner_text() == "90"
    assert float(page.locator("#rate").inner_text()) > 0


def test_a_chat_that_grows_and_can_be_stopped(served, slowly, page):
    page.goto(served.url)
    page.wait_for_selector("text=tiny, chat")
    ask(page, "<b>import os</b>\nimport", max_tokens="30")
    page.wait_for_selector("#stop:disabled")
    ids = served.tokenizer.encode_rendered("<user><b>import os</b>\nimport\n<assistant>")[0].tolist()
    first = served.engine.submit(Request(ids, max_new_tokens=30)).result().text
    assert page.locator(".asked").text_content() == "<b>import os</b>\nimport"  # as text, not as markup
    assert page.locator(".answer").text_content() == first
    before = served.engine.stats.cancelled
    page.fill("#max_tokens", "400")
    page.fill("#prompt", "more")
    page.press("#prompt", "Enter")
    page.wait_for_selector(".turn:nth-of-type(4) span:nth-of-type(4)", state="attached")  # it comes as it is made
    page.click("#stop")
    page.wait_for_selector("#stop:disabled")
    served.wait_idle()
    assert served.engine.stats.cancelled == before + 1
    assert page.locator("#prompt").input_value() == ""


def test_a_key_and_what_is_refused(served, page):
    app = servers.make_app(served.engine, api_key="k")
    with servers.listening(app) as url:
        page.goto(url)
        page.wait_for_selector("text=there is no API key")
        page.fill("#key", "k")
        page.press("#key", "Tab")
        page.wait_for_selector("text=tiny, chat")
        ask(page, "x", temperature="-1")
        message = page.wait_for_selector(".error").inner_text()
        assert re.search("temperature", message)
        ask(page, "x", temperature="0", max_tokens="5")
        page.wait_for_selector(".answer span", state="attached")


def test_the_page_looks_for_nothing_elsewhere(served):
    import httpx

    response = httpx.get(served.url)
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert not re.search(r"(src|href)=[\"']?(https?:)?//|@import", response.text)
