"""Rows that are judged together."""

from __future__ import annotations

import pytest

from analysis.report.groups import groups
from tests.analysis.report.helpers import (
    made,
    text,
)
from unlearn.record.edit_record import EditRecord


def test_a_group_is_judged_by_its_means_and_says_so_where_a_row_falls_short():
    record = made()
    (group,) = groups(EditRecord.from_json(record))
    assert group.verdict == "forgotten"
    record["rows"][1]["after"] = 3.9  # below 0.9 x 4.7; the mean, 4.37, is above
    (group,) = groups(EditRecord.from_json(record))
    assert group.verdict == "forgotten on average"
    assert (
        text(record).count(
            "On average the 3 removed rows are now about as unfamiliar to the adapter as rows it "
            "never saw"
        )
        == 1
    )
    assert "loss 4.37 against 4.70 expected; 1 of them falls short." in text(record)
    assert "Rows: 2 forgotten, 1 partly forgotten." in text(record)
    record["rows"][1]["after"] = 0.3
    (group,) = groups(EditRecord.from_json(record))
    assert group.verdict == "partly forgotten"


def test_means_are_over_the_rows_where_both_numbers_are_known():
    record = made()
    record["rows"][0] |= {"target": None, "after": 0.0}
    (group,) = groups(EditRecord.from_json(record))
    assert group.mean("after", "goal") == pytest.approx(4.6)
    assert group.mean("after") == pytest.approx(9.2 / 3)
    assert (
        group.verdict == "forgotten on average"
    )  # which a row that cannot be judged does not make `forgotten`
    assert "Rows: 2 forgotten, 1 not judged." in text(record)
    assert "4.70 expected; 1 of them cannot be judged." in text(record)
