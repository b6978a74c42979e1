"""Every solver on every curvature: a true residual per column, and the direct answer where it converges."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import influence
from influence.curvature import Damped, dense
from influence.curvature.base import Subsampled
from influence.curvature.identity import IdentityCurvature
from influence.errors import InputError, NumericalError
from influence.solvers import ASTRA, CG, SGD, DataInf, Direct, LiSSA, direct
from influence.solvers.descent import MARGIN, Batches, top_eigenvalue
from tests.conftest import build_model, examples, fit_end, tokens_of

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
        self.C, self.size = C, len(C)
        self.blocks: tuple[slice, ...] = (slice(0, len(C)),)

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
    """One run per curvature of the same 8-site model and rows; EK-FAC's also serves as preconditioner."""
    model = build_model("gpt2", layers=2, r=1)
    assert len(model.sites) == 8
    folder = tmp_path_factory.mktemp("runs")
    return {
        name: fit_end(model, examples(4), curvature=spec, directory=folder / name)
        for name, spec in CURVATURES.items()
    }


def damped(runs, curvature):
    """One lambda for all blocks, 0.3 of the top eigenvalue; too little of it for the Hessian."""
    top = float(runs[curvature].curvature(curvature).top_eigenvalues().max())
    return runs[curvature].operator(
        curvature, "abs:0.05" if curvature == "hessian" else f"abs:{0.3 * top}"
    )


@pytest.fixture(scope="module")
def dense_of(runs):
    """The dense `C + lambda I` of each curvature, by products with the identity."""
    found = {}

    def get(curvature):
        if curvature not in found:
            operator = damped(runs, curvature)
            found[curvature] = dense(operator.curvature) + torch.diag(
                operator.diagonal(torch.empty(0, dtype=F64))
            )
        return found[curvature]

    return get


def solver_of(runs, name, operator):
    """Every solver, tight enough for 1e-6 in the solution."""
    if name == "direct":
        return Direct()
    if name in ("pcg", "astra"):
        identity = operator.curvature.name == "identity"  # no EK-FAC is near it
        preconditioner = operator if identity else runs["ekfac"].preconditioner(operator)
        if name == "astra":
            return ASTRA(preconditioner, tolerance=1e-8, max_iterations=300)
        return CG(tolerance=1e-9, max_iterations=400, preconditioner=preconditioner, name="pcg")
    return {
        "cg": CG(tolerance=1e-9, max_iterations=400),
        "lissa": LiSSA(tolerance=1e-8, max_iterations=300),
        "sgd": SGD(tolerance=1e-8, max_iterations=300),
    }[name]


@pytest.mark.parametrize("solver", ["direct", "cg", "pcg", "lissa", "astra", "sgd"])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_every_solver_on_every_curvature(runs, dense_of, curvature, solver):
    """The dense answer to 1e-6, or the true residual of a column that is not converged."""
    operator = damped(runs, curvature)
    v = torch.randn(
        2, operator.curvature.size, dtype=F64, generator=torch.Generator().manual_seed(1)
    )
    solution = solver_of(runs, solver, operator).solve(operator, v)
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


@pytest.mark.parametrize("solver", ["lissa", "sgd"])
def test_first_order_solvers_reach_a_positive_definite_hessian(runs, dense_of, solver):
    lowest = float(torch.linalg.eigvalsh(dense_of("hessian"))[0]) - 0.05
    operator = runs["hessian"].operator("hessian", f"abs:{-1.3 * lowest}")
    v = torch.randn(
        2, operator.curvature.size, dtype=F64, generator=torch.Generator().manual_seed(1)
    )
    solution = solver_of(runs, solver, operator).solve(operator, v)
    assert solution.converged.all(), solution.message
    C = dense_of("hessian") - torch.eye(v.shape[1], dtype=F64) * (0.05 + 1.3 * lowest)
    expected = torch.linalg.solve(C, v.T).T
    assert (solution.values - expected).norm() / expected.norm() < 1e-6


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_products_on_a_partition_of_the_rows_sum_to_the_product(runs, curvature):
    """`sum_parts (b / n) C_part v = C v`: each part is unbiased under uniform draws."""
    C = runs[curvature].operator(curvature).curvature
    assert isinstance(C, Subsampled)
    assert C.count == 4
    full = runs[curvature].operator(curvature).curvature
    v = torch.randn(2, full.size, dtype=F64, generator=torch.Generator().manual_seed(2))
    for parts in ([[0, 1], [2, 3]], [[3], [0, 2, 1]]):
        total = sum(C.matvec_on(v, np.array(part)) * (len(part) / 4) for part in parts)
        torch.testing.assert_close(total, full.matvec(v), rtol=0, atol=1e-10)
    assert not torch.allclose(C.matvec_on(v, np.array([0])), full.matvec(v), rtol=1e-2)


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


def test_zero_columns_are_solved_by_zero():
    operator = Damped(Matrix(spectrum([1.0, 2.0, 3.0])), torch.tensor([0.1], dtype=F64))
    preconditioner = Damped(IdentityCurvature(3), torch.tensor([1.0], dtype=F64))
    for solver in (CG(), Direct(), LiSSA(), SGD(), ASTRA(preconditioner)):
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
            Damped(Matrix(spectrum([1.0, 2.0, 3.0])), torch.tensor([0.1], dtype=F64)),
            torch.eye(3, dtype=F64),
        )


def test_nan_right_hand_sides_are_refused():
    operator = Damped(IdentityCurvature(3), torch.tensor([1.0]))
    with pytest.raises(NumericalError, match="not finite"):
        Direct().solve(operator, torch.full((1, 3), torch.nan))
    with pytest.raises(NumericalError, match="not finite"):
        LiSSA().solve(operator, torch.full((1, 3), torch.nan))


# ---- LiSSA, ASTRA, SGD ---------------------------------------------------------------------------------------


class Scaled(Matrix):
    """A matrix with a closed-form inverse: a preconditioner for another."""

    def solve(self, v, lam):
        return torch.linalg.solve(self.C + lam * torch.eye(len(self.C), dtype=F64), v.T).T


class Rows(Matrix):
    """`C = sum_i w_i G_i` over training rows, with products on some of them."""

    def __init__(self, n=12, size=10, seed=0):
        F = torch.randn(n, 3, size, dtype=F64, generator=torch.Generator().manual_seed(seed))
        self.parts = torch.einsum("nts,ntu->nsu", F, F) / n
        self.count = n
        super().__init__(self.parts.sum(0))

    def matvec_on(self, v, rows):
        return v @ self.parts[rows].sum(0) * (self.count / len(rows))


def matrix_solvers(operator):
    """The three of them on a matrix; ASTRA's preconditioner is a perturbed inverse."""
    top, size = float(operator.curvature.top_eigenvalues()), operator.curvature.size
    noise = spectrum(torch.linspace(0, 0.5 * top, size).tolist(), 7)
    preconditioner = Damped(Scaled(operator.curvature.C + noise), operator.lam)
    options = {"tolerance": 1e-8, "max_iterations": 20000}
    return [LiSSA(**options), SGD(**options), ASTRA(preconditioner, **options)]


def test_first_order_solvers_stop_each_column_on_its_own_residual():
    C = spectrum(torch.logspace(-1, 1, 30).tolist())
    operator = Damped(Matrix(C), torch.tensor([1e-2], dtype=F64))
    vectors = torch.linalg.eigh(C).eigenvectors.T
    v = torch.cat([vectors[-4:], vectors.sum(0, keepdim=True)])
    for solver in matrix_solvers(operator):
        solution = solver.solve(operator, v)
        assert solution.converged.all(), solver
        assert float(solution.residuals.max()) <= 1e-8
        expected = torch.linalg.solve(C + 1e-2 * torch.eye(30, dtype=F64), v.T).T
        assert (solution.values - expected).norm() / expected.norm() < 1e-6
        assert int(solution.iterations[:4].max()) < int(solution.iterations[4]), solver


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


def test_a_step_estimated_too_long_is_halved(monkeypatch):
    """Power iteration that underestimates: what the first divergence teaches is used."""
    from influence.solvers import descent

    monkeypatch.setattr(descent, "MARGIN", 0.2)
    C = spectrum(torch.logspace(-1, 1, 20).tolist())
    operator = Damped(Matrix(C), torch.tensor([0.1], dtype=F64))
    v = torch.randn(2, 20, dtype=F64, generator=torch.Generator().manual_seed(0))
    for solver in matrix_solvers(operator):
        assert solver.solve(operator, v).converged.all(), solver


def test_the_top_eigenvalue_with_and_without_a_preconditioner():
    C = spectrum(torch.logspace(-3, 2, 40).tolist())
    operator = Damped(Matrix(C), torch.tensor([0.5], dtype=F64))
    batches = Batches.of(operator, None, 0, "lissa")
    found, products = top_eigenvalue(batches, torch.empty(40, dtype=F64))
    assert found / MARGIN == pytest.approx(100.5, rel=0.02)
    assert products <= 12
    P = C.diagonal()
    exact = float(
        torch.linalg.eigvals((C + 0.5 * torch.eye(40, dtype=F64)) / P[:, None]).real.max()
    )
    found, _ = top_eigenvalue(batches, torch.empty(40, dtype=F64), lambda r: r / P)
    assert found / MARGIN == pytest.approx(exact, rel=0.05)
    assert found / MARGIN <= exact * (1 + 1e-12)


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


@pytest.mark.parametrize("solver", ["lissa", "sgd", "astra"])
def test_mini_batches_are_unbiased_and_honest(solver):
    """The mean over seeds nears the solution as 1/sqrt(seeds); every single residual is the true one."""
    rows = Rows()
    operator = Damped(rows, torch.tensor([1.0], dtype=F64))
    C = rows.C + torch.eye(10, dtype=F64)
    v = torch.randn(2, 10, dtype=F64, generator=torch.Generator().manual_seed(3))
    preconditioner = Damped(Scaled(torch.diag(rows.C.diagonal())), operator.lam)
    found = []
    for seed in range(8):
        options = {"batch_size": 4, "seed": seed, "max_iterations": 240, "tolerance": 1e-8}
        one = {
            "lissa": LiSSA(**options),
            "sgd": SGD(**options),
            "astra": ASTRA(preconditioner, **options),
        }[solver]
        solution = one.solve(operator, v)
        true = (solution.values @ C - v).norm(dim=1) / v.norm(dim=1)
        torch.testing.assert_close(solution.residuals, true)
        assert not solution.converged.any()
        assert "relative residual above" in solution.message
        found.append(solution.values)
    expected = torch.linalg.solve(C, v.T).T
    errors = torch.stack([(one - expected).norm() for one in found]) / expected.norm()
    mean = (torch.stack(found).mean(0) - expected).norm() / expected.norm()
    assert float(errors.max()) < 0.08  # 0.14 to 0.16 without the averaging
    assert float(mean) < 0.55 * float(errors.mean())
    loose = {"batch_size": 4, "seed": 0, "max_iterations": 4000, "tolerance": 0.2}
    one = {"lissa": LiSSA(**loose), "sgd": SGD(**loose), "astra": ASTRA(preconditioner, **loose)}[
        solver
    ]
    solution = one.solve(operator, v)
    assert solution.converged.all()
    assert int(solution.iterations.max()) < 1000  # the check of the full residual ended it


def test_mini_batches_of_the_ggn(runs, dense_of):
    operator, v = damped(runs, "ggn"), torch.eye(len(dense_of("ggn")), dtype=F64)[:2]
    solution = LiSSA(batch_size=2, max_iterations=100, tolerance=1e-9).solve(operator, v)
    true = (solution.values @ dense_of("ggn") - v).norm(dim=1) / v.norm(dim=1)
    torch.testing.assert_close(solution.residuals, true, rtol=1e-6, atol=0)
    assert bool((true < 1).all())


def test_a_mini_batch_step_that_overflows_is_reported():
    operator = Damped(Rows(), torch.tensor([1.0], dtype=F64))
    solution = LiSSA(scale=1e-3, batch_size=3, max_iterations=5000).solve(
        operator, torch.eye(10, dtype=F64)[:2]
    )
    assert not solution.converged.any()
    assert "2 of 2 columns diverged" in solution.message
    assert torch.isfinite(solution.values).all()


def test_options_that_cannot_work_are_refused(runs):
    operator = damped(runs, "ggn")
    v = torch.zeros(1, operator.curvature.size, dtype=F64)
    with pytest.raises(InputError, match="'ekfac' has no products on a subset of its rows"):
        LiSSA(batch_size=2).solve(damped(runs, "ekfac"), v)
    with pytest.raises(InputError, match="batch_size 5; expected 1 to 4, the training rows"):
        SGD(batch_size=5).solve(operator, v)
    with pytest.raises(InputError, match="scale 0"):
        LiSSA(scale=0)
    with pytest.raises(InputError, match="step -1"):
        ASTRA(damped(runs, "ekfac"), step=-1)
    with pytest.raises(InputError, match="'ggn', which has no closed-form inverse"):
        ASTRA(operator)
    with pytest.raises(InputError, match="learning_rate 0"):
        SGD(learning_rate=0.0)
    with pytest.raises(InputError, match=r"momentum 1\.5"):
        SGD(momentum=1.5)


# ---- DataInf -------------------------------------------------------------------------------------------------


def gradients_of(n, size, seed=0):
    return torch.randn(n, size, dtype=F64, generator=torch.Generator().manual_seed(seed))


def test_datainf_of_one_row_is_exact():
    """n = 1: Sherman-Morrison; the empirical Fisher is w g g^T."""
    g, w = gradients_of(1, 9), torch.tensor([0.7], dtype=F64)
    operator = Damped(Matrix(w * g.T @ g), torch.tensor([0.3], dtype=F64))
    v = gradients_of(3, 9, seed=1)
    solution = DataInf(lambda: iter([g]), w, (slice(0, 9),)).solve(operator, v)
    expected = torch.linalg.solve(w * g.T @ g + 0.3 * torch.eye(9, dtype=F64), v.T).T
    torch.testing.assert_close(solution.values, expected, rtol=1e-10, atol=1e-12)
    assert solution.converged.all()


def test_datainf_is_its_formula_and_names_itself_an_approximation():
    n, blocks, lam = 7, (slice(0, 4), slice(4, 9)), torch.tensor([0.3, 2.0], dtype=F64)
    g, w = gradients_of(n, 9), torch.linspace(0.05, 0.3, n, dtype=F64)
    matrix = Matrix(torch.einsum("n,np,nq->pq", w, g, g))
    matrix.blocks = blocks
    operator = Damped(matrix, lam)
    v = gradients_of(2, 9, seed=1)
    streams = []

    def rows():
        streams.append(1)
        return iter(g.split(3))

    solution = DataInf(rows, w, blocks).solve(operator, v)
    assert len(streams) == 1  # all columns and blocks from one stream
    for k in range(2):
        for block, value in zip(blocks, lam.tolist(), strict=True):
            total = [0.0] * (block.stop - block.start)
            vb = v[k, block].tolist()
            for i in range(n):
                gb = g[i, block].tolist()
                dot, square = (
                    sum(a * b for a, b in zip(vb, gb, strict=True)),
                    sum(a * a for a in gb),
                )
                factor = n * float(w[i]) * dot / (value + n * float(w[i]) * square)
                total = [
                    t + (a - factor * b) / (n * value)
                    for t, a, b in zip(total, vb, gb, strict=True)
                ]
            torch.testing.assert_close(
                solution.values[k, block], torch.tensor(total, dtype=F64), rtol=1e-12, atol=1e-14
            )
    true = (operator.matvec(solution.values) - v).norm(dim=1) / v.norm(dim=1)
    torch.testing.assert_close(solution.residuals, true)
    assert not solution.converged.any()
    assert (
        f"is an approximation of the empirical Fisher's inverse: worst residual {float(true.max()):.1e}"
        in (solution.message)
    )
    assert DataInf.approximate
    assert not any(solver.approximate for solver in (CG, Direct, LiSSA, ASTRA, SGD))


def test_datainf_refuses_blocks_coarser_than_the_damping_and_missing_rows():
    g, w = gradients_of(2, 4), torch.ones(2, dtype=F64)
    matrix = Matrix(g.T @ g)
    matrix.blocks = (slice(0, 2), slice(2, 4))
    operator = Damped(matrix, torch.tensor([0.1, 0.2], dtype=F64))
    with pytest.raises(InputError, match="block 0:4, on which lambda is not constant"):
        DataInf(lambda: iter([g]), w, (slice(0, 4),)).solve(operator, g)
    with pytest.raises(InputError, match="2 weights and a stream of 1 gradients"):
        DataInf(lambda: iter([g[:1]]), w, matrix.blocks).solve(operator, g)


def test_astra_that_improves_on_nothing_returns_the_preconditioner_s_answer_and_not_zero():
    operator = Damped(Matrix(spectrum([-2.0, 1.0, 3.0])), torch.tensor([0.5], dtype=F64))
    rough = Damped(
        IdentityCurvature(3), torch.tensor([0.01], dtype=F64)
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
