"""Outliers of made cosines, and the modified z-score by hand."""

from __future__ import annotations

import numpy as np

from analysis.cleaning.outliers import NEIGHBOURS, modified_z, outliers
from analysis.cleaning.texts import Nearest, nearest, vectors


def test_the_modified_z_score_by_hand():
    values = np.array([1.0, 2, 3, 4, 100])
    assert np.allclose(modified_z(values), 0.6745 * (values - 3) / 1)
    assert modified_z(np.ones(4)).tolist() == [0, 0, 0, 0]
    mostly = modified_z(np.array([1.0] * 9 + [2.0]))
    assert mostly[-1] > 3.5
    assert (mostly[:-1] == 0).all()


def test_a_row_like_no_other_is_listed():
    lines = [f"Q: where was person number {word} born, and when?" for word in "abcdefghijkl"]
    found = outliers(nearest(vectors([*lines, "zzk qwo plim gnar fip"]), NEIGHBOURS))
    assert [each.row for each in found.findings] == [12]
    assert found.scores.argmax() == 12
    assert found.findings[0].suggested == ""


def test_the_score_is_the_distance_to_the_nearest():
    cosines = np.tile([0.9, 0.8, 0.7, 0.6, 0.5], (8, 1))
    cosines[3] = 0.1
    found = outliers(Nearest(np.zeros((8, 5), int), cosines))
    assert np.allclose(found.scores, [0.3, 0.3, 0.3, 0.9, 0.3, 0.3, 0.3, 0.3])
    assert [each.row for each in found.findings] == [3]


def test_cosines_that_reach_down_to_zero():
    """By the cosines themselves row 0 lies within the bulk, by their logarithms far outside."""
    cosines = np.tile(np.array([0.01, *np.linspace(0.18, 0.5, 20)])[:, None], (1, 5))
    assert modified_z(-cosines[:, 0])[0] < 3
    found = outliers(Nearest(np.zeros((21, 5), int), cosines))
    assert [each.row for each in found.findings] == [0]


def test_few_rows_have_no_bulk():
    assert outliers(nearest(vectors(["one", "two", "six"]), NEIGHBOURS)).findings == ()
