"""A browser for the tests of pages, one for each file."""

from __future__ import annotations

import pytest

from tests.analysis.browser import ARGUMENTS, CHROMIUM


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield found
        found.close()
