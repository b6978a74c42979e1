"""The identity in place of `C + lambda I`: plain gradient products."""

from __future__ import annotations

import torch

import influence
from influence.curvature import Damped
from influence.curvature.identity import IdentityCurvature
from tests.conftest import examples, fit_end

F64 = torch.float64


def test_it_is_damped_into_the_identity_whatever_the_rule(tiny, tmp_path):
    run = fit_end(
        tiny, examples(3), curvature=influence.Identity(), damping="abs:7", directory=tmp_path / "r"
    )
    operator = run.operator()
    v = torch.randn(2, tiny.space.size, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert operator.lam.tolist() == [1.0]
    assert torch.equal(operator.matvec(v), v)
    assert torch.equal(operator.curvature.solve(v, operator.lam), v)
    assert torch.equal(run.operator(damping="mean:0.5").matvec(v), v)


def test_it_inverts_lambda_and_has_a_scale_for_every_rule():
    curvature = IdentityCurvature((4,))
    operator = Damped(curvature, torch.tensor([4.0], dtype=F64))
    v = torch.ones(1, 4, dtype=F64)
    assert torch.equal(curvature.solve(operator.matvec(v), operator.lam), v)
    assert curvature.mean_eigenvalues().tolist() == curvature.top_eigenvalues().tolist() == [1.0]
    assert curvature.blocks == (slice(0, 4),)
