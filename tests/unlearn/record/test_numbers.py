"""Numbers that may not be known."""

from __future__ import annotations

import math

import numpy as np

from unlearn.record.numbers import mean_or_none, number_or_none, sum_or_none


def test_nan_is_none_and_infinity_is_a_number():
    assert number_or_none(math.nan) is None
    assert number_or_none(0.0) == 0.0
    assert number_or_none(-math.inf) == -math.inf


def test_a_mean_needs_values_that_are_all_known():
    assert mean_or_none(np.array([1.0, 2.0])) == 1.5
    assert mean_or_none(np.array([1.0, math.nan])) is None
    assert mean_or_none(np.zeros(0)) is None


def test_a_sum_needs_both():
    assert sum_or_none(1.0, -0.25) == 0.75
    assert sum_or_none(None, 1.0) is sum_or_none(1.0, None) is None
