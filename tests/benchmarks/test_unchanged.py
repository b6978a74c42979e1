"""What a record of results compares, and what it leaves out."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import unchanged  # pyright: ignore[reportMissingImports]


def test_the_last_bit_of_a_number_or_an_array_is_a_difference():
    numbers = {"scores": [1.0, 0.1]}
    before = unchanged.said(numbers | {"seconds": 3.0}, Path("/here"))
    after = unchanged.said({"scores": [1.0, np.nextafter(0.1, 1)], "seconds": 9.0}, Path("/here"))
    (line,) = unchanged.differences(before, after)
    assert line.startswith("/scores[1]: 0x1.999999999999ap-4 there")
    array = np.array([1.0, 2.0], np.float32)
    assert unchanged.array(array) == unchanged.array(array.copy())
    assert unchanged.array(array) != unchanged.array(array.astype(np.float64))
    array[1] = np.nextafter(array[1], np.float32(3))
    assert unchanged.array(array) != unchanged.array(np.array([1.0, 2.0], np.float32))


def test_times_and_places_are_none_and_missing_things_are():
    record = unchanged.said({"path": "/here/run", "text": "/here/run: done", "n": 1}, Path("/here"))
    assert record == {"text": "WORK/run: done", "n": 1}
    assert unchanged.differences({"a": 1}, {}) != []
    assert unchanged.differences({}, {"a": 1}) != []
    assert unchanged.differences([1, 2], [1]) != []
    assert unchanged.count({"a": [1, 2], "b": 3}) == 3
