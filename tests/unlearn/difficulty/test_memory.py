"""Forecasts and ascents within a memory budget: what they hold, and that it changes nothing."""

from __future__ import annotations

import numpy as np
import pytest

import influence
from influence.errors import InputError
from tests.unlearn.difficulty.helpers import (
    ADAM,
    HOLDOUT,
    SHORT_ADAM,
    Allocations,
    data,
    same,
    trained,
)
from unlearn.difficulty import measure, predict
from unlearn.difficulty.units import ALONE, COPIES, find_units

#: All ten rows are sampled: their gradients alone are more than a unit takes.
SAMPLED = 10


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A run of an adapter whose parameters are more than the activations of any batch."""
    train = influence.examples_from_rows(data())
    at = tmp_path_factory.mktemp("memory") / "run"
    model = trained(train, 10, layers=3, r=14)
    return influence.fit(model, train, directory=at, path=(1.0,))


@pytest.fixture(scope="module")
def vector(large):
    """Bytes of its parameters."""
    return 8 * large.model.space.size


def held(vector, call) -> tuple[float, float]:
    """The largest tensor that a call makes, and the most that live together, in vectors."""
    with Allocations(vector) as seen:
        call()
    return seen.largest / vector, seen.together / vector


@pytest.mark.slow
def test_one_unit_at_a_time_holds_what_is_said_and_nothing_of_many_rows(large, vector):
    budget = ALONE * vector
    units = find_units(large, None, None, ADAM, HOLDOUT, SAMPLED, memory=budget)
    assert [len(part) for part in units.chunks()] == [1] * 10
    large.curvature()  # factors are no copies

    def forecast():
        predict(large, protocol=ADAM, units=units)

    def ascents():
        measure(large, protocol=SHORT_ADAM, holdout=HOLDOUT, units=units)

    for call in (forecast, ascents):
        largest, together = held(vector, call)
        assert largest <= 2, call.__name__  # two gradients of sampled rows; else single vectors
        assert together <= ALONE, call.__name__
    assert held(vector, forecast)[1] > ALONE - 3  # the budget is no guess
    assert not units.sample_gradients.in_memory


def test_several_at_a_time_hold_no_more_than_their_budget(large, vector):
    budget = (SAMPLED + 4 * COPIES) * vector
    units = find_units(large, None, None, ADAM, None, SAMPLED, memory=budget)
    assert [len(part) for part in units.chunks()] == [4, 3, 3]
    large.curvature()
    largest, together = held(vector, lambda: predict(large, protocol=ADAM, units=units))
    assert 4 <= largest <= SAMPLED
    # the run's own point, and the activations of several rows, come to it
    assert together <= budget / vector + 4
    assert units.sample_gradients.in_memory


@pytest.mark.slow
def test_the_budget_changes_no_result(large, vector):
    options = {"sample_rows": SAMPLED}
    many = predict(large, protocol=ADAM, **options, memory=1000 * vector)
    alone = predict(large, protocol=ADAM, **options, memory=ALONE * vector)
    names = many.table.select_dtypes("number").columns
    np.testing.assert_allclose(alone.table[names], many.table[names], rtol=1e-8, atol=1e-12)
    assert (many.table[["id", "how"]] == alone.table[["id", "how"]]).all(axis=None)
    options |= {"protocol": SHORT_ADAM, "holdout": HOLDOUT}
    many = measure(large, **options, memory=1000 * vector)
    same(many, measure(large, **options, memory=ALONE * vector), rtol=1e-8, atol=1e-10)


def test_less_than_one_copy_is_refused_before_any_work(large, vector, monkeypatch):
    monkeypatch.setattr(
        "unlearn.difficulty.units.shared_losses", lambda *_, **__: pytest.fail("a forward ran")
    )
    for ask in (predict, measure):
        with pytest.raises(
            InputError, match=r"\(--memory\); the ascent of one row .* give as much"
        ):
            ask(large, protocol=ADAM, memory=ALONE * vector - 1)


def test_without_a_budget_half_of_what_is_free_is_taken(large, vector, monkeypatch):
    for free, parts in ((2 * 3 * COPIES * vector + 2 * SAMPLED * vector, 4), (1, 10)):
        monkeypatch.setattr("unlearn.difficulty.units.free_memory", lambda _, free=free: free)
        units = find_units(large, None, None, ADAM, None, SAMPLED)
        assert len(units.chunks()) == parts
