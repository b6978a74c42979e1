"""Gradients of sampled rows, in memory and in a file, against plain autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.unlearn.difficulty.helpers import gradient_of
from unlearn.difficulty.sample_gradients import SampleGradients

ROWS = np.array([4, 0, 7, 2])


@pytest.mark.parametrize("vectors", [0, 2, 3, 4, 100])
def test_gradients_are_those_of_mean_losses_wherever_they_lie(run, vectors):
    size = run.model.space.size
    found = SampleGradients(
        run.model,
        run.tokens.select(ROWS),
        token_budget=1000,
        dtype=torch.float64,
        memory=8 * size * vectors,
    )
    assert found.in_memory == (vectors >= 4)
    expected = torch.stack([gradient_of(run, [row]) for row in ROWS])
    assert len(found) == 4
    assert (torch.stack(list(found)) - expected).norm() / expected.norm() < 1e-12
    assert (found.mean - expected.mean(0)).norm() / expected.mean(0).norm() < 1e-12
    some = torch.randn(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(found.products(some), (some @ expected.T).numpy(), rtol=1e-10)
    np.testing.assert_allclose(found.products(some), (some @ expected.T).numpy(), rtol=1e-10)


def test_they_are_held_in_the_type_that_is_asked_for(run):
    options = {"token_budget": 1000, "dtype": torch.float32}
    for memory in (0, 1 << 30):
        found = SampleGradients(run.model, run.tokens.select(ROWS), memory=memory, **options)
        assert {gradient.dtype for gradient in found} == {torch.float32}
        assert torch.allclose(next(iter(found)).double(), gradient_of(run, [ROWS[0]]), rtol=1e-5)
