"""The explorer's picture: a page of a run, as a browser shows it.

    analysis report --run run --cleaning cleaning --out explorer.html  # the demo's, see explorer.md
    python docs/explorer.py explorer.html                              # draws docs/explorer.png

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
    """Search, choose the first query that is found, and save the page as far as its rows."""
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
        page.evaluate("scrollTo(0, 0)")
        page.wait_for_timeout(500)
        first, last = (page.locator(each).bounding_box() for each in ("#start", "#queries"))
        assert first is not None
        assert last is not None
        height = last["y"] + last["height"] - first["y"]
        clip = {**first, "height": height}
        page.screenshot(path=out, full_page=True, clip=clip)  # pyright: ignore[reportArgumentType]
        browser.close()
    Image.open(out).convert("RGB").quantize(COLOURS).save(out, optimize=True)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), PICTURE)
