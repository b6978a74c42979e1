"""Blocks: what the sections of the page are made of, as JSON that the page draws.

A section is `{"title", "blocks": [block, ...]}`. A block has a `kind`:

* `text`: `{"text"}`, a paragraph; `tone` is `good`, `warn`, `bad` or absent.
* `facts`: `{"title", "facts": [{"label", "value", "help"}]}`, values as text with their unit.
* `table`: `{"title", "columns": [column], "rows": [[cell, ...]]}`. A column is `{"label", "unit",
  "help", "type"}`, with type `number`, `percent` (a share, shown times 100), `whole`, `text` or
  `id`. A cell is a number, a text or null.
* `rows`: a table whose rows are training rows, that can be ticked: also `"index"`, the position of
  each in the training set, or -1.
* `answers`: `{"title", "answers": [{"id", "prompt", "said": [[who, text], ...]}]}`.
* `plot`: `{"title", "help", "plot": "scatter" | "bars" | "heatmap", "x": axis, "y": axis, ...}`. An
  axis is `{"label", "unit"}`, with `"log": true` where it is logarithmic. A scatter has
  `series: [{"name", "x", "y", "names", "index"}]`, bars have `names`, `values`, a heat map has
  `columns`, `lines` and `values` [line][column].

Numbers that are not finite are null.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Block = dict[str, Any]


def finite(value: Any) -> float | int | None:
    """A number for JSON: None where it is none, whatever else it is, or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return None
    if isinstance(value, int | np.integer):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None


def rounded(values: np.ndarray, digits: int = 5) -> list[float | None]:
    """Numbers `[k]` for JSON with so many significant digits."""
    return [
        float(f"{value:.{digits - 1}e}") if math.isfinite(value) else None
        for value in np.asarray(values, np.float64).tolist()
    ]


def text(words: str, tone: str = "") -> Block:
    """A paragraph."""
    return {"kind": "text", "text": words, "tone": tone}


def facts(title: str, entries: Iterable[tuple[str, str | None, str]]) -> Block:
    """Facts as (label, value with its unit, help); those without a value are left out."""
    shown = [
        {"label": label, "value": value, "help": help}
        for label, value, help in entries
        if value not in (None, "")
    ]
    return {"kind": "facts", "title": title, "facts": shown}


def column(label: str, type: str = "text", unit: str = "", help: str = "") -> dict[str, str]:
    """A column of a table."""
    return {"label": label, "type": type, "unit": unit, "help": help}


def table(title: str, columns: Sequence[Mapping[str, str]], rows: Iterable[Sequence[Any]]) -> Block:
    """A table; columns in which no row has anything are left out."""
    cells = [[_cell(value) for value in row] for row in rows]
    used = [k for k in range(len(columns)) if any(row[k] not in (None, "") for row in cells)]
    return {
        "kind": "table",
        "title": title,
        "columns": [dict(columns[k]) for k in used],
        "rows": [[row[k] for k in used] for row in cells],
    }


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if value is None or isinstance(value, str) else finite(value)


def axis(label: str, unit: str = "", *, log: bool = False) -> dict[str, Any]:
    """An axis of a plot."""
    return {"label": label, "unit": unit, "log": log}
