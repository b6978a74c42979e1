"""What is measured before and after, by oracles of a few lines, and how it becomes the record."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch

import unlearn
from influence.cost import Cost
from tests.conftest import examples
from tests.oracles import logits_fn, summed_loss
from tests.unlearn.edits.helpers import edit_of, random
from tests.unlearn.record.helpers import RECIPE
from unlearn.record.before_after import (
    LinearForecast,
    State,
    Undertaking,
    by_request,
    damage_of,
    guard_of,
)
from unlearn.record.change import plan
from unlearn.record.edit_record import Guard, WalkStep
from unlearn.record.losses import Measured, measure
from unlearn.record.version import version
from unlearn.stopping import StepRecord
from unlearn.unseen import expected_losses, scaled_to


def measured(*losses) -> Measured:
    return Measured(np.array(losses), *np.zeros((2, len(losses))))


def state(retained) -> State:
    none = measured()
    return State(none, none, measured(*retained), None, np.zeros(0))


@pytest.fixture
def work(runs) -> Undertaking:
    """A removed and a relabelled row of a float64 run, with held-out rows."""
    start, holdout = version(runs("ekfac")), examples(3, seed=5)
    change = plan(start, remove=["r0-1"], relabel={"r0-4": " warm songs"})
    tokens = start.run.tokenized(holdout)
    return Undertaking(
        version=start, change=change, holdout=holdout, heldout=tokens, max_damage=0.1, seed=0
    )


def mean_loss(model, tokens):
    """Mean over rows of the mean loss a token, as a function of the parameters."""
    losses = [summed_loss(*logits_fn(model, row)) for row in tokens]
    counts = [int(row.supervised.sum()) for row in tokens]
    pairs = list(zip(losses, counts, strict=True))
    return lambda theta: sum(loss(theta) / count for loss, count in pairs) / len(pairs)


# ---- measurements --------------------------------------------------------------------------------


def test_damage_is_the_relative_rise_of_the_mean():
    assert damage_of(state([1.0, 3.0]), state([1.5, 3.5])) == pytest.approx(0.25)
    assert damage_of(state([]), state([])) is None


def test_one_number_a_request_is_of_its_new_content(work):
    assert work.change.replaced.tolist() == [False, True]
    values = by_request(work.change, np.array([1.0, 2.0]), np.array([7.0]))
    assert values.tolist() == [1.0, 7.0]


def test_a_state_is_five_plain_measures(work):
    cost = work.cost.forwards
    result = work.measure(work.version.theta)
    model, change = work.version.model, work.change
    np.testing.assert_array_equal(result.old.loss, measure(model, change.old).loss)
    np.testing.assert_array_equal(result.new.loss, measure(model, change.new).loss)
    rest = work.version.tokens.select(work.sample)
    np.testing.assert_allclose(result.retained.loss, measure(model, rest).loss, rtol=1e-12)
    np.testing.assert_allclose(result.unseen, measure(model, work.heldout).loss, rtol=1e-12)
    assert result.edited.tolist() == [result.old.loss[0], result.new.loss[0]]
    assert work.cost.forwards - cost == 2 + 1 + len(rest) + 3


def test_the_linear_forecast_is_the_gradient_of_each_mean(work):
    model, theta = work.version.model, work.version.theta
    delta = 0.01 * random(3, len(theta))
    result = work.forecast(delta, theta + delta)
    kept_out = work.change.old.select([0])
    rest = work.version.tokens.select(work.sample)
    sets = {
        "edited": [*kept_out, *work.change.new],
        "retained": list(rest),
        "heldout": list(work.heldout),
    }
    gradients = {}
    for name, rows in sets.items():
        at = theta.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(mean_loss(model, rows)(at), at)
        gradients[name] = gradient
        assert getattr(result, name) == pytest.approx(float(gradient @ delta), rel=1e-9)
    assert result.objective.before == pytest.approx(float(gradients["retained"].norm()), rel=1e-9)
    at = (theta + delta).requires_grad_(True)
    (there,) = torch.autograd.grad(mean_loss(model, sets["retained"])(at), at)
    assert result.objective.after == pytest.approx(float(there.norm()), rel=1e-9)
    assert result.objective.rows == len(rest)
    assert work.forecast(delta, None).objective.after is None


def test_sets_without_rows_have_no_forecast(runs):
    start = version(runs("ekfac"))
    changes = {id: f" {id} songs" for id in start.rows.ids}
    everything = plan(start, relabel=changes)
    work = Undertaking(
        version=start, change=everything, holdout=None, heldout=None, max_damage=1.0, seed=0
    )
    result = work.forecast(0.01 * random(3, len(start.theta)), None)
    assert isinstance(result, LinearForecast)
    assert (result.retained, result.heldout, result.objective) == (None, None, None)
    assert result.edited is not None


def test_the_loss_since_the_fit_is_known_after_an_earlier_edit_only(work):
    after = work.measure(work.version.theta)
    assert work.since_the_fit(after) is None
    later = replace(work, version=replace(work.version, edits=2))
    result = later.since_the_fit(replace(after, retained=measured(*(1.5 * after.retained.loss))))
    assert result == pytest.approx(0.5)


# ---- the record ----------------------------------------------------------------------------------


def test_the_record_says_what_was_measured(run):
    holdout = examples(3, seed=5)
    edit = edit_of(run, remove=["r0-1"], relabel={"r0-4": " warm songs"}, holdout=holdout)
    record, change = edit.record, edit.change
    with run.model.at(edit.theta) as model:
        retained = measure(model, change.version.tokens.select(change.rest)).loss
        unseen = measure(model, run.tokenized(holdout)).loss
        new, old = measure(model, change.new), measure(model, change.old)
    losses = record.losses
    assert losses.retained.rows == len(change.rest)
    assert losses.retained.after == pytest.approx(retained.mean(), rel=1e-5)
    assert losses.retained.change == record.guard.damage
    assert losses.heldout.after == pytest.approx(unseen.mean(), rel=1e-5)
    assert losses.edited.after == pytest.approx((old.loss[0] + new.loss[0]) / 2, rel=1e-5)
    rows = {row.id: row for row in record.rows}
    assert rows["r0-1"].after == pytest.approx(old.loss[0], rel=1e-5)
    assert rows["r0-4"].old_after == pytest.approx(old.loss[1], rel=1e-5)
    assert rows["r0-4"].extraction_after == new.extraction[0]
    assert rows["r0-1"].rank == np.mean(unseen < rows["r0-1"].after)
    assert (record.comparable.source, record.comparable.rows) == ("held-out rows", 3)
    assert record.lineage.removed == ("r0-1",)
    assert record.lineage.changed == ("r0-4",)
    assert edit.report == record.as_json()


def test_the_record_says_what_was_expected_and_by_what(run):
    """Of the removed and of the new contents, with the intervals of each and of the mean of S."""
    edit = edit_of(run, remove=["r0-1"], relabel={"r0-4": " warm songs"}, seed=3)
    change, record = edit.change, edit.record
    with run.model.at(change.version.theta) as model:
        now, new_now = measure(model, change.old).loss, measure(model, change.new).loss
    found = expected_losses(change, RECIPE, now, new_now, Cost(), seed=3)
    (low, high), told = found.intervals(), record.expected
    assert change.replaced.tolist() == [False, True]
    for row, place in zip(record.rows, (0, 2), strict=True):
        assert row.target == pytest.approx(found.expected[place], rel=1e-5)
        assert (row.low, row.high) == pytest.approx((low[place], high[place]), rel=1e-5)
        assert row.base == pytest.approx(found.base[place], rel=1e-5)
        assert row.share is None
    assert record.rows[1].old_target == pytest.approx(found.expected[1], rel=1e-5)
    assert told.loss == pytest.approx(found.expected[:2].mean(), rel=1e-5)
    assert (told.low, told.high) == pytest.approx(found.interval(np.array([0, 1])), rel=1e-5)
    assert told.faithfulness == pytest.approx(found.faithfulness, rel=1e-4)
    assert (told.trainings, told.near, told.others) == (3, 10, 0)
    # five epochs: of ten rows and two, and twice of ten and the new content
    assert told.row_gradients == 5 * (12 + 2 * 11)
    assert told.recipe == RECIPE.as_json()
    assert "rho" not in record.method.settings
    assert record.cost.retraining == 5 * 11


def test_rows_have_their_losses_under_the_base_though_nothing_is_expected(run):
    edit = edit_of(run, remove=["r0-1"], steps=1)
    (row,), change = edit.record.rows, edit.change
    assert (edit.record.expected, row.low, row.high, row.target) == (None, None, None, None)
    with run.model.at(scaled_to(change.version, 0.0)) as model:
        assert row.base == pytest.approx(measure(model, change.old).loss[0], rel=1e-5)


def test_the_recipe_is_the_given_one_else_the_recorded_one(work, tmp_path):
    given, path = replace(RECIPE, epochs=2), tmp_path / "recipe.json"
    path.write_text(json.dumps(given.as_json()))
    for how in (given, path):
        mine = replace(work, given_recipe=how)
        assert mine.recipe == given
        assert mine.retraining(10.0) == {"retraining": 2 * 5, "ratio": 1.0}
    # four batches of five rows: the third holds what is left of them
    steps = replace(work, given_recipe=replace(given, max_steps=4))
    assert steps.retraining(14.0) == {"retraining": 2 + 2 + 1 + 2, "ratio": 2.0}
    assert work.retraining(10.0) == {"retraining": None, "ratio": None}  # none is known


def test_without_held_out_rows_the_base_model_tells_what_is_comparable(run):
    record = edit_of(run, until="steps=1", steps=40).record
    assert record.comparable.source == "retained rows under the base model"
    assert record.comparable.rows == record.losses.retained.rows
    assert record.losses.heldout is None


def test_edits_that_add_up_to_more_than_one_may_do_are_warned_of(work, capsys):
    """Each within the limit of its own; the record has the rise since the fit."""
    start = work.measure(work.version.theta)
    later = replace(work, version=replace(work.version, edits=2))

    def guard(before: float, after: float, work=later) -> tuple[Guard, str]:
        """The guard of an edit that moves the retained loss between these factors of the fit's."""
        states = [
            replace(start, retained=measured(*(factor * start.retained.loss)))
            for factor in (before, after)
        ]
        return guard_of(work, *states), capsys.readouterr().err

    result, said = guard(1.15, 1.2)
    assert (result.damage, result.since_the_fit) == pytest.approx((0.05 / 1.15, 0.2))
    assert (result.passed, result.forced, result.max_damage) == (True, False, 0.1)
    assert "raises the retained rows' loss by 4.3%, and 3 edits together by 20.0% since" in said
    assert guard(1.0, 1.05)[1] == ""  # all together within the limit
    result, said = guard(1.0, 1.2)
    assert (result.passed, said) == (False, "")  # which is refused, not warned of
    result, said = guard(1.15, 1.2, work)
    assert (result.since_the_fit, said) == (None, "")
    assert guard(1.15, 1.2, replace(later, max_damage=float("inf")))[0].passed is None


def test_the_steps_of_the_record_are_those_of_the_walk(run):
    """Every field of the walk's step is one of the record, in the same order."""
    assert [part.name for part in fields(WalkStep)] == [part.name for part in fields(StepRecord)]
    record = edit_of(run, until="steps=2", steps=40).record
    assert [step.step for step in record.steps] == [1, 2]
    assert [asdict(step) for step in record.steps] == record.as_json()["steps"]


def test_a_training_leaves_the_same_record(run):
    record = unlearn.train(run, "ga", ["r0-1"], until="steps=2").record
    assert record.method.name == "ga"
    assert record.method.settings["steps_taken"] == 2
    assert record.steps == ()
    assert record.losses.edited.target is None
    assert record.expected is None
    assert [(row.low, row.high) for row in record.rows] == [(None, None)]
    assert record.guard.passed is None
