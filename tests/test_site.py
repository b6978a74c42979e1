"""The documentation site: links between its pages, and the pages that are made for it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site():
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs" / "site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("source", "written", "there"),
    [
        ("README.md", "[a](docs/edits.md#measured)", "[a](edits.md#measured)"),
        ("README.md", "[a](benchmarks/README.md)", "[a](benchmarks.md)"),
        ("README.md", "![a](docs/picture.png)", "![a](picture.png)"),
        ("docs/edits.md", "[a](../README.md)", "[a](index.md)"),
        ("docs/edits.md", "[`a` [b]](scores.md)", "[`a` [b]](scores.md)"),
        ("docs/edits.md", "[a](#here)", "[a](#here)"),
        ("docs/tutorials/x.md", "[a](../../LOG.md)", "[a](../log.md)"),
        ("docs/tutorials/x.md", "[a](../edits.md)", "[a](../edits.md)"),
        ("benchmarks/README.md", "[a](../docs/edits.md)", "[a](edits.md)"),
        ("notebooks/README.md", "[a](01_scores.ipynb)", "a"),
        ("README.md", "[a](https://example.org/x.md)", "[a](https://example.org/x.md)"),
        ("README.md", "```\n[a](docs/edits.md)\n```\n", "```\n[a](docs/edits.md)\n```\n"),
    ],
)
def test_links_lead_where_the_page_is_in_the_site(site, source, written, there):
    assert site.relinked(written, source) == there


def test_every_command_is_on_the_page_of_commands(site):
    page = site.commands()
    for command in ("influence fit", "influence top", "unlearn remove", "analysis lds"):
        assert f"## {command}\n" in page
    assert re.search(r"^\| `--queries`.* \| \S", page, re.MULTILINE)


def test_a_help_text_is_no_markup(site):
    assert site.plain("a | b <script> *c* [d]\n e") == r"a \| b \<script\> \*c\* \[d\] e"


@pytest.mark.parametrize("package", ["influence", "unlearn", "analysis"])
def test_the_reference_has_every_name_that_is_handed_on(site, package):
    module = importlib.import_module(package)
    page = site.reference(package)
    for names in module._HOMES.values():
        for name in names:
            assert re.search(
                rf"^::: (?:influence|unlearn|analysis)\.[\w.]+\.{name}$", page, re.MULTILINE
            ), name
