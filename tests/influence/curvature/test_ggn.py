"""The GGN is the Fisher of the model's own labels, and the gauge is in its null space."""

from __future__ import annotations

import pytest
import torch
from torch.func import jacrev

import influence
from influence.curvature import dense
from tests.conftest import build_model, examples, fit_end, tokens_of
from tests.influence.curvature.helpers import random_rows
from tests.oracles import logits_fn

F64 = torch.float64


@pytest.fixture
def small():
    """GPT-2 (no float32 inside), one layer, LoRA on its attention input and MLP output."""
    return build_model("gpt2", layers=1, target_modules=["attn.c_attn", "mlp.c_proj"])


def fitted(tmp_path, model, data, curvature, **options):
    return fit_end(model, data, curvature=curvature, directory=tmp_path / "run", **options)


def test_the_ggn_is_the_fisher_of_the_models_own_labels(tmp_path, small):
    """The expectation over labels written out: one token, every label with its probability."""
    data = influence.examples_from_rows([{"prompt": "the red fox", "completion": " runs"}])
    tokens = tokens_of(small, data)
    tokens[0].supervised[-1] = False  # supervise the one completion token, not the EOS
    run = fitted(tmp_path, small, data, influence.GGN())
    run.tokens[0].supervised[-1] = False
    f, _ = logits_fn(small, tokens[0])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        J, p = jacrev(f)(small.snapshot())[0].detach(), f(small.snapshot()).detach()[0].softmax(-1)
    scores = (torch.eye(len(p), dtype=F64) - p) @ J  # row y: d log p_y / d theta
    expected = run.weights[0] * (scores.T * p) @ scores
    assert (dense(run.curvature("ggn")) - expected).norm() / expected.norm() < 1e-10


def test_blocks_have_null_directions_from_the_gauge(small, tmp_path):
    """(A, B) -> (R A, B R^-1) leaves the model unchanged: r^2 null directions per site, so lambda =
    0 has no answer.
    """
    run = fitted(tmp_path, small, examples(40), influence.GGN())
    G = dense(run.curvature("ggn"))
    for site, i in zip(small.sites, range(0, 4, 2), strict=True):
        A, B = site.A.weight.data, site.B.weight.data
        E = random_rows(i, 2, 2)
        direction = torch.zeros(small.space.size, dtype=F64)
        direction[small.space.leaves[i].slice] = (E @ A).ravel()
        direction[small.space.leaves[i + 1].slice] = (-B @ E).ravel()
        assert (G @ direction).norm() < 1e-8 * G.norm() * direction.norm()
