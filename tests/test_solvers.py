"""Every solver on every curvature: a true residual per column, and the direct answer where it converges."""

from __future__ import annotations

import pytest
import torch

import influence
from influence.curvature import Damped, dense
from influence.curvature.identity import IdentityCurvature
from influence.errors import InputError, NumericalError
from influence.scores import make_solver
from influence.solvers import CG, Direct, direct
from tests.conftest import build_model, examples, tokens_of

F64 = torch.float64
CURVATURES = {
    "ekfac": influence.EKFAC(),
    "kfac": influence.KFAC(),
    "fisher": influence.Fisher(samples=2),
    "ggn": influence.GGN(),
    "hessian": influence.Hessian(),
    "identity": influence.Identity(),
}


class Matrix:
    """A plain symmetric matrix as a curvature without a closed form."""

    name = "matrix"

    def __init__(self, C: torch.Tensor) -> None:
        self.C, self.size, self.blocks = C, len(C), (slice(0, len(C)),)

    def matvec(self, v):
        return v @ self.C

    def mean_eigenvalues(self):
        return self.C.trace().reshape(1) / len(self.C)

    def top_eigenvalues(self):
        return torch.linalg.eigvalsh(self.C)[-1:]


def spectrum(values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=F64, generator=generator)).Q
    return (Q * torch.tensor(values, dtype=F64)) @ Q.T


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run per curvature of the same model and rows; EK-FAC's also serves as preconditioner."""
    model = build_model("gpt2", layers=1, target_modules=["attn.c_attn", "mlp.c_proj"])
    folder = tmp_path_factory.mktemp("runs")
    return {
        name: influence.fit(model, examples(4), curvature=spec, directory=folder / name)
        for name, spec in CURVATURES.items()
    }


@pytest.mark.parametrize("solver", ["direct", "cg", "pcg"])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_every_solver_on_every_curvature(runs, curvature, solver):
    run = runs["ekfac" if solver == "pcg" and curvature in ("ggn", "hessian", "kfac") else curvature]
    operator = run.operator(curvature, "abs:0.05" if curvature == "hessian" else "mean:1")
    if solver == "pcg" and run.fitted_name not in ("ekfac", "kfac"):
        with pytest.raises(InputError, match="preconditioned CG needs EK-FAC factors"):
            make_solver(run, solver, operator)
        return
    v = torch.randn(2, run.model.space.size, dtype=F64, generator=torch.Generator().manual_seed(1))
    chosen = make_solver(run, solver, operator)
    if isinstance(chosen, CG):
        chosen = CG(tolerance=1e-9, max_iterations=400, preconditioner=chosen.preconditioner)
    solution = chosen.solve(operator, v)
    C = dense(operator.curvature) + torch.diag(operator.diagonal(v[0]))
    true = (solution.values @ C - v).norm(dim=1) / v.norm(dim=1)
    torch.testing.assert_close(solution.residuals, true, rtol=1e-3, atol=1e-12)
    positive_definite = bool((torch.linalg.eigvalsh(C) > 0).all())
    if positive_definite or solver == "direct":
        assert solution.converged.all(), solution.message
        expected = torch.linalg.solve(C, v.T).T
        assert (solution.values - expected).norm() / expected.norm() < 1e-6
    else:
        assert not solution.converged.all()
        assert "negative curvature" in solution.message


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
    model_free = IdentityCurvature(30)
    operator = Damped(model_free, torch.tensor([4.0], dtype=F64))
    v = torch.randn(2, 30, dtype=F64, generator=torch.Generator().manual_seed(0))
    solution = CG(preconditioner=operator).solve(operator, v)
    assert solution.converged.all()
    assert solution.iterations.tolist() == [1, 1]
    torch.testing.assert_close(solution.values, v / 4)


def test_ekfac_preconditioning_saves_products(tmp_path):
    """On gradients of other rows, as in scoring; a random right-hand side has nothing EK-FAC could know."""
    model = build_model("gpt2", layers=1, target_modules=["attn.c_attn", "mlp.c_proj"])
    run = influence.fit(model, examples(40), curvature=influence.EKFAC(samples=4), directory=tmp_path / "run")
    v = torch.cat([g for _, g, _ in influence.stream_gradients(model, tokens_of(model, examples(3, seed=5)))])
    operator = run.operator("ggn", "mean:1")
    plain = CG(tolerance=1e-6).solve(operator, v)
    preconditioned = CG(tolerance=1e-6, preconditioner=run.preconditioner(operator)).solve(operator, v)
    assert plain.converged.all()
    assert preconditioned.converged.all()
    assert int(preconditioned.iterations.max()) < 0.9 * int(plain.iterations.max())


def test_zero_columns_are_solved_by_zero():
    operator = Damped(Matrix(spectrum([1.0, 2.0, 3.0])), torch.tensor([0.1], dtype=F64))
    for solver in (CG(), Direct()):
        solution = solver.solve(operator, torch.zeros(2, 3, dtype=F64))
        assert solution.converged.all()
        assert not solution.values.any()


def test_a_wrong_closed_form_is_caught_by_its_residual():
    class Wrong(Matrix):
        def solve(self, v, lam):
            return v / lam.to(v)

    solution = Direct().solve(
        Damped(Wrong(spectrum([1.0, 2.0])), torch.tensor([0.1], dtype=F64)), torch.eye(2, dtype=F64)
    )
    assert not solution.converged.any()
    assert "relative residual above" in solution.message


def test_direct_refuses_a_dense_matrix_that_is_too_large(monkeypatch):
    monkeypatch.setattr(direct, "DENSE_LIMIT", 2)
    with pytest.raises(InputError, match="use the solver cg or pcg"):
        Direct().solve(
            Damped(Matrix(spectrum([1.0, 2.0, 3.0])), torch.tensor([0.1], dtype=F64)), torch.eye(3, dtype=F64)
        )


def test_nan_right_hand_sides_are_refused():
    operator = Damped(IdentityCurvature(3), torch.tensor([1.0]))
    with pytest.raises(NumericalError, match="not finite"):
        Direct().solve(operator, torch.full((1, 3), torch.nan))
