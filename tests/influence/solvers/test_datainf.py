"""DataInf against its formula written out in plain numbers, exact for one row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from influence.curvature import Damped
from influence.errors import InputError
from influence.solvers import ASTRA, CG, SGD, DataInf, Direct, LiSSA
from tests.cases import Matrix
from tests.conftest import build_model, examples, fit_end, tokens_of
from tests.oracles import adam_metric, close, estimated, plain_gradients, plain_mean

N, Q = 8, 3
ONE = {"layers": 1, "target_modules": ["attn.c_attn"]}
F64 = torch.float64

F64 = torch.float64


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
        "is an approximation of the empirical Fisher's inverse: worst residual "
        f"{float(true.max()):.1e}"
    ) in (solution.message)
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


@pytest.fixture(scope="module")
def model():
    return build_model("gpt2", **ONE)


@pytest.mark.parametrize("geometry", ["raw", "adam"])
@pytest.mark.parametrize("curvature", [None, "ggn"])
def test_datainf_is_its_formula_with_and_without_stored_gradients(
    model, tmp_path, double, curvature, geometry
):
    """Weights that differ from row to row, and a stream of rows that is not in their order."""
    data, queries = examples(N), examples(Q, seed=1)
    w = 1 / (N * tokens_of(model, data).counts)
    assert len(set(w)) > 2
    by_store = []
    for store in ("always", "never"):
        fitted = fit_end(
            model,
            data,
            reduction="example",
            store=store,
            token_budget=25,
            geometry=geometry,
            directory=tmp_path / store,
        )
        scores = fitted.score(queries, solver="datainf", curvature=curvature, credit="additive")
        by_store.append(scores.values)
        order = np.concatenate([indices for indices, _ in fitted.gradient_blocks()])
        assert (list(order) == list(range(N))) == (store == "always")
    g, q = plain_gradients(model, data), plain_gradients(model, queries, plain_mean)
    if geometry == "adam":
        T = adam_metric(model, estimated(g, w))
        g, q = g @ T, q @ T
    x = torch.zeros_like(q)
    diagonal = fitted.operator(curvature).diagonal(g[0])
    for leaf in model.space.leaves:
        part, lam = leaf.slice, float(diagonal[leaf.start])
        eye = torch.eye(leaf.stop - leaf.start, dtype=F64)
        for i in range(N):
            matrix = N * w[i] * torch.outer(g[i, part], g[i, part]) + lam * eye
            x[:, part] += torch.linalg.solve(matrix, q[:, part].T).T / N
    expected = (x @ g.T).numpy() * w
    close(by_store[0], expected, 1e-8)
    close(by_store[1], expected, 1e-8)
