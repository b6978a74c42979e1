"""Rows with personal data: their order, what is said of them, and what is not told."""

from __future__ import annotations

import numpy as np

from analysis.cleaning.findings import Finding, Found
from analysis.cleaning.memorized import holding, personal, without_personal_answers
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


def test_no_answer_that_holds_personal_data_is_suggested():
    """What one row leaks is not written into another one."""
    each = [
        Finding(row, "label", 1.0, "seen", suggested="relabel", answer=text.answer)
        for row, text in enumerate(TEXTS)
    ]
    plain = Finding(3, "label", 1.0, "seen", suggested="remove")
    found = without_personal_answers(Found("label", "", np.zeros(4), (*each, plain)))
    assert [one.answer for one in found.findings] == ["nothing here", None, "yes", None]
    assert [one.suggested for one in found.findings] == ["relabel", "", "relabel", "remove"]
    assert found.findings[1].evidence.endswith("holds personal data and is not suggested")
