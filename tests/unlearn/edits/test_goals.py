"""The merit of an edit and its gradient, against a hand-written objective and autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from influence.cost import Cost
from tests.unlearn.edits.helpers import hand_made_merit, near, random
from unlearn.edits.goals import Goals
from unlearn.record.losses import measure


def test_the_merit_and_its_gradient_are_those_of_a_hand_written_objective(goal_rows):
    model, goals = goal_rows.start.model, goal_rows.goals()
    log_q = {i: goals.outputs.of(np.array([i])) for i in range(7)}
    theta = goal_rows.start.theta
    theta = (theta + 0.05 * random(3, model.space.size).to(theta)).requires_grad_(True)
    value = hand_made_merit(goal_rows, log_q)(theta)
    expected = torch.autograd.grad(value, theta)[0]
    cost, tolerance = Cost(), goal_rows.tolerance
    with model.at(theta.detach()):
        in_parts = goals.merit(model, token_budget=25, cost=cost)
        at_once = goals.merit(model, token_budget=10_000, cost=Cost())
        losses = measure(model, goal_rows.tokens).loss
    for merit in (in_parts, at_once):
        near(merit.gradient, expected, tolerance)
        assert merit.value == pytest.approx(float(value.detach()), rel=tolerance)
    np.testing.assert_allclose(in_parts.losses, losses, rtol=10 * tolerance)
    assert cost.gradients == 7


def goals_of(targets, rises):
    """Goals whose rows do not matter."""
    rises = np.array(rises)
    return Goals(None, np.array(targets), rises)


def test_gaps_are_what_is_missing_on_the_side_that_counts():
    goals = goals_of([3.0, 3.0, 1.0, 1.0], [True, True, False, False])
    gaps = goals.gaps(np.array([2.0, 4.0, 2.5, 0.5]))
    np.testing.assert_allclose(gaps, [1, 0, 1.5, 0])


@pytest.mark.parametrize(
    ("losses", "reached"),
    [
        ([3.0, 1.0], True),
        ([2.92, 1.0], True),  # within 3 % of the target
        ([2.9, 1.0], False),
        ([3.0, 1.02], True),
        ([3.0, 1.04], False),  # one side is not enough
        ([9.0, 1.04], False),  # and does not make up for the other
    ],
)
def test_goals_are_reached_when_both_sides_are_near(losses, reached):
    assert goals_of([3.0, 1.0], [True, False]).reached(np.array(losses)) == reached


def test_a_row_past_its_target_makes_up_for_one_that_is_short_of_it():
    goals = goals_of([3.0, 5.0, 1.0, 2.0], [True, True, False, False])
    assert goals.reached(np.array([4.0, 4.0, 1.5, 1.5]))
    assert not goals.reached(np.array([3.5, 4.0, 1.5, 1.5]))
    assert not goals.reached(np.array([4.0, 4.0, 1.5, 1.7]))
