"""The words for an edit follow from its numbers."""

from __future__ import annotations

import math

import pytest

from analysis.report import words
from analysis.report.verdicts import agreement, damage, forgetting, learning, tone, with_evidence
from tests.analysis.report.helpers import (
    made,
    text,
)
from unlearn.record.edit_record import EditRecord


@pytest.mark.parametrize(
    ("losses", "word"),
    [
        ((0.2, 4.7, 4.7), "forgotten"),
        ((0.0, 0.9, 1.0), "forgotten"),  # 0.9 of the target, exactly
        ((0.0, 0.899, 1.0), "partly forgotten"),
        ((0.0, 0.1, 1.0), "partly forgotten"),  # a tenth of the way, exactly
        ((0.0, 0.099, 1.0), "not forgotten"),
        ((0.5, 0.52, 1.0), "not forgotten"),
        ((0.5, 0.2, 1.0), "not forgotten"),
        ((None, 0.5, 1.0), "not forgotten"),  # no progress can be shown
        ((None, 0.95, 1.0), "forgotten"),
        ((0.2, 4.0, None), "not judged"),
        ((0.2, None, 4.7), "not judged"),
        ((0.2, math.nan, 4.7), "not judged"),
        ((0.2, math.inf, 4.7), "not judged"),
    ],
)
def test_forgetting(losses, word):
    assert forgetting(*losses) == word


@pytest.mark.parametrize(
    ("losses", "word"),
    [
        ((5.0, 0.0, 1.0), "taken up"),
        ((1.0, 0.1, 0.0), "taken up"),  # 0.9 of the way, exactly
        ((1.0, 0.11, 0.0), "partly taken up"),
        ((10.0, 9.0, 0.0), "partly taken up"),  # a tenth of the way, exactly
        ((1.0, 0.91, 0.0), "not taken up"),
        ((1.0, 2.0, 0.0), "not taken up"),
        ((0.5, 0.6, 0.5), "not taken up"),  # it was known well enough and no longer is
        ((0.5, 0.5, 0.6), "taken up"),
        ((None, 0.5, 0.1), "not taken up"),
        ((5.0, 1.0, None), "not judged"),
        ((5.0, None, 1.0), "not judged"),
    ],
)
def test_learning(losses, word):
    assert learning(*losses) == word


@pytest.mark.parametrize(
    ("guard", "word"),
    [
        ({"damage": 0.1, "max_damage": 0.1}, "within the limit"),
        ({"damage": 0.1001, "max_damage": 0.1}, "beyond the limit"),
        ({"damage": -0.3, "max_damage": 0.1}, "within the limit"),
        ({"damage": 0.1, "max_damage": None}, "no limit set"),
        ({"damage": None, "max_damage": 0.1}, "not measured"),
        ({"damage": math.nan, "max_damage": 0.1}, "not measured"),
        (None, "not measured"),
    ],
)
def test_damage(guard, word):
    rise, limit = (guard or {}).get("damage"), (guard or {}).get("max_damage")
    assert damage(rise, limit) == word


def agreement_of(record):
    return agreement(words.compared_losses(EditRecord.from_json(record)))


def test_agreement_compares_each_loss_with_the_retrained_adapters():
    record = made()
    assert agreement_of(record) == ("not compared", ())
    record["agreement"] = {
        "adapter": "/x",
        "edited": 4.6 / 1.09,
        "retained": 0.185,
        "heldout": None,
        "kl": None,
    }
    assert agreement_of(record) == ("agrees", ())
    record["agreement"] |= {"edited": 4.6 / 1.11, "heldout": 4.83 / 0.89}
    assert agreement_of(record) == ("differs", ("edited", "heldout"))
    assert "More than 10 % from an adapter trained again on: edited rows, held-out rows." in text(
        record
    )
    assert "unlearn retrain" not in text(record)


MORE = "more than unseen"


@pytest.mark.parametrize(
    ("word", "measured", "verdict"),
    [
        ("forgotten", [], "forgotten"),
        ("forgotten", [("generations", "as unseen"), ("membership", None)], "forgotten"),
        ("forgotten", [("generations", "less than unseen")], "forgotten"),
        ("forgotten", [("generations", MORE)], "forgotten by loss, still repeated"),
        (
            "forgotten on average",
            [("membership", MORE), ("probe-losses", "not settled")],
            "forgotten on average by loss, still recognised",
        ),
        (
            "forgotten",
            [("generations", MORE), ("probe-losses", MORE), ("probe-generations", MORE)],
            "forgotten by loss, still repeated and known",
        ),
        ("taken up", [("probe-losses", MORE)], "taken up, the old still known"),
        ("partly forgotten", [("generations", MORE)], "partly forgotten"),
        ("not judged", [("generations", MORE)], "not judged"),
        ("forgotten", [("of a later version", MORE)], "forgotten"),
    ],
)
def test_rows_are_forgotten_where_nothing_else_says_that_more_is_left(word, measured, verdict):
    assert with_evidence(word, measured) == verdict
    assert tone(verdict) == ("warn" if "still" in verdict else tone(word))
