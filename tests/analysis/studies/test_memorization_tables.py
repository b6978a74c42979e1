"""Tables of memorization: narrow, and only of what was measured."""

from __future__ import annotations

import io

import numpy as np
from rich.console import Console

from analysis.studies.memorization import memorization
from analysis.studies.memorization_tables import tables
from tests.analysis.studies.helpers import truth_of


def shown(made) -> list[str]:
    lines = []
    for table in made:
        file = io.StringIO()
        Console(file=file, width=80).print(table)
        lines.append(file.getvalue())
    return lines


def test_the_most_memorized_rows_and_every_measurement(run):
    result = memorization(run, truth_of(run), dampings=[], resamples=5)
    rows, *agreements = shown(tables(result, 3))
    assert "highest counterfactual memorization: 3 of 7 rows" in rows
    order = np.argsort(-result.table["counterfactual_memorization"].fillna(-np.inf), kind="stable")
    places = [rows.index(run.train.ids[i]) for i in order[:3]]
    assert places == sorted(places)
    assert len(agreements) == 2
    assert "Spearman with the counterfactual memorization (5 rows)" in agreements[0]
    assert "Spearman with the C-score (6 rows)" in agreements[1]
    assert all("95%, over rows" in text for text in agreements)
    assert max(len(line) for text in (rows, *agreements) for line in text.splitlines()) <= 80


def test_without_a_truth_there_is_one_table(run):
    (rows,) = shown(tables(memorization(run, dampings=[])))
    assert "highest self-influence: 7 of 7 rows" in rows
    assert "counterfactual" not in rows
