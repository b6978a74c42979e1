"""Gradients at sampled labels: a loop of single examples, and a batch that memory is too small for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from influence import halving
from influence.gradients import Tape, tape
from influence.sampled_gradients import sampled_gradients
from tests import oracles
from tests.conftest import build_model, examples, tokens_of


@pytest.fixture(scope="module")
def model():
    return build_model("gpt2", layers=1, target_modules=["attn.c_attn"], dtype=torch.float64)


def given(model, tokens, draws):
    """`(row, draw)` in the order in which they come, and their gradients."""
    order, rows = [], []
    with tape(model) as recorder:
        for part, gradients in sampled_gradients(recorder, tokens, np.arange(5), 0, draws):
            order.append(part.tolist())
            rows.append(gradients)
    return order, torch.cat(rows)


def test_one_draw_is_that_of_the_loop_of_single_examples(model):
    data = examples(5)
    order, found = given(model, tokens_of(model, data), 1)
    assert order == [[0, 1, 2, 3, 4]]
    torch.testing.assert_close(found, oracles.sampled_gradients(model, data), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("at", [0, 1, 2], ids=["at once", "at the second draw", "at the last"])
def test_what_does_not_fit_comes_draw_after_draw_in_the_same_order(model, monkeypatch, at):
    tokens = tokens_of(model, examples(5))
    _, expected = given(model, tokens, 3)
    real, tried = Tape.gradients, []

    def gradients(recorder, part, gradient, **options):
        tried.append(len(part.counts))
        if len(part.counts) > 2 and tried.count(5) > at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(recorder, part, gradient, **options)

    monkeypatch.setattr(Tape, "gradients", gradients)
    order, found = given(model, tokens, 3)
    halving.forget(model)
    assert order[:at] == [[0, 1, 2, 3, 4]] * at
    assert np.concatenate(order).tolist() == [0, 1, 2, 3, 4] * 3
    assert max(len(part) for part in order[at:]) <= 2
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
