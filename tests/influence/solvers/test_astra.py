"""ASTRA: it begins with the preconditioner's answer and never ends worse."""

from __future__ import annotations

import torch

from influence.curvature import Damped
from influence.curvature.identity import IdentityCurvature
from influence.solvers import ASTRA
from tests.cases import Matrix, damped, spectrum

F64 = torch.float64


def test_astra_begins_with_the_preconditioners_answer_and_never_ends_worse(runs):
    operator = damped(runs, "ggn")
    v = torch.randn(
        3, operator.curvature.size, dtype=F64, generator=torch.Generator().manual_seed(4)
    )
    preconditioner = runs["ekfac"].preconditioner(operator)
    answer = preconditioner.curvature.solve(v, preconditioner.lam)
    residuals = (operator.matvec(answer) - v).norm(dim=1) / v.norm(dim=1)
    first = ASTRA(preconditioner, step=1.0, max_iterations=1).solve(operator, v)
    torch.testing.assert_close(first.values, answer, rtol=1e-12, atol=0)
    for step in (1.0, 50.0, None):
        later = ASTRA(preconditioner, step=step, max_iterations=30).solve(operator, v)
        assert bool((later.residuals <= residuals.clamp(max=1) * (1 + 1e-12)).all())
        assert ("step a = 50 is above twice" in later.message) == (step == 50.0)


def test_astra_that_improves_on_nothing_returns_the_preconditioner_s_answer_and_not_zero():
    operator = Damped(Matrix(spectrum([-2.0, 1.0, 3.0])), torch.tensor([0.5], dtype=F64))
    rough = Damped(
        IdentityCurvature((3,)), torch.tensor([0.01], dtype=F64)
    )  # its answer's residual is above 1
    v = torch.eye(3, dtype=F64)
    solution = ASTRA(rough, step=1.0).solve(operator, v)
    answer = rough.curvature.solve(v, rough.lam)
    assert not solution.converged.any()
    assert solution.values.any(dim=1).all()
    worse = (operator.matvec(answer) - v).norm(dim=1) > 1
    assert worse.any()
    torch.testing.assert_close(
        solution.values[worse & (solution.residuals > 1)], answer[worse & (solution.residuals > 1)]
    )
    assert (worse & (solution.residuals > 1)).any()
