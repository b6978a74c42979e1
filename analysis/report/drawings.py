"""Drawings of the page as numbers in pixels: axes, histograms, tables with marks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.report.groups import Group
from analysis.report.reading import DONE
from analysis.report.verdicts import finite, tone
from analysis.report.words import arrow, loss, share, text


@dataclass(frozen=True)
class Axis:
    """A loss axis from `low` to `high` nats.

    It is drawn `width` pixels wide, with `inset` pixels at each end.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    width: float
    inset: float = 6.0

    @classmethod
    def over(cls, values: Iterable[float | None], width: float) -> Axis:
        """An axis from 0 (or lower) over these values, with round ticks."""
        numbers = [value for value in map(finite, values) if value is not None]
        if not numbers:
            return cls(0.0, 1.0, (), width)
        low, high = min([0.0, *numbers]), max([0.0, *numbers])
        span = (high - low) or 1.0
        step = 10.0 ** math.floor(math.log10(span))
        step *= next((part for part in (0.2, 0.5, 1.0, 2.0) if span / (step * part) <= 5), 5.0)
        first, last = math.floor(low / step + 1e-9), math.ceil((low + span) / step - 1e-9)
        ticks = tuple(step * index for index in range(first, last + 1))
        return cls(first * step, last * step, ticks, width)

    def x(self, value: float | None) -> float | None:
        """Where a loss lies, in pixels, or None where it is unknown."""
        value = finite(value)
        if value is None:
            return None
        along = min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))
        return round(self.inset + (self.width - 2 * self.inset) * along, 2)

    @property
    def labels(self) -> list[tuple[float, str]]:
        """Place and text of each tick."""
        return [(self.x(tick) or self.inset, f"{tick:.3g}") for tick in self.ticks]


def histogram(
    values: np.ndarray, axis: Axis, height: float, bins: int = 50
) -> list[tuple[float, float, float]]:
    """Left edge, width and height of the bars in pixels, the tallest `height` high."""
    clipped = np.clip(values, axis.low, axis.high)
    counts, edges = np.histogram(clipped, bins=bins, range=(axis.low, axis.high))
    lefts = [axis.x(float(edge)) or 0.0 for edge in edges]
    tallest = max(1, int(counts.max()))
    bars = zip(lefts, lefts[1:], counts.tolist(), strict=False)
    # A bar of a few rows among thousands must still be seen: none is lower than 0.7 pixels.
    return [
        (left, round(right - left, 2), round(max(0.7, height * count / tallest), 2))
        for left, right, count in bars
        if count
    ]


def distribution(group: Group) -> dict[str, Any]:
    """Histograms on one axis, and a table of quantiles, of the losses of many rows."""
    goals = (finite(row.goal) for row in group.rows)
    series = {
        "before": group.finite_values("before"),
        "now": group.finite_values("after"),
        "goal": np.array([goal for goal in goals if goal is not None]),
    }
    series = {name: values for name, values in series.items() if values.size}
    # One row far out must not squeeze the others together: the last half per cent goes into the
    # last bar.
    axis = Axis.over([float(np.quantile(values, 0.995)) for values in series.values()], 560)
    beyond = sum(int(np.sum(values > axis.high)) for values in series.values())
    drawn = [(name, histogram(values, axis, 26)) for name, values in series.items()]
    levels = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
    table = [
        (name, [loss(float(value)) for value in np.quantile(values, levels)])
        for name, values in series.items()
    ]
    ranks = group.finite_values("rank")
    if group.kind == "remove" and ranks.size:
        table.append(("rank", [share(float(value)) for value in np.quantile(ranks, levels)]))
    return {"axis": axis, "drawn": drawn, "table": table, "beyond": beyond}


def table(group: Group, limit: int) -> dict[str, Any]:
    """The `limit` least forgotten rows, a line each: chart, cells and verdict."""
    shown = sorted(group.rows, key=lambda row: row.order)[:limit]
    axis = Axis.over([part for row in shown for part in (row.before, row.after, row.goal)], 190)
    change, several = group.kind == "change", len({row.action for row in group.rows}) > 1
    ranked = not change and any(row.rank is not None for row in shown)
    recited = any(
        value is not None
        for row in shown
        for value in (row.extraction_before, row.extraction_after)
    )
    lines = []
    for row in shown:
        cells = [loss(row.before), loss(row.after), loss(row.goal)]
        if ranked:
            cells.append(share(row.rank))
        if change:
            cells.append(arrow(loss(row.old_before), loss(row.old_after)))
        if recited:
            cells.append(arrow(share(row.extraction_before), share(row.extraction_after)))
        marks = {"before": axis.x(row.before), "after": axis.x(row.after), "goal": axis.x(row.goal)}
        action = DONE[row.action] if several else ""
        lines.append((text(row.id), action, marks, cells, row.verdict, tone(row.verdict)))
    headers = ["before", "now", "goal"]
    headers += ["rank"] * ranked + ["old content"] * change + ["recital"] * recited
    left = len(group.rows) - len(shown)
    return {"axis": axis, "headers": headers, "lines": lines, "left": left}
