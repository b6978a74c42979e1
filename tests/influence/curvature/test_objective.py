"""Matrix-free products of the GGN and the Hessian against dense ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import influence
from influence import distributed
from influence.curvature import as_linear_operator, dense
from influence.curvature.ggn import GGNOperator
from tests.conftest import build_model, examples, fit_end
from tests.helpers import statuses
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


class Rows:
    """Two rows of the training set that go, or new ones that come, as `updated` is told of them."""

    def __init__(self, run, new=None):
        self.positions = np.array([1, 3] if new is None else [], dtype=int)
        self.tokens = run.tokens.select(self.positions) if new is None else new
        self.weights = np.full(len(self.tokens), 0.2)
        self.counted = 0

    def ran(self, rows: int) -> None:
        self.counted += rows


@pytest.mark.parametrize("processes", [2, 7])
def test_processes_form_the_products_after_an_edit_together(tmp_path, small, processes):
    """Each runs some of the rows; where there are more processes than rows, some run none."""
    run = fitted(tmp_path, small, examples(6), influence.GGN(), token_budget=20)
    come = run.query_tokens(examples(1, seed=3))
    vectors = torch.randn(2, small.space.size, dtype=torch.float64)

    def updated() -> tuple[GGNOperator, Rows]:
        new = Rows(run, come)
        return run.curvature("ggn").updated(Rows(run), new), new

    expected = updated()[0].matvec(vectors)

    def work(rank: int) -> None:
        after, new = updated()
        product = after.matvec(vectors)
        assert float((product - expected).norm()) < 1e-12 * float(expected.norm())
        assert new.counted == 5  # all rows, in every process
        ran = [len(batch.indices) for batch, _ in after.objective.batches()]
        total = distributed.add_up(torch.tensor([float(sum(ran))]))
        assert float(total) == 5
        assert sum(ran) < 5

    assert statuses(work, tmp_path, processes) == [0] * processes
