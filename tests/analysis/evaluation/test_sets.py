"""Sets of an evaluation share no row, and are continued where they can be."""

from __future__ import annotations

import pytest

import influence
from analysis.evaluation.answers import rows
from analysis.evaluation.evaluation import Options, evaluate, parted
from influence.errors import InputError
from tests.conftest import examples
from tests.conftest import rows as made_rows


def test_text_rows_are_measured_and_not_continued(evaluated):
    _, model, _ = evaluated
    texts = influence.examples_from_rows(
        [{"id": "t", "text": "the old fox runs"}, {"id": "u", "text": "a dog and cats"}]
    )
    record = evaluate(model, texts, options=Options(probes=("relearn",)))
    assert record["sets"]["forget"]["tokens"] == 3 + 1 + 3 + 1
    assert (
        record["notes"]["sets.forget.rougeL"]
        == "the rows have no prompt that the model could continue"
    )
    assert record["probes"]["relearn"]["trained_ids"] in (["t"], ["u"])
    assert record["probes"]["relearn"]["level"] is None


def test_rows_in_two_sets_are_refused(evaluated):
    _, model, _ = evaluated
    data = made_rows(4)
    again = [row | {"id": f"again-{row['id']}"} for row in data[2:]]
    with pytest.raises(
        InputError,
        match=r"2 rows of the holdout set have the content of rows of the forget set .*again-r0-2",
    ):
        evaluate(model, examples(4), holdout=influence.examples_from_rows(again))


def test_rows_to_forget_are_left_out_of_the_retained_ones():
    """Of 6 retained rows 2 are rows to forget: 4 are measured, and a note says so.

    Without any other it is an error.
    """
    given, other = rows(made_rows(2)), rows(made_rows(6))
    found, notes = parted({"forget": given, "retain": other})
    assert found["retain"].examples.ids == other.examples.ids[2:]
    assert notes == {"remark.retain": "2 of the given rows are rows to forget and were left out"}
    with pytest.raises(InputError, match="every retained row is a row to forget"):
        parted({"forget": other, "retain": given})
