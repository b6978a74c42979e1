"""The sample-space Fisher against dense solves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from influence.curvature import Fisher, dense
from influence.curvature.fisher import SampleSpaceFisher
from tests.conftest import build_model, examples, fit_end
from tests.influence.curvature.helpers import random_rows
from tests.oracles import sampled_rows

F64 = torch.float64


@pytest.fixture
def small():
    """GPT-2 (no float32 inside), one layer, LoRA on its attention input and MLP output."""
    return build_model("gpt2", layers=1, target_modules=["attn.c_attn", "mlp.c_proj"])


def fitted(tmp_path, model, data, curvature, **options):
    return fit_end(model, data, curvature=curvature, directory=tmp_path / "run", **options)


@pytest.mark.parametrize("samples", [0, 1, 3])
def test_sample_space_solve_equals_the_dense_solve(tmp_path, small, samples):
    run = fitted(tmp_path, small, examples(10), Fisher(samples=samples), token_budget=40)
    fisher = run.curvature()
    if samples:
        rows = torch.stack(sampled_rows(small, run.tokens, samples))
    else:
        rows = torch.cat([g for _, g in run.gradient_blocks()])
    F = (
        rows
        * torch.from_numpy(np.sqrt(np.repeat(run.weights, max(1, samples)) / max(1, samples)))[
            :, None
        ]
    )
    C = F.T @ F
    assert (dense(fisher) - C).norm() / C.norm() < 1e-10
    assert float(fisher.mean_eigenvalues()) == pytest.approx(float(C.trace()) / small.space.size)
    assert float(fisher.top_eigenvalues()) == pytest.approx(float(torch.linalg.eigvalsh(C)[-1]))
    v = random_rows(3, 4, small.space.size)
    for damping in ("mean:0.1", "top:0.01", "abs:0.001"):
        operator = run.operator(damping=damping)
        expected = torch.linalg.solve(C + operator.lam * torch.eye(len(C), dtype=F64), v.T).T
        assert (fisher.solve(v, operator.lam) - expected).norm() / expected.norm() < 1e-8
    h = torch.einsum(
        "ip,pi->i", F, torch.linalg.solve(C + 0.01 * torch.eye(len(C), dtype=F64), F.T)
    )
    torch.testing.assert_close(fisher.leverage(0.01), h, rtol=1e-8, atol=1e-12)


def test_gram_is_right_when_rows_come_in_uneven_blocks():
    F = random_rows(0, 11, 30)
    rows = lambda: iter(F.split([4, 1, 5, 1]))  # noqa: E731
    fisher = SampleSpaceFisher.fit(30, rows, torch.full((11,), 0.5, dtype=F64))
    torch.testing.assert_close(dense(fisher), 0.25 * F.T @ F, rtol=0, atol=1e-10)
