"""The served page in a browser: a typed question, the answer, ticks, the rows behind it."""

from __future__ import annotations

import shutil
import threading

import numpy as np
import pytest

import influence
from analysis.serving.server import prepared
from influence.generation import generate

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None
)
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HOSTILE = "<img src=x onerror=\"document.title='run'\"> the red fox"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine")
    with playwright.sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield found
        found.close()


@pytest.fixture
def page(browser, running):
    """The served page, which asks nobody else for anything and fails at nothing."""
    context = browser.new_context(viewport={"width": 1100, "height": 900})
    found, trouble, asked = context.new_page(), [], []
    found.on("pageerror", lambda error: trouble.append(str(error)))
    found.on("console", lambda told: told.type == "error" and trouble.append(told.text))
    found.on("request", lambda request: asked.append(request.url))
    found.goto(running.address)
    found.wait_for_selector("html[data-ready=yes]")
    yield found
    assert trouble == []
    assert [url for url in asked if not url.startswith((running.address, "blob:", "data:"))] == []
    context.close()


def test_a_typed_question_its_answer_and_the_rows_behind_some_of_its_tokens(page, served):
    page.fill("#ask-prompt", "the red fox runs")
    page.click("#ask-go")
    page.wait_for_selector("#ask-tokens [data-k]")
    row = influence.examples_from_rows([{"prompt": "the red fox runs", "completion": " x"}])
    (answer,) = generate(served.run.model, row)
    assert page.text_content("#ask-said") == answer
    tokens = page.locator("#ask-tokens [data-k]")
    count = tokens.count()
    page.click("#ask-none")
    assert page.locator("#ask-explain").is_disabled()
    tokens.nth(0).click()
    tokens.nth(count - 1).focus()
    page.keyboard.press("Space")
    ticked = page.locator("#ask-tokens [aria-checked=true]")
    assert ticked.count() == 2
    assert page.text_content("#ask-explain") == "Explain 2 tokens"
    page.click("#ask-explain")
    page.wait_for_selector("#ask-list [role=option]")

    def mean_loss(log_probs, targets):
        losses = -log_probs[range(len(targets)), targets]
        return (losses[0] + losses[-1]) / 2

    asked = influence.examples_from_rows([{"prompt": "the red fox runs", "completion": answer}])
    scores = served.run.score(asked, measurement=influence.Custom(mean_loss, "two"))
    best = int(np.argmax(scores.values[0]))
    first = page.locator("#ask-list [role=option]").first
    assert served.run.train.ids[best] in first.inner_text()
    page.wait_for_selector("#ask-row .score-line")
    assert "a proponent" in page.text_content("#ask-row")
    first.locator(".tick").click()
    assert page.text_content("#export") == "Export 1 id"


def test_hostile_text_is_inert_and_shown(page):
    title = page.title()
    page.fill("#ask-prompt", HOSTILE)
    page.click("details summary")
    page.fill("#ask-answer", HOSTILE)
    page.click("#ask-go")
    page.wait_for_selector("#ask-tokens [data-k]")
    assert page.text_content("#ask-said") == HOSTILE
    assert page.title() == title
    assert page.locator("#ask img").count() == 0


def test_a_question_that_is_refused_says_why(page):
    page.fill("#ask-prompt", " ")
    page.click("#ask-go")
    page.wait_for_selector("#ask-status.bad")
    assert page.text_content("#ask-status") == "the question is empty: type one"
    page.evaluate("document.getElementById('ask-prompt').removeAttribute('maxlength')")
    page.fill("#ask-prompt", "a" * 8001)
    page.click("#ask-go")
    page.wait_for_function("document.getElementById('ask-status').textContent.includes('8,001')")


def test_the_explorer_reads_from_the_server(page, served):
    first = page.locator("#left [role=option]").first
    assert served.explored.queries.ids[0] in first.inner_text()
    page.wait_for_selector("#right [role=option]")
    page.fill("#search", "zzz nothing")
    page.wait_for_function("document.getElementById('left-count').textContent.startsWith('0 ')")


@pytest.fixture
def stopped(browser, served):
    """A page whose server has ended."""
    serving = prepared(served.explored, lambda: served.run)
    thread = threading.Thread(target=serving.run, daemon=True)
    thread.start()
    found = browser.new_page()
    found.goto(serving.address)
    found.wait_for_selector("html[data-ready=yes]")
    serving.server.should_exit = True
    thread.join(10)
    yield found
    found.close()


def test_a_page_whose_server_has_ended_says_so(stopped):
    stopped.fill("#ask-prompt", "the red fox")
    stopped.click("#ask-go")
    stopped.wait_for_selector("#ask-status.bad")
    assert "is analysis serve still running?" in stopped.text_content("#ask-status")
