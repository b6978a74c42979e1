"""Perplexity and accuracy by hand."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.metrics import accuracy, option_probability, perplexity, truth_ratio
from tests.analysis.metrics.helpers import LN2, near


def test_accuracy_counts_tokens_and_rows():
    """2 of 2 and 1 of 4 tokens: 1 and 1/4 per row, 3/6 of all."""
    result = accuracy([np.array([True, True]), np.array([True, False, False, False])])
    assert result.values.tolist() == [1, 0.25]
    assert result.value == 0.5


def test_perplexity_by_hand():
    """Rows of ln 2 over 1 token and ln 8 over 3: 2 and 8.

    Together exp((ln 2 + 9 ln 2) / 4) = 2^2.5.
    """
    result = perplexity([LN2, 3 * LN2], [1, 3])
    assert result.values == near([2, 8])
    assert result.value == near(2**2.5)


def test_nothing_overflows():
    huge = np.finfo(np.float64).max
    assert perplexity([5000.0], [1]).value == pytest.approx(huge, rel=1e-12)
    assert truth_ratio([5000.0], [[1.0, 2.0]]) == pytest.approx([huge], rel=1e-12)
    assert truth_ratio([1.0], [[5000.0]]) == [0]
    assert option_probability([5000.0], [[5000.0]]) == [0.5]
