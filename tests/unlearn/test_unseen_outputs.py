"""Outputs of a model that never saw some rows, against full logits and scipy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

import influence
import unlearn
from influence.cost import Cost
from influence.tokens import TokenizedExamples
from tests.conftest import build_model, examples
from tests.oracles import logits_fn
from unlearn import unseen_outputs
from unlearn.record.change import plan
from unlearn.record.version import version
from unlearn.retraining.local import LocalRetraining
from unlearn.unseen_outputs import EXPONENTS, ExpectedOutputs

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


class World:
    """A version, rows that go or change, and adapters around its own."""

    def __init__(self, dtype, folder):
        model = build_model("gpt2", layers=1, dtype=dtype)
        data = examples(7)
        self.start = version(
            influence.fit(
                model, data, curvature=influence.Identity(), directory=folder / "run", store="never"
            )
        )
        change = plan(
            self.start, remove=["r0-1", "r0-4"], relabel={"r0-2": " warm songs at dawn and sleep"}
        )
        self.tokens = TokenizedExamples.joined([change.old, change.new])
        generator = torch.Generator().manual_seed(1)
        theta = self.start.theta
        before, *after = (
            theta + 0.6 * torch.randn(theta.shape, generator=generator, dtype=dtype)
            for _ in range(3)
        )
        nothing = np.zeros(0, dtype=int)
        self.local = LocalRetraining(before, after, nothing, nothing, unlearn.Recipe(), 0)
        self.tolerance = TOLERANCE[dtype]
        self.known = {}

    def outputs(self, losses, rows=slice(None)):
        return ExpectedOutputs(self.start, self.tokens[rows], losses, self.local, Cost())

    def log_q(self, item, a):
        """`log q` [T, V] of one row in float64 by its formula, and its labels."""
        f, labels = logits_fn(self.start.model, item)

        def log_p(theta):
            with torch.no_grad():
                logits = f(theta).double().numpy()
            return logits - logsumexp(logits, axis=1, keepdims=True)

        after = np.stack([log_p(theta) for theta in self.local.after])
        raw = logsumexp(after, axis=0, b=1 / len(after))
        raw = raw + a * (log_p(self.start.theta) - log_p(self.local.before))
        return raw - logsumexp(raw, axis=1, keepdims=True), labels.numpy()

    def losses(self, a):
        """Mean loss of each row under `log q`, found once for each exponent."""
        if a not in self.known:
            found = []
            for item in self.tokens:
                log_q, labels = self.log_q(item, a)
                found.append(-log_q[np.arange(len(labels)), labels].mean())
            self.known[a] = np.array(found)
        return self.known[a].copy()


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["f64", "f32"])
def world(request, tmp_path_factory):
    return World(request.param, tmp_path_factory.mktemp("outputs"))


@pytest.mark.parametrize("a", [0.0, 0.3, 1.0])
def test_outputs_are_those_of_the_formula_in_full_logits(world, a):
    """Of all rows, new contents (the last one) too, and the model is back where it was."""
    outputs, before = world.outputs(world.losses(a)), world.start.model.snapshot()
    rows = np.array([3, 0, 2, 1])
    found = outputs.of(rows)
    assert outputs.exponent == a
    expected = [world.log_q(world.tokens[int(row)], a)[0] for row in rows]
    assert found.shape == (int(world.tokens.counts.sum()), 25)
    np.testing.assert_allclose(
        found.numpy(), np.concatenate(expected), rtol=0, atol=world.tolerance
    )
    np.testing.assert_allclose(found.double().exp().sum(1).numpy(), 1, rtol=world.tolerance)
    assert torch.equal(world.start.model.snapshot(), before)


def test_the_adapters_are_not_all_of_one_mind(world):
    """Else the formula's terms could not be told apart."""
    item = world.tokens[3]
    at = [world.log_q(item, a)[0] for a in (0.0, 0.5, 1.0)]
    assert min(np.abs(at[0] - at[1]).max(), np.abs(at[1] - at[2]).max()) > 0.05
    single = replace(world.local, after=world.local.after[:1])
    outputs = ExpectedOutputs(world.start, world.tokens, np.zeros(4), single, Cost())
    assert float((outputs.of(np.array([3])) - torch.as_tensor(at[0])).abs().max()) > 0.05


@pytest.mark.parametrize("seed", range(8))
def test_the_exponent_is_that_whose_mean_loss_is_nearest(world, seed):
    """By trying all: of losses within and beyond what it can reach."""
    means = np.array([world.losses(a).mean() for a in EXPONENTS])
    span = np.ptp(means)
    rng = np.random.default_rng(seed)
    wanted = rng.uniform(means.min() - 0.3 * span, means.max() + 0.3 * span)
    losses = wanted + 0.2 * (spread := rng.standard_normal(4)) - 0.2 * spread.mean()
    best = EXPONENTS[int(np.abs(means - wanted).argmin())]
    assert world.outputs(losses).exponent == best


def test_exponents_of_one_set_of_rows(world):
    """One for all: of each row its mean over tokens, and every row once, whatever its length."""
    counts = world.tokens.counts
    assert len(set(counts.tolist())) > 1
    assert EXPONENTS == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    losses = [world.losses(a) for a in EXPONENTS]
    for a in (0, 4, 7, 10):
        assert world.outputs(losses[a]).exponent == EXPONENTS[a]
        assert world.outputs(losses[a][::-1]).exponent == EXPONENTS[a]  # only the mean counts
    # and a mean over all tokens would be another's
    tokenwise = np.array([row @ counts / counts.sum() for row in losses])
    assert [np.abs(tokenwise - row.mean()).argmin() for row in losses] != list(range(11))


def test_outputs_are_the_same_with_and_without_a_cache(world, monkeypatch):
    rows, losses = np.array([2, 0, 3]), world.losses(0.4)
    cached = world.outputs(losses)
    first, again = cached.of(rows), cached.of(rows)
    part = cached.of(np.array([3, 2]))
    choosing, reading = 4 * 4, 4 * 3  # four adapters on four rows for the exponent, then on three
    assert cached.cost.forwards == choosing + reading
    assert set(cached.cache) == {0, 2, 3}
    assert cached.bytes == sum(t.nbytes for t in cached.cache.values()) == first.nbytes
    monkeypatch.setattr(unseen_outputs, "CACHE_BYTES", 0)
    bare = world.outputs(losses)
    uncached = [bare.of(rows) for _ in range(2)]
    assert (bare.cache, bare.bytes) == ({}, 0)
    assert bare.cost.forwards == choosing + 2 * reading
    for other in (again, *uncached):
        assert torch.equal(first, other)
    counts = world.tokens.counts
    of_2, _, of_3 = first.split(counts[rows].tolist())
    assert torch.equal(part, torch.cat([of_3, of_2]))


def test_what_fits_is_cached_and_what_does_not_is_computed_again(world, monkeypatch):
    rows, losses = np.array([0, 1, 2, 3]), world.losses(0.4)
    sizes = world.tokens.counts * 25 * (8 if world.tolerance < 1e-9 else 4)
    monkeypatch.setattr(unseen_outputs, "CACHE_BYTES", int(sizes[:2].sum()))
    outputs = world.outputs(losses)
    first = outputs.of(rows)
    assert set(outputs.cache) == {0, 1}
    assert outputs.bytes == sizes[:2].sum()
    assert outputs.full(1)
    assert not outputs.full(0)
    before = outputs.cost.forwards
    torch.testing.assert_close(outputs.of(rows), first, rtol=0, atol=world.tolerance)
    assert outputs.cost.forwards == before + 4 * 2
    monkeypatch.setattr("influence.distributed.on_this_machine", lambda: 2)
    shared = world.outputs(losses)
    shared.of(rows)
    assert shared.bytes <= sizes[:2].sum() // 2
