"""Findings in their order."""

from __future__ import annotations

import numpy as np

from analysis.cleaning.findings import Finding, Found, ranked


def test_the_highest_score_is_first_then_the_gain_then_the_order():
    each = [
        Finding(3, "harms", 0.5, ""),
        Finding(2, "harms", 0.5, "", gain=0.1),
        Finding(1, "harms", 0.9, ""),
        Finding(0, "harms", 0.5, ""),
    ]
    assert [finding.row for finding in ranked(each)] == [1, 2, 0, 3]


def test_the_list_is_cut_and_the_scores_stay():
    findings = ranked([Finding(row, "label", row, "") for row in range(5)])
    found = Found("label", "rule", np.arange(5.0), findings).most(2)
    assert [finding.row for finding in found.findings] == [4, 3]
    assert found.scores.tolist() == [0, 1, 2, 3, 4]
