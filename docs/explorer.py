"""The explorer's picture: a page of a run, as a browser shows it.

    analysis report --run run --out explorer.html     # the demo's run, as docs/explorer.md has it
    python docs/explorer.py explorer.html             # draws docs/explorer.png

Needs Chromium (LORA_INFLUENCE_CHROMIUM, or on the path) and Playwright.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

PICTURE = Path(__file__).resolve().parent / "explorer.png"
WIDTH, HEIGHT = 1080, 1400
#: Colours of the picture: more make it larger, and no better.
COLOURS = 128
#: What is searched: queries of the demo that many rows say something about.
SEARCHED = "birthplace"


def draw(page_file: Path, out: Path) -> None:
    """Search, choose the first query that is found, and save the section."""
    chromium = os.environ.get("LORA_INFLUENCE_CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(page_file.resolve().as_uri())
        page.wait_for_selector("#pair article")
        page.fill("#search", SEARCHED)
        page.wait_for_timeout(500)
        page.locator("#left .line").first.click()
        page.wait_for_timeout(500)
        page.evaluate("document.activeElement.blur()")
        page.evaluate("document.querySelector('header').style.position = 'static'")
        page.wait_for_timeout(500)
        page.locator("#queries").screenshot(path=out)
        browser.close()
    Image.open(out).convert("RGB").quantize(COLOURS).save(out, optimize=True)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), PICTURE)
