"""Rows that a click in a list or a figure shows, in Debian's Chromium."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.explorer.data import gather
from analysis.explorer.page import TEMPLATES, write
from influence.store import write_file
from tests.analysis.browser import needs_chromium
from tests.analysis.explorer.conftest import write_csv
from tests.analysis.explorer.helpers import rows_of, write_run, write_scores
from tests.analysis.explorer.test_browser import draw_everything, opened, until

pytestmark = needs_chromium


def click_first_point(page, selector: str) -> None:
    """A click in the middle of the first point of a figure."""
    box = page.locator(f"{selector} .points path").first.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)


@pytest.mark.parametrize("scored", [False, True])
def test_an_entry_of_the_cleaning_list_is_shown_in_full(browser, tmp_path, scored):
    """Its evidence, its text, and the row to compare it with, whether or not there are scores."""
    write_run(tmp_path / "run", rows_of(4))
    if scored:
        write_scores(tmp_path / "run", np.ones((1, 4)), rows_of(1, "query"))
    evidence = "a <b>long</b> reason " * 30
    entries = [["row-2", "label", 0.5, evidence, "row-1"], ["gone", "label", 0.4, "left", ""]]
    columns = ["id", "reason", "score", "evidence", "other"]
    listed = write_csv(tmp_path / "rows.csv", columns, entries)
    write(gather(tmp_path / "run", cleaning=listed), tmp_path / "page.html")
    with opened(browser, tmp_path / "page.html") as page:
        page.locator("#cleaning").scroll_into_view_if_needed()
        page.wait_for_selector("#cleaning-list .line")
        page.locator("#cleaning-list .line").first.click()
        page.wait_for_selector("#cleaning-row article")
        assert evidence.strip() in page.inner_text("#cleaning-row .score-line")
        cards = page.locator("#cleaning-row article")
        assert cards.locator("h4").all_inner_texts() == [
            "Training row row-2",
            "To compare with: row-1",
        ]
        assert "What is number 2 of the rows?" in cards.nth(0).inner_text()
        assert "What is number 1 of the rows?" in cards.nth(1).inner_text()
        assert page.locator("#cleaning-row b").count() == 0
        assert page.locator("#cleaning-row button").count() == scored
        if scored:
            page.click("#cleaning-row button")
            until(page, "location.hash === '#q=0&r=2'")
        page.locator("#cleaning-list .line").nth(1).click()
        until(page, "document.querySelectorAll('#cleaning-row article').length === 0")
        assert page.inner_text("#cleaning-row") == "label: left"


def test_a_point_of_the_map_shows_its_row_without_scores(browser, tmp_path):
    manifest = write_run(tmp_path / "run", rows_of(3))
    own = np.array([1.0, 3.0, 2.0], np.float32)
    attributes = {"run_digest": manifest.digest, "complete": True}
    write_file(tmp_path / "run" / "scores.h5", {"self_influence": own}, attrs=attributes)
    write(gather(tmp_path / "run"), tmp_path / "page.html")
    with opened(browser, tmp_path / "page.html") as page:
        draw_everything(page)
        click_first_point(page, "#map")
        until(page, "document.querySelector('#map article h4') !== null")
        shown = page.inner_text("#map article h4")
        assert shown == "Training row row-0"


def test_more_scores_than_a_call_takes_arguments(browser):
    page = browser.new_page()
    page.set_content("<p id=tip></p>")
    page.add_script_tag(content=(TEMPLATES / "parts.js").read_text(encoding="utf-8"))
    assert page.evaluate("largestOf([])") == 1e-300
    assert page.evaluate("largestOf([1, -2, 0.5])") == 2
    assert page.evaluate("largestOf(new Array(1_000_000).fill(-3))") == 3
    for script in TEMPLATES.glob("*.js"):
        assert "Math.max(..." not in script.read_text(encoding="utf-8")
    page.close()
