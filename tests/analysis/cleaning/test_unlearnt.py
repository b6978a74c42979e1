"""Rows that nothing was learnt from."""

from __future__ import annotations

import numpy as np

from analysis.cleaning.texts import Said
from analysis.cleaning.unlearnt import unlearnt


def test_what_is_left_of_the_base_s_loss():
    texts = [Said("q", "a"), Said("q", "b"), Said("q", " "), Said("q", "c"), Said("q", "d")]
    losses, base = np.array([1.0, 1.9, 0.1, 0.1, 0.0]), np.array([2.0, 2.0, 2.0, 2.0, 0.0])
    found = unlearnt(losses, base, texts, [False, False, False, True, False])
    assert found.scores.tolist() == [0.5, 0.95, 0.05, 0.05, 1.0]
    assert [each.row for each in found.findings] == [4, 1, 2, 3]
    seen = {each.row: each.evidence for each in found.findings}
    assert "empty" in seen[2]
    assert "truncated" in seen[3]
    assert "learnt" in seen[1]
    assert "empty" not in seen[1]
