"""Matrix-free products of the GGN and the Hessian against dense ones."""

from __future__ import annotations

import numpy as np
import pytest

import influence
from influence.curvature import as_linear_operator, dense
from tests.conftest import build_model, examples, fit_end
from tests.oracles import dense_objective


@pytest.fixture
def small():
    """GPT-2 (no float32 inside), one layer, LoRA on its attention input and MLP output."""
    return build_model("gpt2", layers=1, target_modules=["attn.c_attn", "mlp.c_proj"])


def fitted(tmp_path, model, data, curvature, **options):
    return fit_end(model, data, curvature=curvature, directory=tmp_path / "run", **options)


@pytest.mark.parametrize("reduction", ["token", "example"])
@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_matrix_free_products_equal_the_dense_oracle(tmp_path, small, kind, reduction):
    data = examples(5)
    spec = {"ggn": influence.GGN(), "hessian": influence.Hessian()}[kind]
    run = fitted(tmp_path, small, data, spec, reduction=reduction, token_budget=30)
    expected = dense_objective(small, run.tokens, run.weights, kind)
    curvature = run.curvature(kind)
    assert expected.abs().max() > 1e-3
    assert (dense(curvature) - expected).norm() / expected.norm() < 1e-10
    vector = np.random.default_rng(0).standard_normal(small.space.size)
    np.testing.assert_allclose(
        as_linear_operator(curvature) @ vector, expected.numpy() @ vector, rtol=0, atol=1e-9
    )


def test_llama_products_equal_the_dense_oracle_up_to_its_float32_norms(tmp_path, tiny):
    run = fitted(tmp_path, tiny, examples(4), influence.GGN())
    for kind in ("ggn", "hessian"):
        expected = dense_objective(tiny, run.tokens, run.weights, kind)
        assert (dense(run.curvature(kind)) - expected).norm() / expected.norm() < 1e-5
