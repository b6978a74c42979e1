from __future__ import annotations

import json
import math

import numpy as np

from analysis.explorer.blocks import axis, column, facts, finite, rounded, table, text


def test_numbers_that_are_not_finite_are_null():
    assert [finite(each) for each in (math.nan, math.inf, None, "3", True, [], {})] == [None] * 7
    assert (finite(np.float32(0.5)), finite(np.int64(3)), finite(2)) == (0.5, 3, 2)
    assert isinstance(finite(np.int64(3)), int)


def test_rounding_keeps_significant_digits():
    values = rounded(np.array([0.000123456789, -123456.789, 0, np.nan]))
    assert values == [0.00012346, -123460.0, 0.0, None]
    json.dumps(values, allow_nan=False)


def test_facts_without_a_value_are_left_out():
    block = facts("About", [("a", "1", "h"), ("b", None, "h"), ("c", "", "h")])
    assert [fact["label"] for fact in block["facts"]] == ["a"]


def test_columns_that_nothing_stands_in_are_left_out():
    columns = [column("id", "id"), column("loss", "number", "nats"), column("note")]
    block = table("Rows", columns, [["a", math.nan, ""], ["b", None, ""]])
    assert [each["label"] for each in block["columns"]] == ["id"]
    assert block["rows"] == [["a"], ["b"]]
    block = table("Rows", columns, [["a", 0.5, ""], ["b", None, ""], ["c", 1, True]])
    assert block["rows"] == [["a", 0.5, ""], ["b", None, ""], ["c", 1, "yes"]]


def test_a_paragraph_and_an_axis():
    assert text("So.", "bad") == {"kind": "text", "text": "So.", "tone": "bad"}
    assert axis("steps", log=True) == {"label": "steps", "unit": "", "log": True}
