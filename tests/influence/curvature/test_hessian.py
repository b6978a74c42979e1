"""The Hessian is the GGN where the logits are linear, and not elsewhere."""

from __future__ import annotations

import influence
from influence.curvature import dense
from tests.conftest import build_model, examples, fit_end


def fitted(tmp_path, model, data, curvature, **options):
    return fit_end(model, data, curvature=curvature, directory=tmp_path / "run", **options)


def test_hessian_and_ggn_agree_where_the_logits_are_linear(tmp_path):
    """LoRA on the head with A frozen by symmetry would be linear; B alone is: compare that diagonal
    block.
    """
    model = build_model("gpt2", layers=1, target_modules=["lm_head"], tie=False)
    run = fitted(tmp_path, model, examples(4), influence.GGN())
    b = model.space.leaves[1].slice
    H, G = dense(run.curvature("hessian")), dense(run.curvature("ggn"))
    assert (H[b, b] - G[b, b]).norm() / G[b, b].norm() < 1e-10
    assert (H - G).norm() / G.norm() > 1e-3
