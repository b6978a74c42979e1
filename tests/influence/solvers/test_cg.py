"""Conjugate gradients: each column stops on its own residual, negative curvature is reported."""

from __future__ import annotations

import torch

import influence
from influence.curvature import Damped
from influence.curvature.identity import IdentityCurvature
from influence.solvers import CG
from tests.cases import Matrix, spectrum
from tests.conftest import build_model, examples, fit_end, tokens_of

F64 = torch.float64


def test_cg_stops_each_column_on_its_own_residual():
    """One hard column among easy ones: the mean residual would have stopped it early."""
    C = spectrum([1.0] * 49 + [1e4])
    operator = Damped(Matrix(C), torch.tensor([1e-3], dtype=F64))
    values, vectors = torch.linalg.eigh(C)
    easy, hard = vectors[:, :20].T.clone(), (vectors[:, -1] + 1e-3 * vectors.sum(1))[None]
    solution = CG(tolerance=1e-8).solve(operator, torch.cat([easy, hard]))
    assert solution.converged.all()
    assert (solution.residuals <= 1e-8).all()
    assert int(solution.iterations[:20].max()) == 1
    assert int(solution.iterations[20]) == 2  # two distinct eigenvalues
    assert values[-1] > 9999


def test_cg_that_runs_out_of_iterations_says_which_columns():
    C = spectrum(torch.logspace(-6, 4, 60).tolist())
    operator = Damped(Matrix(C), torch.tensor([1e-7], dtype=F64))
    v = torch.randn(3, 60, dtype=F64, generator=torch.Generator().manual_seed(0))
    v[1] = torch.linalg.eigh(C).eigenvectors[:, -1]
    solution = CG(tolerance=1e-10, max_iterations=8).solve(operator, v)
    assert solution.converged.tolist() == [False, True, False]
    assert int(solution.iterations.max()) == 8
    assert "2 of 3 columns have a relative residual above" in solution.message


def test_cg_reports_negative_curvature():
    operator = Damped(Matrix(spectrum([-2.0, 1.0, 3.0])), torch.tensor([0.5], dtype=F64))
    solution = CG().solve(operator, torch.eye(3, dtype=F64))
    assert not solution.converged.all()
    assert "not positive definite" in solution.message


def test_a_perfect_preconditioner_needs_one_product():
    model_free = IdentityCurvature((30,))
    operator = Damped(model_free, torch.tensor([4.0], dtype=F64))
    v = torch.randn(2, 30, dtype=F64, generator=torch.Generator().manual_seed(0))
    solution = CG(preconditioner=operator).solve(operator, v)
    assert solution.converged.all()
    assert solution.iterations.tolist() == [1, 1]
    torch.testing.assert_close(solution.values, v / 4)


def test_ekfac_preconditioning_saves_products(tmp_path):
    """On gradients of other rows, as in scoring; a random right-hand side has nothing EK-FAC could
    know.
    """
    model = build_model("gpt2", layers=1, target_modules=["attn.c_attn", "mlp.c_proj"])
    run = fit_end(
        model, examples(40), curvature=influence.EKFAC(samples=4), directory=tmp_path / "run"
    )
    v = torch.cat(
        [g for _, g, _ in influence.stream_gradients(model, tokens_of(model, examples(3, seed=5)))]
    )
    operator = run.operator("ggn", "mean:1")
    plain = CG(tolerance=1e-6).solve(operator, v)
    preconditioned = CG(tolerance=1e-6, preconditioner=run.preconditioner(operator)).solve(
        operator, v
    )
    assert plain.converged.all()
    assert preconditioned.converged.all()
    assert int(preconditioned.iterations.max()) < 0.9 * int(plain.iterations.max())
