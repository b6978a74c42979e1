"""The walk of an edit: its stopping rules, its trust region, and the retained rows in its steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from influence.cost import Cost
from influence.errors import NumericalError
from influence.loss import mean_losses
from tests.unlearn.edits.helpers import ANSWERS, edit_of
from unlearn import stopping
from unlearn.edits import steps
from unlearn.edits.goals import Goals, Merit
from unlearn.edits.steps import RetainedRows, TrustRegion, retained_weight, walk
from unlearn.record.version import version
from unlearn.stopping import EditRule

# ---- stopping rules ------------------------------------------------------------------------------


def test_steps_asked_for_are_steps_taken(run):
    for count in (2, 3):
        edit = edit_of(run, until=f"steps={count}", steps=40)
        assert [step["step"] for step in edit.report["steps"]] == list(range(1, count + 1))
        assert edit.report["stopped"] == f"{count} steps were taken, as asked"
        assert edit.report["method"]["until"] == f"steps={count}"
        assert edit.report["reached"]


def test_a_move_of_the_asked_length_has_exactly_that_length(run):
    for length in (0.01, 0.3):
        edit = edit_of(run, until=f"norm={length}", steps=40)
        assert float(edit.delta.double().norm()) == pytest.approx(length, rel=1e-5)
        assert edit.report["reached"]
        assert f"the move has the length {length:g}" in edit.report["stopped"]


def test_a_loss_asked_for_is_reached_and_measured_afterwards(run):
    ids = ["r0-0", "r0-3"]
    start = edit_of(run, until="steps=1", steps=40).report["losses"]["edited"]["before"]
    edit = edit_of(run, remove=ids, until=f"loss={start + 0.3}", steps=60)
    losses = edit.report["losses"]["edited"]
    assert edit.report["reached"]
    assert losses["target"] == pytest.approx(start + 0.3)
    assert losses["after"] > start + 0.3 - 1.01 * stopping.NEAR * (start + 0.3)
    with run.model.at(edit.theta):
        tokens = run.tokens.select([run.train.index(id) for id in ids])
        measured = mean_losses(run.model, tokens)
    assert losses["after"] == pytest.approx(measured.mean(), rel=1e-6)
    by_row = [row["after"] for row in edit.report["rows"]]
    assert by_row == pytest.approx(measured.tolist(), rel=1e-6)


def test_expected_edits_end_at_their_goals_or_say_that_they_did_not(run):
    edit = edit_of(run, relabel=ANSWERS, remove=["r0-1"], steps=40)
    text = edit.report["stopped"]
    assert edit.report["reached"] == ("rose to" in text or "at its goal already" in text)
    assert edit.report["kind"] == "mixed"
    for row in edit.report["rows"]:
        assert ("old_after" in row) == (row["action"] != "remove")
    short = edit_of(run, remove=["r0-1"], until="loss=30", steps=2)
    assert not short.report["reached"]
    assert short.report["stopped"] == "2 steps were not enough: raise --steps"


# ---- the trust region ----------------------------------------------------------------------------


def one_goal(run):
    """The first row, which should rise by 1, and two retained rows that no step draws."""
    start = version(run)
    tokens = start.tokens.select([0])
    target = mean_losses(run.model, tokens) + 1
    goals = Goals(tokens, target, np.array([True]))
    return start, goals, RetainedRows(start.tokens.select([1, 2]), 0, 0, 0.1)


def test_steps_that_raise_m_are_taken_back(run):
    """A direction nearly across the gradient makes the forecast step far too long: the row, which
    should lose less, loses more.
    """
    start, goals, retained = one_goal(run)
    goals = Goals(goals.tokens, 0.5 * (goals.targets - 1), np.array([False]))
    across = torch.randn(start.theta.shape, generator=torch.Generator().manual_seed(0))

    def precondition(v):
        orthogonal = across - (across @ v) / (v @ v) * v
        return orthogonal / orthogonal.norm() + 1e-6 * v / v.norm()

    ending = walk(
        run.model,
        start.theta,
        goals,
        retained,
        precondition,
        until=EditRule("expected"),
        steps=40,
        token_budget=200,
        cost=Cost(),
    )
    assert torch.equal(ending.theta, start.theta)
    assert not ending.reached
    assert [step.accepted for step in ending.steps] == [False] * steps.RETRIES
    assert all(step.measured <= 0 for step in ending.steps)
    lengths = [step.length for step in ending.steps]
    np.testing.assert_allclose(np.array(lengths[1:]) / lengths[:-1], 0.4, rtol=1e-6)
    assert ending.stopped == "6 steps in a row made things worse and were taken back"


def test_accepted_steps_lower_m_and_stay_in_their_radius(run):
    start, goals, retained = one_goal(run)
    ending = walk(
        run.model,
        start.theta,
        goals,
        retained,
        lambda v: v,
        until=EditRule(),
        steps=60,
        token_budget=200,
        cost=Cost(),
    )
    assert ending.reached
    assert all(
        step.radius is None or step.length <= step.radius * (1 + 1e-9) for step in ending.steps
    )
    merits = []
    for theta in (start.theta, ending.theta):
        with run.model.at(theta):
            merits.append(goals.merit(run.model, token_budget=200, cost=Cost()).value)
    fallen = sum(step.measured for step in ending.steps if step.accepted)
    assert merits[0] - merits[1] == pytest.approx(fallen, rel=1e-4)
    assert all(step.measured > 0 for step in ending.steps if step.accepted)
    assert all(step.predicted <= steps.STRIDE * merits[0] * (1 + 1e-6) for step in ending.steps)


def test_a_step_promises_a_tenth_of_m_and_at_most_half_of_what_is_left():
    region = TrustRegion(first=2.0)
    assert region.length(merit=2.0, slope=0.5) == pytest.approx(0.2 / 0.5)
    assert region.length(merit=0.1, slope=0.5) == pytest.approx(0.05 / 0.5)
    region.radius = 0.01
    assert region.length(merit=2.0, slope=0.5) == 0.01


@pytest.mark.parametrize(
    ("radius", "length", "measured", "after"),
    [
        (float("inf"), 2.0, 1.0, 3.0),  # the first step: 1.5 times its length
        (float("inf"), 2.0, 0.2, 1.2),  # a poor first one: 0.6 times its length
        (2.0, 2.0, 0.9, 3.0),  # good, and held back by the radius
        (2.0, 1.0, 0.9, 2.0),  # good, but held back by the forecast: says nothing about the radius
        (2.0, 2.0, 0.5, 2.0),  # neither good nor poor
        (2.0, 1.0, 0.29, 0.6),  # poor
        (2.0, 1.0, 0.0, 0.4),  # M did not fall: taken back
        (float("inf"), 1.0, -1.0, 0.4),
    ],
)
def test_the_radius_follows_measured_over_predicted(radius, length, measured, after):
    region = TrustRegion(first=1.0, radius=radius)
    region.judge(length, predicted=1.0, measured=measured)
    assert region.radius == pytest.approx(after)
    assert region.known_radius == region.radius


def test_before_the_first_step_no_radius_is_known():
    assert TrustRegion(first=1.0).known_radius is None


# ---- retained rows -------------------------------------------------------------------------------


def test_the_steps_of_a_record_have_the_retained_loss(run):
    assert all("retained" in step for step in edit_of(run).report["steps"])


def test_without_rest_only_the_changed_rows_are_run(run):
    alone = edit_of(run, rest=0, until="steps=3", steps=40)
    assert all(step["damage"] is None for step in alone.report["steps"])
    more = edit_of(run, rest=4, until="steps=3", steps=40)
    assert all(step["damage"] is not None for step in more.report["steps"])
    assert more.report["cost"]["row_gradients"] == alone.report["cost"]["row_gradients"] + 3 * 4


def test_the_damage_of_a_step_is_the_rise_of_its_rows_since_the_start(run):
    """One of two rows in a step; the second one is seen for the first time after some steps."""
    start, goals, _ = one_goal(run)
    tokens, seed, count = start.tokens.select([1, 2]), 0, 4
    rng = np.random.default_rng(seed)
    drawn = [int(rng.choice(2, 1, replace=False)[0]) for _ in range(count)]
    assert drawn[0] == drawn[1] != drawn[-1]
    ending = walk(
        run.model,
        start.theta,
        goals,
        RetainedRows(tokens, 1, seed, 1.0),
        lambda v: v,
        until=EditRule("steps", count),
        steps=count,
        token_budget=200,
        cost=Cost(),
    )
    before = mean_losses(run.model, tokens)[drawn]
    retained = np.array([step.retained for step in ending.steps])
    damage = [step.damage for step in ending.steps]
    np.testing.assert_allclose(damage, (retained - before) / before, atol=1e-6)
    assert damage[0] == pytest.approx(0, abs=1e-6)
    assert abs(damage[-1]) > 1e-4


def test_a_step_that_is_not_finite_is_refused(run):
    start, goals, retained = one_goal(run)
    with pytest.raises(NumericalError, match="a step is NaN or infinite: nothing is written"):
        walk(
            run.model,
            start.theta,
            goals,
            retained,
            lambda v: v * torch.nan,
            until=EditRule(),
            steps=3,
            token_budget=200,
            cost=Cost(),
        )


def identity_walk(run, goals, retained, until, steps):
    """A walk without curvature."""
    return walk(
        run.model,
        version(run).theta,
        goals,
        retained,
        lambda v: v,
        until=until,
        steps=steps,
        token_budget=200,
        cost=Cost(),
    )


def test_the_retained_part_weighs_what_keeps_the_retained_loss_where_it_is():
    towards, held = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([2.0, 1.0, 0.5])
    for gradient, moved in (([1.0, 1.0, 1.0], 0), ([-1.0, 1.0, 3.0], -2), ([0.0, 0.5, -0.5], 0)):
        g = torch.tensor(gradient)
        b = retained_weight(towards, held, g, 0.0)
        assert float((towards - b * held) @ g) == pytest.approx(moved, abs=1e-6)
        assert retained_weight(towards, held, g, 5.0) == pytest.approx(max(b, 5.0))
    # a solve that is no descent of theirs cannot hold them
    assert retained_weight(towards, -held, torch.tensor([1.0, 1.0, 1.0]), 0.0) == 0


def test_rows_that_lost_are_brought_back(run, monkeypatch):
    """Retained rows that were measured too low at the start seem to have lost: they are trained."""
    start, goals, _ = one_goal(run)
    retained = RetainedRows(start.tokens.select([1, 2]), 2, 0, 1.0)
    least, whole = [], steps.retained_weight

    def noted(towards, held, gradient, at_least):
        least.append(at_least)
        return whole(towards, held, gradient, at_least)

    monkeypatch.setattr(steps, "retained_weight", noted)
    for factor, expected in ((0.7, [1, 2, 4, 8, 8]), (1.3, [0] * 5)):
        least.clear()
        monkeypatch.setattr(
            steps, "shared_losses", lambda *a, f=factor, **b: f * mean_losses(*a, **b)
        )
        retained = replace(retained, max_damage=0.1)
        identity_walk(run, goals, retained, EditRule("steps", 5), 5)
        assert least == expected


class Scripted(Goals):
    """Goals whose merits come one after the other, whatever the parameters."""

    def merit(self, model, **_options):
        value = self.outputs.pop(0)
        return Merit(
            value, torch.ones(model.space.size), self.targets if value < 1 else 0 * self.targets
        )


@pytest.mark.parametrize(("until", "taken"), [("loss=2", 1), ("expected", 3)])
def test_expected_goals_are_reached_when_m_has_settled_too(run, until, taken):
    """The loss is there after the first step, and M falls by less than a hundredth in the third."""
    start = version(run)
    tokens, merits = start.tokens.select([0]), [1.0, 0.8, 0.7, 0.695, 0.6, 0.5]
    goals = Scripted(tokens, np.array([2.0]), np.array([True]), merits)
    alone = RetainedRows(start.tokens.select([1, 2]), 0, 0, 0.1)
    ending = identity_walk(run, goals, alone, EditRule.parse(until), 5)
    assert ending.reached
    assert len(ending.steps) == taken
