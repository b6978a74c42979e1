"""Extraction strength and exact memorization by hand and by their definition."""

from __future__ import annotations

import itertools

import numpy as np

from analysis.metrics import exact_memorization, extraction_strength
from tests.analysis.metrics.helpers import near


def test_extraction_by_hand():
    """Of 4 tokens, the last wrong one is at place: none -> 1.

    First -> 3/4. Third -> 1/4. Last -> 0.
    """
    rows = [
        [True] * 4,
        [False, True, True, True],
        [False, True, False, True],
        [True, True, True, False],
        [False],
    ]
    rows = [np.array(row) for row in rows]
    assert extraction_strength(rows).tolist() == [1, 0.75, 0.25, 0, 0]
    assert exact_memorization(rows).tolist() == [1, 0.75, 0.5, 0.75, 0]


def test_extraction_equals_the_definition():
    """The least k for which everything from token k on is right, by trying every k."""
    for length in range(1, 7):
        rows = [np.array(row) for row in itertools.product([False, True], repeat=length)]
        least = [min(k for k in range(length + 1) if row[k:].all()) for row in rows]
        assert extraction_strength(rows) == near([1 - k / length for k in least])
        assert (extraction_strength(rows) <= exact_memorization(rows) + 1e-14).all()
