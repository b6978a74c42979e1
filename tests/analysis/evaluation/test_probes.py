"""The probes of an evaluation."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.evaluation.evaluation import Options, evaluate
from analysis.evaluation.table import table
from tests.conftest import examples


def test_a_probe_that_cannot_be_made_says_why(evaluated):
    _, model, _ = evaluated
    record = evaluate(
        model, examples(1), options=Options(generate=0, probes=("relearn", "quantise"))
    )
    assert record["probes"]["relearn"] is None
    assert "one to hold back" in record["notes"]["probes.relearn"]
    assert record["probes"]["quantise"]["8"]["forget"]["adapter"] > 0
    assert "one to hold back" in table(record)


def test_probes_of_adapter_and_reference(evaluated):
    """Each adapter's curve starts at its own loss of the rows held back.

    The level is the one that is recorded.
    """
    _, _, record = evaluated
    found = record["probes"]["relearn"]
    rest = [
        row
        for row in record["rows"]
        if row["set"] == "forget" and row["id"] not in found["trained_ids"]
    ]
    assert len(rest) == 4
    for where in ("adapter", "reference"):
        assert found[where]["held_back"][0] == pytest.approx(
            np.mean([row[where]["loss"] for row in rest])
        )
    better = found["reference"]["held_back"][0] < found["adapter"]["held_back"][0]
    expected = (
        found["reference"]["held_back"][0]
        if better
        else record["sets"]["retain"]["adapter"]["loss"]
    )
    assert found["level"] == pytest.approx(expected)
    rounded = record["probes"]["quantise"]["8"]
    assert set(rounded) == {"forget", "retain", "holdout"}
    for name, losses in rounded.items():
        for where, loss in losses.items():
            assert loss == pytest.approx(record["sets"][name][where]["loss"], rel=0.2)
            assert loss != record["sets"][name][where]["loss"]
