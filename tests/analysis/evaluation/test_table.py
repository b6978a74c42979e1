"""The table of an evaluation fits a terminal."""

from __future__ import annotations

from analysis.evaluation.table import table


def test_the_table_fits_a_terminal(evaluated):
    _, _, record = evaluated
    text = table(record)
    assert max(len(line) for line in text.splitlines()) <= 100
    for part in (
        "forget",
        "retained",
        "held-out",
        "reference",
        "min-k++",
        "PrivLeak",
        "forget quality",
        "4 bits",
        "trained again",
    ):
        assert part in text
    assert f"{record['sets']['forget']['adapter']['loss']:.3f}" in text
    assert f"{record['membership']['attacks']['loss']['adapter']['auc']:.3f}" in text
