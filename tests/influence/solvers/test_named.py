"""Every solver by its name, through `run.score`."""

from __future__ import annotations

import pytest
import torch

import influence
from influence.solvers.named import SOLVERS
from tests.conftest import build_model, examples, tokens_of
from tests.oracles import (
    b_times,
    close,
    dense_ggn,
    plain_gradients,
    plain_mean,
)

N, Q = 8, 3


ONE = {"layers": 1, "target_modules": ["attn.c_attn"]}


@pytest.fixture(scope="module")
def model():
    return build_model("gpt2", **ONE)


@pytest.mark.slow
@pytest.mark.parametrize("curvature", [None, "ggn"])
@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "datainf"])
def test_every_solver_by_name(model, tmp_path, double, solver, curvature):
    data, queries = examples(5), examples(Q, seed=1)
    path = (1.0,) if curvature else (0.5, 1.0)
    fitted = influence.fit(model, data, path=path, reduction="example", directory=tmp_path / "run")
    expected = 0.0
    of = {"curvature": curvature, "damping": "top:0.2"}
    scores = fitted.score(queries, solver=solver, credit="additive", **of)
    w = 1 / (5 * tokens_of(model, data).counts)
    for c, point, factor in zip(path, fitted.points, scores.attributes["factors"], strict=True):
        operator = point.operator(**of)
        with b_times(model, c):
            g, q = plain_gradients(model, data), plain_gradients(model, queries, plain_mean)
            C = (
                dense_ggn(model, data, w)
                if curvature
                else influence.curvature.dense(operator.curvature)
            )
        C = C + torch.diag(operator.diagonal(g[0]))
        expected = expected + factor * (q @ torch.linalg.solve(C, g.T)).numpy() * w
    assert scores.converged.all()
    assert scores.attributes["solver"] == solver
    close(scores.values, expected, 1e-9 if solver == "direct" else 1e-2)
