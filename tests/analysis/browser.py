"""Debian's Chromium for tests of pages: where it is, and how it starts without a network."""

from __future__ import annotations

import os
import shutil

import pytest

CHROMIUM = os.environ.get("LORA_INFLUENCE_CHROMIUM") or shutil.which("chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no Chromium: install Debian's chromium, or name one in LORA_INFLUENCE_CHROMIUM",
)
