"""Edits and forecasts as a line and as a card."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import unlearn
from influence import Run
from tests.influence.test_cards import HOSTILE, inert
from tests.influence.toy_commands import make_folder
from unlearn.cards import edit_card, edit_line
from unlearn.difficulty import Forecast


@pytest.fixture(scope="module")
def edit(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("edited"))
    run = Run.open(folder / "run", device="cpu")
    return unlearn.remove(run, ids=["r0-1", "r0-2"], until="steps=1")


def test_an_edit_says_what_it_moved(edit):
    losses = edit.record.losses
    numbers = [losses.edited.before, losses.edited.after, losses.retained.before]
    for text in (repr(edit), inert(edit._repr_html_()).text):
        assert "remove 2 rows" in text
        assert str(edit.record.method.name) in text
        for value in numbers:
            assert f"{value:.3g}" in text
    assert repr(edit).isprintable()


def test_a_record_that_knows_nothing_has_a_card(edit):
    """Of files that are damaged, and with hostile text."""
    from unlearn.record.edit_record import EditRecord

    empty = EditRecord.salvaged({"kind": HOSTILE, "method": {"name": HOSTILE}, "stopped": HOSTILE})
    assert "–" in edit_line(empty)
    assert "<script>" in inert(edit_card(empty)).text


def test_an_edit_that_costs_too_much_says_so(edit):
    from dataclasses import replace

    guard = replace(edit.record.guard, passed=False, forced=False, damage=0.2, max_damage=0.1)
    failed = replace(edit.record, guard=guard)
    assert "too much damage" in edit_line(failed)
    text = inert(edit_card(failed)).text
    assert "20.0%, 10.0% allowed" in text
    assert "lost too much" in text


def forecast(count: int) -> Forecast:
    table = pd.DataFrame(
        {
            "id": [HOSTILE if k == 0 else f"row{k}" for k in range(count)],
            "steps": np.arange(count) + 1.0,
            "steps_low": np.arange(count) + 0.5,
            "steps_high": np.arange(count) + 2.0,
            "damage": [np.nan] * count,
            "recommended": ["ascent" if k % 2 else "edit" for k in range(count)],
        }
    )
    return Forecast(table, {"optimizer": "adam", "steps": 200, "target": "base"}, 2, 0.5)


def test_a_forecast_shows_its_first_units():
    found = forecast(8)
    assert repr(found) == (
        "Forecast(8 units, median 4.5 steps of adam, recommended edit for 4, ascent for 4)"
    )
    text = inert(found._repr_html_()).text
    assert "1.5 to 3" in text
    assert "row4" in text
    assert "row5" not in text
    assert "and 3 more" in text


def test_no_unit_and_one():
    assert repr(forecast(0)) == "Forecast(0 units, median – steps of adam)"
    inert(forecast(0)._repr_html_())
    assert "more" not in inert(forecast(1)._repr_html_()).text
