"""Texts and tables for a person, of results that are written out here."""

from __future__ import annotations

import numpy as np
import pytest
from rich.console import Console

from analysis.metrics import LDS
from analysis.stats import Interval
from analysis.tune import Judged, Tuning, table_rows
from analysis.words import lds_text, tuning_table, tuning_text

SCORE = LDS(np.array([0.5, np.nan]), 0.5, Interval(0.25, 0.75, 0.95, 100, 3), 40, 2, 1)


def judged(at: str, **measured) -> Judged:
    return Judged(None, "raw", "ekfac", "mean:0.1", at, 0.25, **measured)


def test_a_score_with_its_interval():
    text = (
        "LDS 0.5000, 95% interval [0.2500, 0.7500] (100 resamples of 40 retrained adapters, "
        "seed 3); mean Spearman over 1 of 2 queries"
    )
    assert lds_text(SCORE, 3) == text
    listed = "\n+0.5000  a b\n+nan  q2"
    assert lds_text(SCORE, 3, ["a\nb", "q2"]) == text + listed
    assert "\x1b" not in lds_text(SCORE, 3, ["\x1b[2J", "q2"])
    with pytest.raises(ValueError, match="shorter"):
        lds_text(SCORE, 3, ["a"])


def test_a_choice_and_how_good_it_is():
    best = judged("0.6", agreement=0.5, selectivity=2.0, factor=1.0)
    tuning = Tuning([best], best, None, "local checks")
    text = "chosen by local checks: raw ekfac mean:0.1 at 0.6; shown only"
    assert tuning_text(tuning, "shown only", 0) == text
    tuning = Tuning([best], best, SCORE, "local checks", 0.875, 2e-7)
    assert tuning_text(tuning, "shown only", 12).splitlines() == [
        text,
        "LDS of the chosen setting on the other subsets: 0.5000, 95% interval [0.2500, 0.7500]",
        "Spearman of its scores with the exact GGN's on 12 rows: 0.875 (worst residual 2.0e-07)",
    ]


def test_the_table_of_a_tuning_has_short_headings():
    best = judged("0.6", agreement=0.5, selectivity=2.0, factor=1.0)
    tuning = Tuning([best, judged("all", lds=SCORE)], best, None, "local checks")
    console = Console(width=100)
    with console.capture() as captured:
        console.print(tuning_table(list(table_rows(tuning, 1)), len(tuning.judged)))
    lines = captured.get().splitlines()
    assert lines[0].strip() == "the best 1 of 2 settings"
    headings = [cell.strip() for cell in lines[2].strip("┃").split("┃")]
    assert headings == ["setting", "factors", "conc.", "agree.", "select.", "calib."]
    cells = [cell.strip() for cell in lines[4].strip("│").split("│")]
    assert cells == ["raw ekfac mean:0.1 at 0.6", "the run's", "0.250", "0.500", "2.000", "1.000"]
