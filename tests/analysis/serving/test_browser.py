"""The served page in a browser: a typed question, the answer, ticks, the rows behind it."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import influence
from analysis.explorer.data import gather
from analysis.serving.server import prepared
from influence.generation import generate
from tests.analysis.browser import needs_chromium
from tests.analysis.explorer.helpers import hostile_rows, write_run, write_scores

pytestmark = [needs_chromium, pytest.mark.slow]
HOSTILE = "<img src=x onerror=\"document.title='run'\"> the red fox"


@pytest.fixture
def page(browser, running):
    """The served page, which asks nobody else for anything and fails at nothing."""
    context = browser.new_context(viewport={"width": 1100, "height": 900})
    context.set_default_timeout(120_000)  # milliseconds: other tests share the machine
    found, trouble, asked = context.new_page(), [], []
    found.on("pageerror", lambda error: trouble.append(str(error)))
    found.on(
        "console",
        lambda told: (
            told.type == "error" and "status of 4" not in told.text and trouble.append(told.text)
        ),
    )
    found.on("request", lambda request: asked.append(request.url))
    found.goto(running.address)
    found.wait_for_selector("html[data-ready=yes]")
    yield found
    assert trouble == []
    assert [url for url in asked if not url.startswith((running.address, "blob:", "data:"))] == []
    context.close()


def ask(page, question: str, answer: str = "") -> None:
    page.fill("#ask-prompt", question)
    if answer:
        page.click("#ask details summary")
        page.fill("#ask-answer", answer)
    page.click("#ask-go")
    page.wait_for_selector("#ask-tokens [data-k]")


def test_a_typed_question_is_answered_by_the_adapter(page, served):
    ask(page, "the red fox runs")
    row = influence.examples_from_rows([{"prompt": "the red fox runs", "completion": " x"}])
    assert page.text_content("#ask-said") == generate(served.run.model, row)[0]
    assert page.text_content("#ask h3") == "The adapter answers"
    page.click("#ask-explain")
    page.wait_for_selector("#ask-row .score-line")
    assert (
        page.locator("#ask-list").get_attribute("aria-label") == "Training rows behind the answer"
    )


def test_ticked_tokens_alone_are_explained(page, served):
    ask(page, "the red fox runs", " sleep in warm sun")
    tokens = page.locator("#ask-tokens [data-k]")
    assert tokens.count() == 5
    page.click("#ask-none")
    assert page.locator("#ask-explain").is_disabled()
    tokens.nth(0).click()
    tokens.nth(3).focus()
    page.keyboard.press("Space")
    assert page.locator("#ask-tokens [aria-checked=true]").count() == 2
    assert page.text_content("#ask-explain") == "Explain 2 tokens"
    assert page.locator("#ask-explain").is_enabled()
    page.click("#ask-explain")
    page.wait_for_selector("#ask-row .score-line")

    def mean_loss(log_probs, targets):
        return -(log_probs[0, targets[0]] + log_probs[3, targets[3]]) / 2

    row = {"prompt": "the red fox runs", "completion": " sleep in warm sun"}
    asked = influence.examples_from_rows([row])
    scores = served.run.score(asked, measurement=influence.Custom(mean_loss, "two")).values[0]
    best = int(np.argmax(scores))
    first = page.locator("#ask-list [role=option]").first
    assert served.run.train.ids[best] in first.inner_text()
    told = first.locator(".score").get_attribute("data-tip").split(" ")[0]
    assert float(told) == pytest.approx(float(scores[best]), rel=1e-3)
    assert "a proponent" in page.text_content("#ask-row")
    assert "null" not in page.text_content("#ask")
    first.locator(".tick").click()
    assert page.text_content("#export") == "Export 1 id"
    worst = served.run.train.ids[int(np.argmin(scores))]
    page.select_option("#ask-rows select", "opponents first")
    page.locator("#ask-list [role=option]", has_text=worst).first.click()
    page.locator("#ask-row h4", has_text=worst).wait_for()
    page.click("#ask-none")
    page.locator("#ask-list [role=option]").nth(1).click()
    assert page.locator("#ask-explain").is_disabled()  # whatever else was looked at meanwhile
    page.click("text=All tokens")
    page.click("#ask-explain")
    page.locator("#ask-rows h3", has_text="the whole answer").wait_for()
    assert page.locator("#ask-list").count() == 1


def test_hostile_text_is_inert_and_shown(page):
    title = page.title()
    ask(page, HOSTILE, HOSTILE)
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
    page.locator("#ask-status", has_text="8,001 characters").wait_for()


def test_a_question_of_ones_own_is_a_way_in_beside_the_queries(page):
    """It is below the queries that are there, which are in sight at once."""
    assert page.locator(".ways a").all_inner_texts()[:2] == [
        "Why did it say this?",
        "Ask the adapter",
    ]
    assert page.evaluate("document.querySelector('#queries + section').id") == "ask"
    assert page.locator("#right .line").first.bounding_box()["y"] < 900
    page.click(".ways a[href='#ask']")
    page.wait_for_timeout(300)
    assert page.locator("#ask-prompt").bounding_box()["y"] < 900


def test_the_explorer_reads_from_the_server(page, served):
    first = page.locator("#left [role=option]").first
    assert served.explored.queries.ids[0] in first.inner_text()
    page.wait_for_selector("#right [role=option]")
    page.fill("#search", "zzz nothing")
    page.locator("#left-count", has_text="0 queries").wait_for()


def started(explored, open_run):
    """A server of its own, in a thread."""
    serving = prepared(explored, open_run)
    thread = threading.Thread(target=serving.run, daemon=True)
    thread.start()
    return serving, thread


def ended(serving, thread) -> None:
    serving.server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


def test_hostile_rows_and_queries_are_inert(browser, tmp_path):
    """Their text is read over HTTP, and shown as text."""
    rows = hostile_rows()
    write_run(tmp_path / "run", rows)
    write_scores(tmp_path / "run", np.ones((len(rows), len(rows))), rows)
    serving, thread = started(gather(tmp_path / "run"), lambda: None)
    found, asked = browser.new_page(), []
    found.on("request", lambda request: asked.append(request.url))
    found.goto(serving.address)
    found.wait_for_selector("html[data-ready=yes]")
    found.locator("#pair .card").first.wait_for()
    assert "owned" not in found.title()
    assert found.locator("main img, main iframe, main script").count() == 0
    assert "<script>" in found.locator("#left").inner_text()
    assert [url for url in asked if not url.startswith(serving.address)] == []
    found.close()
    ended(serving, thread)


def test_a_page_whose_server_has_ended_says_so(browser, served):
    serving, thread = started(served.explored, lambda: served.run)
    found = browser.new_page()
    found.goto(serving.address)
    found.wait_for_selector("html[data-ready=yes]")
    ended(serving, thread)
    found.fill("#ask-prompt", "the red fox")
    found.click("#ask-go")
    found.wait_for_selector("#ask-status.bad")
    assert "is analysis serve still running?" in found.text_content("#ask-status")
    assert not found.locator("#trouble").is_visible()
    found.locator("#left [role=option]").nth(1).click()
    found.locator("#trouble", has_text="is analysis serve still running?").wait_for()
    found.click("#trouble")
    assert not found.locator("#trouble").is_visible()
    found.close()
