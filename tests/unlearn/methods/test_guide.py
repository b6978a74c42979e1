"""The guide to a learning rate: its figures, and that text, table and page say the same."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from unlearn.methods.guide import RULE, guide_text, measured_rates, rates
from unlearn.methods.methods import METHODS

PAGE = Path(__file__).resolve().parents[3] / "docs" / "choosing-a-rate.md"


def test_the_guide_has_a_figure_for_every_method_and_rate():
    assert set(measured_rates()["methods"]) == set(METHODS)
    table, factors = rates(), measured_rates()["factors"]
    assert factors == [1 / 3, 1.0, 3.0]
    assert len(table) == 3 * len(METHODS)
    strides = np.array([entry["stride"] for entry in table]).reshape(-1, 3)
    np.testing.assert_allclose(strides / strides[:, 1:2], np.tile(factors, (len(METHODS), 1)))
    text = guide_text()
    assert all(f"\n{name} " in text for name in METHODS)
    assert max(map(len, text.splitlines())) <= 130


def test_every_figure_names_the_program_and_the_day_that_measured_it():
    measured = measured_rates()
    assert (PAGE.parents[1] / measured["program"].split()[0]).is_file()
    log = (PAGE.parents[1] / "LOG.md").read_text(encoding="utf-8")
    assert f"## {measured['date']} " in log


def test_the_entries_are_sound():
    for entry in rates():
        assert set(entry) == {"method", "stride", "steps", "reached", "forget", "retained"}
        assert 1 <= entry["steps"] <= 60
        goal = measured_rates()["goal"]
        at_goal = entry["forget"] >= 0.97 * goal
        assert entry["reached"] == at_goal, entry


def test_the_page_has_the_figures_that_the_command_prints():
    """docs/choosing-a-rate.md: a row for each method, with the cells of the printed table."""
    printed = {}
    for line in guide_text().splitlines():
        cells = re.split(r"\s{2,}", line.strip())
        if len(cells) == 5 and cells[0] in METHODS:
            printed[cells[0]] = cells[1:]
    assert set(printed) == set(METHODS)
    rows = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if cells[0].strip("`") in METHODS:
            rows[cells[0].strip("`")] = cells[1:]
    assert rows == printed


def test_the_page_has_the_rule_that_the_command_prints():
    title, *paragraphs = RULE.split("\n\n")
    assert title == "How to choose a learning rate"
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert all(" ".join(paragraph.split()) in page for paragraph in paragraphs)
