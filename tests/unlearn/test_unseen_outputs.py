"""Outputs between base and adapter, against a search by Brent's method on the full logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from influence.cost import Cost
from tests.oracles import logits_fn
from unlearn import unseen_outputs
from unlearn.unseen import scaled_to


def mixture(model, item, theta, base, a):
    """`log q` [T, V] of one row, from both models' full logits."""
    f, labels = logits_fn(model, item)
    with torch.no_grad():
        z_base, z_adapter = f(base), f(theta)
        return (z_base + a * (z_adapter - z_base)).log_softmax(-1), labels


def share_of(model, item, theta, base, target):
    """The a at which the row's mean loss is `target`."""
    from scipy.optimize import brentq

    def excess(a):
        log_q, labels = mixture(model, item, theta, base, a)
        return float(torch.nn.functional.nll_loss(log_q, labels)) - target

    if excess(-1.0) <= 0:
        return -1.0
    return brentq(excess, -1.0, 1.0, xtol=1e-14)


def test_the_outputs_are_the_mixture_that_has_the_asked_loss(goal_rows):
    start, tokens, targets = goal_rows.start, goal_rows.tokens, goal_rows.targets
    outputs = goal_rows.goals().outputs
    base, inside = scaled_to(start, 0.0), 0
    for i in np.flatnonzero(goal_rows.removed):
        f, labels = logits_fn(start.model, tokens[int(i)])
        log_q = outputs.of(np.array([i]))
        loss = float(torch.nn.functional.nll_loss(log_q, labels))
        with torch.no_grad():
            now = float(torch.nn.functional.cross_entropy(f(start.theta), labels))
        if targets[i] <= now:
            continue  # no goal to rise to: such a row does not enter
        a = share_of(start.model, tokens[int(i)], start.theta, base, targets[i])
        expected, _ = mixture(start.model, tokens[int(i)], start.theta, base, a)
        torch.testing.assert_close(log_q, expected, rtol=0, atol=1e-4)
        if a > -1:
            inside += 1
            assert loss == pytest.approx(targets[i], abs=1e-4)
    assert inside


def test_outputs_are_the_same_with_and_without_a_cache(goal_rows, monkeypatch):
    start = goal_rows.start
    cached = goal_rows.goals()
    with start.model.at(start.theta):
        first = cached.merit(start.model, token_budget=25, cost=Cost())
        again = cached.merit(start.model, token_budget=25, cost=Cost())
    assert cached.outputs.cache
    assert cached.outputs.bytes == sum(t.nbytes for t in cached.outputs.cache.values())
    monkeypatch.setattr(unseen_outputs, "CACHE_BYTES", 0)
    bare = goal_rows.goals()
    with start.model.at(start.theta):
        uncached = bare.merit(start.model, token_budget=25, cost=Cost())
        bare.merit(start.model, token_budget=25, cost=Cost())
    assert not bare.outputs.cache
    for merit in (again, uncached):
        assert torch.equal(first.gradient, merit.gradient)
        assert first.value == merit.value
    assert bare.outputs.cost.forwards == 2 * cached.outputs.cost.forwards == 2 * 2 * 3
