"""LiSSA: a scale below half the top eigenvalue diverges and says so."""

from __future__ import annotations

import torch

from influence.curvature import Damped
from influence.solvers import LiSSA
from tests.cases import Matrix, spectrum

F64 = torch.float64


def test_lissa_below_half_the_top_eigenvalue_says_that_it_diverged():
    C = spectrum(torch.logspace(-1, 1, 20).tolist())
    operator = Damped(Matrix(C), torch.tensor([0.1], dtype=F64))
    vectors = torch.linalg.eigh(C).eigenvectors.T
    v = torch.cat(
        [vectors[8:9], vectors.sum(0, keepdim=True)]
    )  # the first has nothing along the top eigenvector
    solution = LiSSA(scale=4.0, tolerance=1e-3).solve(operator, v)
    assert solution.converged.tolist() == [True, False]
    assert "1 of 2 columns diverged: scale c = 4 is below the top eigenvalue" in solution.message
    assert float(solution.residuals[1]) <= 1  # the best iterate, not the last
    assert int(solution.iterations[1]) < 40
    assert LiSSA(scale=5.5, tolerance=1e-3).solve(operator, v).converged.all()  # above half of 10.1
