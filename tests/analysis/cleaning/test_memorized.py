"""Rows with personal data: their order, what is said of them, and what is not told."""

from __future__ import annotations

import numpy as np

from analysis.cleaning.memorized import holding, personal
from analysis.cleaning.texts import Said

TEXTS = [
    Said("q", "nothing here"),
    Said("q", "write to ada@mail.example.org or ada@mail.example.com"),
    Said("card 4111 1111 1111 1111?", "yes"),
]


def test_rows_that_hold_personal_data_by_self_influence():
    held = holding(TEXTS)
    assert sorted(held) == [1, 2]
    found = personal(
        held,
        np.array([9.0, 0.5, 2.0]),
        np.array([0.1, 1.5, 0.2]),
        np.array([2.0, 2.0, 2.0]),
        {1: 0.25, 2: 1.0},
    )
    assert [each.row for each in found.findings] == [2, 1]
    assert found.scores.tolist() == [-np.inf, 0.5, 2.0]
    assert [each.suggested for each in found.findings] == ["remove", ""]
    first, second = (each.evidence for each in found.findings)
    assert first.startswith("card: 41***(19); memorized: loss 0.20")
    assert second.startswith("email x2: ad***(20) ad***(20); not memorized")
    assert not any(secret in first + second for secret in ("4111 1111", "mail.example"))
