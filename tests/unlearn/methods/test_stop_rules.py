"""When a training stops, and that its last step is as long as the rule allows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from influence.at_point import evenly_spaced
from influence.errors import InputError
from influence.path import scaled
from tests.unlearn.methods.helpers import (
    FORGET,
    KEPT,
    RECIPE,
    ROWS,
    Oracle,
    close,
    losses_of,
    some_slow,
    train,
)
from unlearn.methods import stop_rules


def last_step(run, edit, **options):
    """The share of its last step that a training kept, checked against the trainings that end
    before and after that step.
    """
    taken, share = len(edit.log), edit.log[-1]["share"]
    before = (
        train(run, "ga", until=f"steps={taken - 1}", **options).delta
        if taken > 1
        else torch.zeros_like(edit.delta)
    )
    whole = train(run, "ga", until=f"steps={taken}", **options).delta
    close(edit.delta, before + share * (whole - before))
    assert all(entry["share"] == 1 for entry in edit.log[:-1])
    start = run.model.snapshot()
    return share, lambda part: losses_of(
        run, start + before + part * (whole - before), FORGET
    ).mean()


def test_it_stops_at_the_goal_within_a_step(run):
    """Base: the mean of the rows' losses under the base, of rows that lie below it.

    The last step is as long as it takes.
    """
    edit = train(run, "ga", until="base", steps=60, lr=0.01)
    oracle = Oracle(run)
    with oracle.model.disable_adapter(), torch.no_grad():
        base = [float(oracle.losses(id).mean()) for id in FORGET]
    goal = np.mean(np.maximum(base, [row["before"] for row in edit.report["rows"]]))
    assert edit.report["losses"]["edited"]["target"] == pytest.approx(goal)
    assert edit.report["reached"]
    taken = len(edit.log)
    assert 1 < taken < 60
    assert f"reached its goal, {goal:.2f}, in step {taken}" in edit.report["stopped"]
    assert edit.report["method"]["steps_taken"] == taken
    share, loss = last_step(run, edit, lr=0.01)
    assert goal <= loss(share) <= goal * (1 + stop_rules.CLOSE)
    assert loss(0.0) < goal
    assert edit.report["losses"]["edited"]["after"] == pytest.approx(loss(share))


def test_a_given_loss_is_a_goal(run):
    goal = float(losses_of(run, run.model.snapshot(), FORGET).mean()) + 0.4
    edit = train(run, "ga", until=f"loss={goal}", steps=100, lr=0.01)
    assert edit.record.losses.edited.target == pytest.approx(goal)
    assert [row.target for row in edit.record.rows] == [goal] * 3
    assert edit.record.expected is None
    check_reached(run, edit)


def test_the_expected_loss_is_a_goal(run):
    """Row by row, with intervals about it, as a local retraining by the recipe gives it."""
    edit = train(run, "ga", until="expected", steps=100, lr=0.01, recipe=RECIPE)
    goals, _ = Oracle(run).expected(RECIPE)
    record = edit.record
    assert {row.id: row.target for row in record.rows} == pytest.approx(goals, rel=1e-9)
    assert record.losses.edited.target == pytest.approx(np.mean(list(goals.values())), rel=1e-9)
    assert record.expected.loss == pytest.approx(record.losses.edited.target, rel=1e-12)
    assert record.expected.low < record.expected.loss < record.expected.high
    assert all(row.low < row.target < row.high for row in record.rows)
    assert (record.expected.near, record.expected.others) == (9, 0)
    # four epochs of twelve rows, and twice of nine
    assert (record.expected.trainings, record.expected.row_gradients) == (3, 4 * (12 + 9 + 9))
    check_reached(run, edit)


def check_reached(run, edit):
    """The rows are at their goal, and were not a step before."""
    target, after = edit.record.losses.edited.target, losses_of(run, edit.theta, FORGET).mean()
    assert edit.record.reached
    assert after >= target
    assert edit.log[-1]["forget_loss"] < target


def test_steps_asked_for_are_steps_taken(run):
    for count in (1, 4):
        edit = train(run, "ga", until=f"steps={count}")
        assert [entry["step"] for entry in edit.log] == list(range(1, count + 1))
        assert edit.report["stopped"] == f"{count} steps were taken"
        assert edit.report["reached"] is None  # no goal was asked for
        assert edit.report["losses"]["edited"]["target"] is None
    assert len(train(run, "task-arithmetic", steps=2).log) == 2
    assert all(entry["share"] == 1 for entry in edit.log)


def test_a_goal_that_is_not_reached_is_said(run):
    edit = train(run, "ga", until="loss=30", steps=2, lr=1e-4)
    assert not edit.report["reached"]
    assert edit.report["stopped"] == "2 steps were taken"
    edited = edit.report["losses"]["edited"]
    goal = 0.1 * edited["before"] + 0.9 * edited["after"]
    last = train(run, "ga", until=f"loss={goal}", steps=2, lr=1e-4)
    assert last.report["reached"]  # reached by the last step that was allowed
    assert "goal" in last.report["stopped"]


@pytest.mark.parametrize(
    "name",
    some_slow(
        ["ga", "ga-gd", "npo", "ngdiff", "control", "datamodel-matching", "l1-sparse"],
        ["ga", "ngdiff"],
    ),
)
def test_rows_at_their_goal_are_nothing_to_do(run, name):
    """No adapter is made that would stand as an unlearned one. The model is as before."""
    before = run.model.snapshot()
    low = float(losses_of(run, before, FORGET).mean()) / 2
    with pytest.raises(InputError, match="nothing to do: the forget rows' mean loss is"):
        train(run, name, until=f"loss={low}", steps=5)
    assert torch.equal(run.model.snapshot(), before)


def test_damage_stops_it(run):
    """The step that takes the sample beyond what is allowed is the last, and is cut so that it just
    does not.
    """
    free = train(run, "ga", until="steps=40", lr=0.02)
    rises = []
    for count in (10, 11, 12):
        theta = train(run, "ga", until=f"steps={count}", lr=0.02).theta
        before = losses_of(run, run.model.snapshot(), KEPT).mean()
        rises.append(losses_of(run, theta, KEPT).mean() / before - 1)
    assert rises == sorted(rises)
    allowed = (rises[0] + rises[1]) / 2
    edit = train(run, "ga", until="steps=40", lr=0.02, stop_damage=allowed)
    assert len(edit.log) == 11
    assert edit.report["stopped"] == (
        f"the retained rows' mean loss has risen by {allowed:.1%}, all that is allowed, in step 11"
    )
    assert (
        (1 + allowed) * (1 - stop_rules.CLOSE) <= 1 + edit.report["guard"]["damage"] < 1 + allowed
    )
    assert 0 < edit.log[-1]["share"] < 1
    assert len(free.log) == 40
    early = train(run, "ga", until="loss=50", steps=40, lr=0.02, stop_damage=allowed)
    assert not early.report["reached"]
    assert torch.equal(early.delta, edit.delta)


def test_a_forget_set_larger_than_the_batch_ends_just_at_its_goal(run):
    """Looked at every ten steps and when a step's own row is at its goal.

    Then back along the way since the last look.
    """
    goal = float(losses_of(run, run.model.snapshot(), FORGET).mean()) + 0.3
    edit = train(run, "ga", until=f"loss={goal}", steps=100, lr=0.01, batch_size=1)
    taken = len(edit.log)
    assert edit.report["reached"]
    assert 1 < taken < 100
    after = losses_of(run, edit.theta, FORGET).mean()
    assert goal <= after <= goal * (1 + stop_rules.CLOSE)


def test_a_sample_of_forget_rows_is_held_against_its_own_goal(run, monkeypatch):
    """Of two rows below the base's loss the one that is looked at lies above the mean goal of both.

    Neither is at its own.
    """
    monkeypatch.setattr(stop_rules, "CHECK_ROWS", 1)
    now = losses_of(run, run.model.snapshot(), run.train.ids)
    base = losses_of(run, scaled(run.model, 0.0), run.train.ids)
    pairs = [
        (i, j) for i in range(ROWS) for j in range(ROWS) if now[i] < base[i] and now[j] < base[j]
    ]
    i, j = next((i, j) for i, j in pairs if now[i] > (base[i] + base[j]) / 2)
    ids = [run.train.ids[k] for k in ((i, j) if evenly_spaced(2, 1)[0] == 0 else (j, i))]
    assert len(train(run, "ga", ids, until="base", steps=1, batch_size=1).log) == 1
