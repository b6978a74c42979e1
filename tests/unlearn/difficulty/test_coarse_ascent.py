"""Coarse ascents against plain walks, dense curvatures and what is measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import influence
from tests.conftest import build_model
from tests.unlearn.difficulty.helpers import (
    ADAM,
    SGD,
    base_loss,
    gradient_of,
    in_order,
    losses_of,
)
from unlearn.difficulty import Protocol, measure, predict
from unlearn.difficulty.coarse_ascent import Walked, closed_form, combined


def rate_of(gradient, protocol) -> float:
    return protocol.rate * float(
        gradient.abs().sum() if protocol.optimizer == "adam" else (gradient**2).sum()
    )


def walked(
    run, row: int, target: float, protocol: Protocol, looks: int, seen: list | None = None
) -> tuple[float, torch.Tensor]:
    """The module's walk of one row, with torch.optim and plain losses.

    Returns its steps, not yet corrected, and where it ends.
    """
    theta = run.model.snapshot().requires_grad_(True)
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[protocol.optimizer]
    optimizer = kind([theta], lr=protocol.rate, maximize=True)

    def loss() -> float:
        with run.model.at(theta.detach()):
            return float(losses_of(run.model, [run.tokens[row]])[0])

    def slope() -> torch.Tensor:
        with run.model.at(theta.detach()):
            return gradient_of(run, [row])

    now, g = loss(), slope()
    seen = [] if seen is None else seen
    growth, width, since, taken = torch.zeros_like(g), 1, 0, 0
    pace, faster = rate_of(g, protocol), {"adam": 1.9, "sgd": 4.0}[protocol.optimizer]
    if now >= target:
        seen.append(True)
        return 0.0, theta.detach()

    def go(h: int) -> torch.Tensor:
        start = theta.detach().clone()
        for t in range(h):
            theta.grad = g + growth * min((since + t) / width, 1)
            optimizer.step()
        return start

    for left in range(looks, 1, -1):
        h = int(np.clip(np.round((target - now) / (pace * faster * left)), 1, protocol.steps))
        start = go(h)
        later, new, back = loss(), slope(), 0.0
        if protocol.optimizer == "sgd" and later > now:
            # in the place of h the integral of dl / |g|^2, with |g|^2 linear in l
            low, high = rate_of(g, protocol), rate_of(new, protocol)
            back = h - (later - now) * np.log(high / low) / (high - low)
        if later >= target:
            share = (target - now) / (later - now)
            seen.append(True)
            return taken + share * (h - back), start + share * (theta.detach() - start)
        taken -= back
        growth, width, g, since = new - g, h, new, 0
        pace, faster, now, taken = rate_of(new, protocol), 1.25, later, taken + h
    for scan in range(4):
        h = int(
            np.clip(np.ceil((target - now) / (pace * (1.2 if scan == 0 else 1))), 1, protocol.steps)
        )
        start = go(h)
        later = loss()
        since, taken = since + h, taken + h
        if later >= target or ((scan == 3 or taken >= protocol.steps) and later > now):
            share = (target - now) / (later - now)
            seen.append(share <= 1)
            end = start + min(share, 3) * (theta.detach() - start)  # no further than that
            return taken - (1 - share) * h, end
        if taken >= protocol.steps:
            break
        pace, now = max((later - now) / h, 0.1 * pace), later
    seen.append(False)
    return np.inf, run.model.snapshot()


def lag_of_adam(steps: float, first_order: float, looks: int) -> float:
    """How many times too long a walk of so many steps is taken to be."""
    if steps <= looks or not np.isfinite(steps):
        return 1.0
    return float(np.exp((np.log(max(first_order / steps, 1.0)) / looks) ** 1.5))


@pytest.mark.parametrize("looks", [1, 2, 3, 4])
def test_a_forecast_is_a_plain_walk_of_each_row(run, looks):
    """One look: a line scan along the gradient's sign. More: Adam's steps, gradients carried."""
    table = predict(run, protocol=ADAM, looks=looks, sample_rows=6).table
    start = run.model.snapshot()
    read = [
        run.train.index(id)
        for id in measure(run, ids=["r0-3"], protocol=ADAM, sample_rows=6).sample
    ]
    before = losses_of(run.model, [run.tokens[i] for i in read])
    words = [(row.prompt, row.completion) for row in run.train]
    for i, row in table.iterrows():
        target = base_loss(run.model, run.tokens[int(i)])
        gap = target - losses_of(run.model, [run.tokens[int(i)]])[0]
        steps, end = walked(run, int(i), target, ADAM, looks)
        lag = lag_of_adam(steps, gap / rate_of(gradient_of(run, [int(i)]), ADAM), looks)
        steps = steps / lag
        assert row["steps"] == pytest.approx(steps if steps <= ADAM.steps else np.inf, rel=1e-7)
        assert row["moved"] == pytest.approx(float((end - start).norm()), rel=1e-7)
        with run.model.at(end):
            rises = losses_of(run.model, [run.tokens[j] for j in read]) - before
        others = [words[j] != words[int(i)] for j in read]
        assert row["read_damage"] == pytest.approx(rises[others].mean(), rel=1e-6)
        if np.isfinite(row["steps"]):  # the whole sample is read off
            assert row["damage"] == pytest.approx(rises[others].mean() / lag, rel=1e-6)


@pytest.mark.parametrize("looks", [2, 3])
def test_under_sgd_a_stride_is_told_by_the_flow_s_own_clock(run, looks):
    protocol = Protocol("sgd", 2e-2, steps=2000)
    table = predict(run, protocol=protocol, looks=looks, sample_rows=2).table
    compared = 0
    for i, row in table.iterrows():
        plain = walked(run, int(i), base_loss(run.model, run.tokens[int(i)]), protocol, looks)[0]
        if looks < plain < 500:
            assert row["steps"] == pytest.approx(plain / {2: 1.5, 3: 1.15}[looks], rel=1e-6)
            compared += 1
    assert compared >= 5


def test_one_look_under_adam_goes_along_the_sign(run):
    """`moved` = lr steps sqrt(P), for every coordinate moves by lr in a step."""
    table = predict(run, protocol=ADAM, looks=1, sample_rows=6).table
    root = np.sqrt(run.model.space.size)
    walked_steps = table["moved"] / (ADAM.rate * root)
    ok = np.isfinite(table["steps"]) & (walked_steps < 2 * ADAM.steps) & (table["steps"] > 0)
    assert ok.sum() >= 5
    pairs = zip(walked_steps, table["first_order_steps"], strict=True)
    lags = np.array([lag_of_adam(steps, first_order, 1) for steps, first_order in pairs])
    np.testing.assert_allclose(table["steps"][ok], (walked_steps / lags)[ok], rtol=1e-4)


def test_with_a_look_at_every_step_the_walk_is_the_ascent(run):
    """Strides of one step with fresh gradients are Adam's own: the same crossing and damage."""
    protocol = Protocol("adam", 3e-3, steps=60)
    truth = measure(run, protocol=protocol, sample_rows=6)
    table = predict(run, protocol=protocol, sample_rows=6, looks=10_000).table
    assert np.isfinite(truth.steps).sum() >= 8
    ok = np.isfinite(truth.steps)
    np.testing.assert_allclose(table["steps"][ok], truth.steps[ok], rtol=1e-7)
    np.testing.assert_allclose(table["damage"][ok], truth.damage[ok], rtol=1e-6)
    np.testing.assert_allclose(table["read_damage"][ok], truth.damage[ok], rtol=1e-6)


def test_more_looks_come_closer_to_what_is_measured(run):
    protocol = Protocol("adam", 3e-3, steps=60)
    truth = measure(run, protocol=protocol, sample_rows=6)

    def error(looks: int) -> float:
        steps = predict(run, protocol=protocol, sample_rows=6, looks=looks).table["steps"]
        return float(np.median(np.abs(np.log(steps / truth.steps))))

    assert error(60) < error(2)
    assert error(60) < 0.05


def test_a_flow_at_a_small_rate_under_sgd_is_the_ascent(run):
    """With a look at every step, the correction for growth is at most |g|^2's change in a step."""
    protocol = Protocol("sgd", 2e-3, steps=400)
    truth = measure(run, ids=["r0-3", "r0-6", "r0-7"], protocol=protocol, sample_rows=6)
    table = predict(
        run, ids=["r0-3", "r0-6", "r0-7"], protocol=protocol, sample_rows=6, looks=10_000
    ).table
    ok = np.isfinite(truth.steps)
    assert ok.all()
    np.testing.assert_allclose(table["read_damage"], truth.damage, rtol=1e-6)
    np.testing.assert_allclose(table["steps"], truth.steps, rtol=0.02)


def dense_ekfac(run, number: int) -> torch.Tensor:
    """The EK-FAC of one point from its eigenbases: (wide x narrow) diag (wide x narrow)^T."""
    out = torch.zeros(run.model.space.size, run.model.space.size, dtype=torch.float64)
    for block in run.points[number].curvature().leaf_blocks:
        assert block.complete
        r, d = block.eigenvalues.shape
        for a in range(r):
            for b in range(d):
                matrix = torch.outer(block.narrow[:, a], block.wide[:, b])
                v = (matrix if block.leaf.is_A else matrix.T).ravel().double()
                out[block.leaf.slice, block.leaf.slice] += block.eigenvalues[a, b] * torch.outer(
                    v, v
                )
    return out


def test_damage_is_read_off_the_rows_hit_hardest_and_fitted_for_the_others(run):
    """Ten rows sampled: dense EK-FAC, plain gradients, bounded least squares for both weights."""
    from scipy.optimize import lsq_linear

    table = predict(run, protocol=ADAM, looks=2, sample_rows=10).table
    start, n = run.model.snapshot(), len(run.train)
    average = (dense_ekfac(run, 0) + dense_ekfac(run, 1)) / 2
    gradients = torch.stack([gradient_of(run, [j]) for j in range(n)])
    words = np.array([hash((row.prompt, row.completion)) for row in run.train])
    excluded, before = words[:, None] == words[None], losses_of(run.model, list(run.tokens))
    closed, cross, rises, steps = (
        np.zeros(n),
        np.zeros((n, n)),
        np.full((n, n), np.nan),
        np.zeros(n),
    )
    seen: list[bool] = []
    for i in range(n):
        steps[i], end = walked(run, i, base_loss(run.model, run.tokens[i]), ADAM, 2, seen)
        d, g = end - start, gradients[i]
        assert table["curvature"][i] == pytest.approx(float(g @ average @ g / (g @ g)), rel=1e-8)
        closed[i] = float(d @ average @ d) / 2
        cross[i] = ((gradients @ d) ** 2).numpy() * run.tokens.counts / 2
        hit = [j for j in np.argsort(-cross[i]) if not excluded[i, j]][:6]
        with run.model.at(end):
            rises[i, hit] = losses_of(run.model, [run.tokens[j] for j in hit]) - before[hit]
    assert not all(seen)  # an extrapolated end teaches nothing about the weights
    read = np.isfinite(rises) & np.array(seen)[:, None]
    design = np.stack([np.repeat(closed[:, None], n, axis=1)[read], cross[read]], axis=1)
    size = design.mean(0)
    a, b = lsq_linear(design / size, rises[read], bounds=(0, np.inf), tol=1e-14).x / size
    fitted = a * closed[:, None] + b * cross
    both = np.where(np.isfinite(rises), rises, fitted)
    for i in range(n):
        assert table["closed_damage"][i] == pytest.approx(fitted[i, ~excluded[i]].mean(), rel=1e-6)
        assert table["read_damage"][i] == pytest.approx(np.nanmean(rises[i]), rel=1e-6)
        if np.isfinite(table["steps"][i]):
            lag = lag_of_adam(steps[i], table["first_order_steps"][i], 2)
            told = both[i, ~excluded[i]].mean()
            assert table["damage"][i] == pytest.approx(told / lag, rel=1e-6)
    assert np.isfinite(table["damage"]).sum() >= 5


def test_the_closed_form_weighs_points_by_their_shares(run, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(2, run.model.space.size, dtype=torch.float64, generator=generator)
    shares = [0.7, 0.3]
    for point, share in zip(run.points, shares, strict=True):
        monkeypatch.setattr(point, "place", replace(point.place, share=share))
    average = sum(share * dense_ekfac(run, number) for number, share in enumerate(shares))
    np.testing.assert_allclose(closed_form(run, d), ((d @ average) * d).sum(1) / 2, rtol=1e-9)


def test_features_by_hand(run, forecast):
    table, model, counts = forecast.table, run.model, run.tokens.counts
    number = len(run.points) - 1
    lam = run.points[-1].operator().lam
    damped = dense_ekfac(run, number)
    for leaf, value in zip(model.space.leaves, lam.tolist(), strict=True):
        damped[leaf.slice, leaf.slice] += value * torch.eye(
            leaf.stop - leaf.start, dtype=torch.float64
        )
    sampled = [
        run.train.index(id)
        for id in measure(run, ids=["r0-3"], protocol=ADAM, sample_rows=6).sample
    ]
    common = gradient_of(run, sampled)
    for i, features in table.iterrows():
        g, row = gradient_of(run, [i]), run.tokens[int(i)]
        now, base = losses_of(model, [row])[0], base_loss(model, row)
        assert features["loss"] == pytest.approx(now, rel=1e-10)
        assert features["base_loss"] == pytest.approx(base, rel=1e-10)
        assert features["gap"] == pytest.approx(base - now, rel=1e-8)
        assert features["tokens"] == counts[int(i)]
        assert features["share"] == 0.1
        assert features["gradient_norm"] == pytest.approx(float(g.norm()), rel=1e-8)
        assert features["gradient_l1"] == pytest.approx(float(g.abs().sum()), rel=1e-8)
        assert features["first_order_steps"] == pytest.approx(
            max(base - now, 0) / rate_of(g, ADAM), rel=1e-8
        )
        weight = counts[int(i)] / counts.sum()
        assert features["self_influence"] == pytest.approx(
            weight * float(g @ torch.linalg.solve(damped, g)), rel=1e-7
        )
        assert features["alignment"] == pytest.approx(
            float(g @ common / g.norm() / common.norm()), rel=1e-7
        )
    sgd = predict(run, protocol=SGD, sample_rows=6).table
    rates = [rate_of(gradient_of(run, [i]), SGD) for i in range(len(sgd))]
    np.testing.assert_allclose(
        sgd["first_order_steps"], np.maximum(sgd["gap"], 0) / rates, rtol=1e-8
    )
    assert forecast.retained_loss == pytest.approx(
        losses_of(model, [run.tokens[i] for i in sampled]).mean(), rel=1e-10
    )


def test_a_groups_features_are_those_of_its_mean_loss(run):
    groups = {"pair": ["r0-1", "r0-4"]}
    row = predict(run, groups=groups, protocol=ADAM, sample_rows=6).table.iloc[0]
    g = gradient_of(run, [1, 4])
    assert row["id"] == "pair"
    assert row["gradient_norm"] == pytest.approx(float(g.norm()), rel=1e-8)
    assert row["tokens"] == run.tokens.counts[[1, 4]].sum()
    assert row["share"] == 0.2
    assert row["loss"] == pytest.approx(
        losses_of(run.model, [run.tokens[1], run.tokens[4]]).mean(), rel=1e-10
    )
    truth = measure(run, groups=groups, protocol=ADAM, sample_rows=6)
    many = predict(run, groups=groups, protocol=ADAM, sample_rows=6, looks=10_000).table.iloc[0]
    assert many["steps"] == pytest.approx(truth.steps[0], rel=1e-7)


@pytest.mark.parametrize("looks", [1, 2, 3, 5])
@pytest.mark.parametrize("protocol", [ADAM, SGD], ids=["adam", "sgd"])
def test_what_a_forecast_costs(run, looks, protocol):
    """Row-gradients and row-forwards, counted at the base model's door."""
    seen = {True: 0, False: 0}

    def count(module, args, kwargs) -> None:
        seen[torch.is_grad_enabled()] += len(kwargs["input_ids"])

    with_handle = run.model.model.get_base_model().register_forward_pre_hook(
        count, with_kwargs=True
    )
    try:
        predict(run, protocol=protocol, looks=looks, sample_rows=6)
    finally:
        with_handle.remove()
    n, sample = len(run.train), 6
    assert n <= seen[True] - sample <= looks * n
    # at most 10 a row; adapter's and base's losses; the sample before
    assert seen[False] <= 10 * n + 2 * n + sample


def test_steps_cannot_be_negative_where_a_stride_overshoots(run):
    """Only the part of a stride before the crossing is corrected for a flow that speeds up."""
    for lr in (0.05, 0.5, 2.0):
        for looks in (2, 3):
            table = predict(
                run, protocol=Protocol("sgd", lr, steps=50), sample_rows=6, looks=looks
            ).table
            assert (table["steps"] > 0).all(), (lr, looks)


def test_rows_at_their_targets_take_no_steps(run):
    model = build_model(
        "gpt2", layers=1, target_modules=["attn.c_attn", "mlp.c_proj"], seed=3, std=0.5
    )
    with run.model.at(model.snapshot()):
        at_target = [
            base_loss(run.model, item) <= losses_of(run.model, [item])[0] for item in run.tokens
        ]
        for looks in (1, 3):
            table = predict(run, protocol=ADAM, sample_rows=6, looks=looks).table
            assert any(at_target)
            assert (table["steps"][at_target] == 0).all()
            assert (table["damage"][at_target] == 0).all()
            assert (table["moved"][at_target] == 0).all()
            assert (table["recommended"] == "none").tolist() == at_target
            in_order(table)


@pytest.mark.parametrize(
    "curvature", [influence.Identity(), influence.Fisher(), influence.GGN()], ids=lambda c: c.name
)
def test_other_curvatures_do_what_they_can(run, tmp_path, curvature):
    other = influence.fit(
        run.model, run.train, curvature=curvature, path=(1.0,), directory=tmp_path / "run"
    )
    table = predict(other, protocol=ADAM, sample_rows=6).table
    np.testing.assert_allclose(table["curvature"], 1)
    assert np.isfinite(table["self_influence"]).all() == (curvature.name != "ggn")
    assert table["self_influence"].isna().all() == (curvature.name == "ggn")
    in_order(table)


# ---- both kinds of damage together --------------------------------------------------------


def walked_by_hand(closed, cross, rises, seen=None) -> Walked:
    closed, cross, rises = (np.array(values, dtype=float) for values in (closed, cross, rises))
    seen = np.ones(len(closed), bool) if seen is None else np.array(seen)
    return Walked(np.ones(len(closed)), seen, closed, cross, rises, {})


def test_a_unit_that_runs_away_does_not_set_the_others_weights():
    """Rises are the closed form's, but for a unit extrapolated a thousand times too far."""
    nan = np.nan
    closed, cross = [0.1, 0.2, 0.1, 1e6], [[0.0] * 3] * 4
    rises = [[0.1, 0.1, nan], [0.2, 0.2, nan], [0.1, 0.1, nan], [30.0, 30.0, nan]]
    excluded = np.zeros((4, 3), dtype=bool)
    alone = combined(walked_by_hand(closed[:3], cross[:3], rises[:3]), excluded[:3])[1]
    np.testing.assert_allclose(alone, [0.1, 0.2, 0.1], rtol=1e-6)
    seen = [True, True, True, False]
    together = combined(walked_by_hand(closed, cross, rises, seen), excluded)[1]
    np.testing.assert_allclose(together[:3], alone, rtol=1e-12)


def test_damage_by_hand():
    """Rises are 2 closed + 0.5 cross: a = 2, b = 0.5; rows excluded or unread do not count."""
    nan = np.nan
    ends = walked_by_hand(
        [1.0, 3.0, 2.0],
        [[0, 4, 6], [2, 0, 8], [1, 1, 1]],
        [[2.0, 4.0, nan], [7.0, 6.0, nan], [nan, nan, nan]],
    )
    excluded = np.array([[False, False, False], [False, False, True], [True, True, True]])
    damage, closed, read = combined(ends, excluded)
    np.testing.assert_allclose(damage, [(2 + 4 + 5) / 3, (7 + 6) / 2, nan], rtol=1e-9)
    np.testing.assert_allclose(closed, [(2 + 4 + 5) / 3, (7 + 6) / 2, nan], rtol=1e-9)
    np.testing.assert_allclose(read, [3, 6.5, nan], rtol=1e-12)


def test_weights_are_not_negative_and_what_was_read_off_stands():
    nan = np.nan
    ends = walked_by_hand([1.0, 2.0], [[0.0, 0.0]] * 2, [[-0.1, nan], [-0.3, nan]])
    damage, closed, read = combined(ends, np.zeros((2, 2), dtype=bool))
    np.testing.assert_allclose(read, [-0.1, -0.3])
    np.testing.assert_allclose(closed, [0, 0])
    np.testing.assert_allclose(damage, [-0.05, -0.15])


def test_without_anything_read_off_there_is_no_damage():
    damage, closed, read = combined(
        walked_by_hand([1.0], [[1.0, 2.0]], [[np.nan, np.nan]]), np.ones((1, 2), dtype=bool)
    )
    assert np.isnan([damage, closed, read]).all()
