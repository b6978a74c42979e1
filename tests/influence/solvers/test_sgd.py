"""SGD with momentum: its iterates are the recurrence, and its defaults contract."""

from __future__ import annotations

import pytest
import torch

from influence.curvature import Damped
from influence.solvers import SGD
from tests.cases import Matrix, spectrum

F64 = torch.float64


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_the_iterates_are_heavy_ball_on_the_quadratic(momentum):
    """`u <- beta u + A x - v, x <- x - eta u` from x = 0; the best of the iterates is returned."""
    A = spectrum([1.0, 1.5, 2.0, 3.0]) + 0.5 * torch.eye(4, dtype=F64)
    operator = Damped(Matrix(A - 0.5 * torch.eye(4, dtype=F64)), torch.tensor([0.5], dtype=F64))
    v = torch.tensor([[1.0, -2.0, 0.5, 3.0]], dtype=F64)
    x, u = torch.zeros_like(v), torch.zeros_like(v)
    iterates = []
    for _ in range(5):
        u = momentum * u + x @ A - v
        x = x - 0.1 * u
        iterates.append(x)
    best = min(iterates, key=lambda x: float((x @ A - v).norm()))
    solver = SGD(learning_rate=0.1, momentum=momentum, max_iterations=5, tolerance=1e-12)
    solution = solver.solve(operator, v)
    torch.testing.assert_close(solution.values, best, rtol=1e-12, atol=1e-12)
    assert solution.iterations.tolist() == [5]
    assert not solution.converged.any()


def test_a_learning_rate_that_is_too_large_is_named():
    operator = Damped(Matrix(spectrum([1.0, 2.0, 10.0])), torch.tensor([0.1], dtype=F64))
    solution = SGD(learning_rate=0.5, momentum=0.0).solve(operator, torch.eye(3, dtype=F64))
    assert not solution.converged.all()
    assert "diverged: learning rate 0.5 is too large" in solution.message
