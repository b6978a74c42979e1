"""Every solver on every curvature: a true residual per column, and the direct answer."""

from __future__ import annotations

import pytest
import torch

from influence.curvature import Damped
from influence.curvature.identity import IdentityCurvature
from influence.errors import NumericalError
from influence.solvers import ASTRA, CG, SGD, DataInf, Direct, LiSSA
from influence.solvers.base import MOST_COPIES
from tests.cases import CURVATURES, SOLVERS, Matrix, damped, spectrum

F64 = torch.float64


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("curvature", CURVATURES)
def test_every_solver_on_every_curvature(runs, dense_of, curvature, solver):
    """The dense answer to 1e-6, or the true residual of a column that is not converged."""
    operator = damped(runs, curvature)
    v = torch.randn(
        2, operator.curvature.size, dtype=F64, generator=torch.Generator().manual_seed(1)
    )
    solution = SOLVERS[solver](runs, operator).solve(operator, v)
    C = dense_of(curvature)
    true = (solution.values @ C - v).norm(dim=1) / v.norm(dim=1)
    torch.testing.assert_close(solution.residuals, true, rtol=1e-3, atol=1e-12)
    if curvature != "hessian" or solver == "direct":
        assert solution.converged.all(), solution.message
        expected = torch.linalg.solve(C, v.T).T
        assert (solution.values - expected).norm() / expected.norm() < 1e-6
    else:
        assert bool((torch.linalg.eigvalsh(C) < 0).any())
        assert not solution.converged.all()
        assert "negative curvature" in solution.message


def test_zero_columns_are_solved_by_zero():
    operator = Damped(Matrix(spectrum([1.0, 2.0, 3.0])), torch.tensor([0.1], dtype=F64))
    preconditioner = Damped(IdentityCurvature((3,)), torch.tensor([1.0], dtype=F64))
    for solver in (CG(), Direct(), LiSSA(), SGD(), ASTRA(preconditioner)):
        solution = solver.solve(operator, torch.zeros(2, 3, dtype=F64))
        assert solution.converged.all()
        assert not solution.values.any()


def test_nan_right_hand_sides_are_refused():
    operator = Damped(IdentityCurvature((3,)), torch.tensor([1.0]))
    with pytest.raises(NumericalError, match="not finite"):
        Direct().solve(operator, torch.full((1, 3), torch.nan))
    with pytest.raises(NumericalError, match="not finite"):
        LiSSA().solve(operator, torch.full((1, 3), torch.nan))


def test_every_solver_says_how_many_vectors_it_holds():
    """By them queries are solved in chunks that fit the memory."""
    held = {solver.__name__: solver.copies for solver in (Direct, CG, DataInf, LiSSA, SGD, ASTRA)}
    expected = {"Direct": 1, "CG": 8, "DataInf": 10, "LiSSA": 12, "SGD": 12, "ASTRA": 12}
    assert held == expected
    assert max(held.values()) == MOST_COPIES
    assert "copies" not in vars(CG())  # a solver's own numbers go on record, and this is none
