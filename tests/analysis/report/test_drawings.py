"""The drawn points, bars and axes lie where the recorded losses are."""

from __future__ import annotations

import math
import random
import re

import numpy as np
import pytest

from analysis.report.drawings import Axis, histogram
from analysis.report.page import report
from tests.analysis.report.helpers import (
    Page,
    html,
    made,
    save,
)


def test_the_drawn_points_lie_at_the_recorded_losses():
    record = made([f"r{i}" for i in range(8)])
    draw = random.Random(0)
    for row in record["rows"]:
        row |= {
            "before": draw.uniform(0, 1),
            "after": draw.uniform(3, 6),
            "target": draw.uniform(3, 6),
        }
    drawn_page = html(record)
    scale = re.findall(
        r'<svg width="190\.?0?" height="13" aria-hidden.*?</svg>', drawn_page, re.DOTALL
    )[0]
    (x0, t0), *_, (x1, t1) = [
        tuple(map(float, tick)) for tick in re.findall(r'<text x="([\d.]+)"[^>]*>([\d.]+)<', scale)
    ]
    lines = re.findall(
        r'<tr><td class="id"><bdi dir="auto">(\w+)</bdi>.*?</tr>', drawn_page, re.DOTALL
    )
    drawn = re.findall(r'aria-label="loss before.*?</svg>', drawn_page, re.DOTALL)
    assert len(lines) == len(drawn) == 8
    ratios = []
    for id, svg in zip(lines, drawn, strict=True):
        row = next(row for row in record["rows"] if row["id"] == id)
        for pattern, key in (
            ('"before" cx', "before"),
            ('"now" cx', "after"),
            ('"goal" x1', "target"),
        ):
            x = float(re.search(pattern + r'="([\d.]+)"', svg)[1])
            assert t0 + (x - x0) * (t1 - t0) / (x1 - x0) == pytest.approx(row[key], abs=0.01)
        ratios.append(row["after"] / row["target"])
    assert sorted(ratios) == ratios  # least forgotten first


def test_ten_thousand_rows_are_a_distribution_and_thirty_lines(tmp_path):
    record = made([f"row-{i:05}-" + "é" * 190 for i in range(10_000)])
    draw = random.Random(0)
    for row in record["rows"]:
        row |= {"before": abs(draw.gauss(0.2, 0.1)), "after": draw.gauss(4.8, 0.5), "target": 4.7}
    record["rows"][77] |= {"after": 0.3, "target": 4.7}
    record["rows"][78] |= {"after": 400.0}
    result = report(save(tmp_path / "edit", record), tmp_path / "page.html")
    html = result.path.read_text(encoding="utf-8")
    assert result.path.stat().st_size < 300_000
    assert html.count('<td class="id">') == 30
    said = " ".join(Page(html).text.split())
    assert "10,000 training rows removed" in said
    assert "9,970 more rows are in edit.json." in said
    assert re.search(r"row-(\d{5})", said)[1] == "00077"  # the least forgotten stands first
    assert "beyond the axis are counted in the last bar" in said
    after = sorted(row["after"] for row in record["rows"])
    values = [float(part) for part in re.search(r"\bnow ((?:[\d.]+ ){7})", said)[1].split()]
    assert values[0] == pytest.approx(after[0], abs=0.006)
    assert values[3] == pytest.approx((after[4999] + after[5000]) / 2, abs=0.006)
    assert values[6] == 400.0


def test_the_bars_hold_every_row_once():
    axis = Axis.over([0.0, 4.0], 560)
    values = np.array([0.0, 0.1, 3.9, 4.0, 9.0, *[2.0] * 5])
    bars = histogram(values, axis, 100)
    tallest = 5
    assert sum(round(height * tallest / 100) for _, _, height in bars) == len(values)
    assert bars[-1][0] + bars[-1][1] == pytest.approx(560 - axis.inset)


@pytest.mark.parametrize(
    "values", [[], [None], [0.0], [0.0, 0.0], [math.nan], [5e-8], [1e299], [-3.0, 2.0], [4.7, 4.7]]
)
def test_any_losses_have_an_axis(values):
    axis = Axis.over(values, 190)
    assert len(axis.ticks) <= 8
    for value in values:
        x = axis.x(value)
        assert x is None or axis.inset <= x <= 190 - axis.inset
    assert all(a < b for (a, _), (b, _) in zip(axis.labels, axis.labels[1:], strict=False))
