"""The explorer's picture: a page of a run, as a browser shows it.

    analysis report --run run --scores detailed.h5 --out detailed.html     # docs/explorer.md
    python docs/explorer.py detailed.html                                  # draws docs/explorer.png

Needs Chromium (LORA_INFLUENCE_CHROMIUM, or on the path) and Playwright.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

PICTURE = Path(__file__).resolve().parent / "explorer.png"
WIDTH, HEIGHT = 1120, 860
#: A query of the demo that many rows say something about.
QUERY = "p00-birthplace-q"


def draw(page_file: Path, out: Path) -> None:
    """Search the query, and save what is seen from there on."""
    chromium = os.environ.get("LORA_INFLUENCE_CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(page_file.resolve().as_uri())
        page.wait_for_selector("#pair article")
        page.fill("#search", QUERY)
        page.wait_for_timeout(500)
        page.locator("#left .line").first.click()
        page.wait_for_timeout(500)
        page.evaluate("document.getElementById('queries').scrollIntoView()")
        page.evaluate("document.activeElement.blur()")
        page.wait_for_timeout(500)
        page.screenshot(path=out)
        browser.close()


if __name__ == "__main__":
    draw(Path(sys.argv[1]), PICTURE)
