"""Newton's method on the edited objective, against a refit by SciPy."""

from __future__ import annotations

import pytest
import torch

from influence.errors import NumericalError
from tests.unlearn.edits.convex import Head
from tests.unlearn.edits.helpers import F64, near
from unlearn.edits.newton import optimum


@pytest.mark.parametrize("gone", [[3], [0, 5, 6, 9]])
def test_newton_with_the_curvature_taken_again_converges_to_the_refit(gone):
    head = Head()
    w = head.w.clone()
    w[gone] = 0
    held = head.gradient(head.theta, head.x, head.y, head.w)

    def residual(theta):
        return head.gradient(theta, head.x, head.y, w) - held + head.lam * (theta - head.theta)

    def solve(theta, v):
        rows = head.rows(theta, head.x, w)
        return torch.linalg.solve(rows.T @ rows + head.lam * torch.eye(len(v), dtype=F64), v)

    end = optimum(residual, solve, head.theta)
    assert end.converged
    assert 2 < len(end.norms) < 12  # Newton's own speed
    refit = head.refit(w)
    near(end.theta - head.theta, refit - head.theta, 1e-8)
    one_shot = head.theta - solve(head.theta, residual(head.theta))
    assert (one_shot - refit).norm() > 1e-4 * (refit - head.theta).norm()


def test_newton_says_where_it_stopped_short():
    end = optimum(lambda x: x**2 + 1, lambda x, v: v / (2 * x + 1e-3), torch.ones(1, dtype=F64))
    assert not end.converged
    assert end.norms == sorted(end.norms, reverse=True)
    with pytest.raises(NumericalError, match="NaN or infinite"):
        optimum(lambda x: x * torch.nan, lambda x, v: v, torch.ones(1, dtype=F64))


def test_newton_ends_at_its_start_where_that_is_the_optimum():
    def solve(theta, v):
        pytest.fail("there is nothing to solve")

    end = optimum(lambda x: 0 * x, solve, torch.ones(2, dtype=F64))
    assert end.converged
    assert end.norms == [0]
    assert torch.equal(end.theta, torch.ones(2, dtype=F64))


def test_steps_that_overshoot_are_halved():
    """arctan from 2: a whole Newton step lands at -3.5, farther away than before, and diverges."""
    values = []

    def residual(x):
        values.append(float(x))
        return torch.arctan(x)

    end = optimum(residual, lambda x, v: v * (1 + x**2), torch.full((1,), 2.0, dtype=F64))
    assert abs(values[1]) > 3
    assert end.converged
    assert abs(float(end.theta)) < 1e-9
