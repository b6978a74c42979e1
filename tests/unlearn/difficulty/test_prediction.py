"""Forecasts of difficulty against plain walks, dense curvatures and what is measured; their calibration on tables of known truth."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import influence
from influence.errors import DataError, InputError
from tests.conftest import build_model, examples, rows
from tests.unlearn.difficulty.test_difficulty import (
    base_loss,
    data,
    losses_of,
    plain_loss,
    trained,
    weights_of,
)
from unlearn.difficulty.advice import recommended
from unlearn.difficulty.calibration import FEATURES, calibrate
from unlearn.difficulty.coarse_ascent import Walked, combined
from unlearn.difficulty.forecast import COLUMNS, Forecast, lag
from unlearn.difficulty.measured import Protocol, measure, predict

ADAM, SGD = Protocol("adam", 3e-3, steps=40), Protocol("sgd", 0.02, steps=60)
BEFORE = [
    "id",
    "steps",
    "steps_low",
    "steps_high",
    "damage",
    "damage_low",
    "damage_high",
    "recommended",
    "reason",
]
TOLD = [
    "loss",
    "base_loss",
    "gap",
    "tokens",
    "share",
    "gradient_norm",
    "gradient_l1",
    "curvature",
    "self_influence",
]
TOLD += ["alignment", "first_order_steps", "moved", "closed_damage", "read_damage"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    train = influence.examples_from_rows(data())
    return influence.fit(
        trained(train), train, directory=tmp_path_factory.mktemp("forecast") / "run"
    )


@pytest.fixture(scope="module")
def found(run):
    return predict(run, protocol=ADAM, sample_rows=6)


def gradient_of(run, members) -> torch.Tensor:
    """Gradient [P] of the mean over some rows of their mean losses, where the model is now, in plain autograd."""
    leaves = weights_of(run.model)
    for w in leaves:
        w.requires_grad_(True)
    loss = torch.stack([plain_loss(run.model, run.tokens[int(i)]) for i in members]).mean()
    out = torch.cat([g.ravel() for g in torch.autograd.grad(loss, leaves)])
    for w in leaves:
        w.requires_grad_(False)
    return out


def rate_of(gradient, protocol) -> float:
    return protocol.rate * float(
        gradient.abs().sum() if protocol.optimizer == "adam" else (gradient**2).sum()
    )


def walked(
    run, row: int, target: float, protocol: Protocol, looks: int, seen: list | None = None
) -> tuple[float, torch.Tensor]:
    """The module's walk of one row, with torch.optim and plain losses: steps (not yet corrected), and where it ends."""
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
        if (
            protocol.optimizer == "sgd" and later > now
        ):  # the integral of dl / |g|^2, ln |g|^2 linear in l: not h, but
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
            return taken - (1 - share) * h, start + min(share, 3) * (
                theta.detach() - start
            )  # no further than that
        if taken >= protocol.steps:
            break
        pace, now = max((later - now) / h, 0.1 * pace), later
    seen.append(False)
    return np.inf, run.model.snapshot()


@pytest.mark.parametrize("looks", [1, 2, 3, 4])
def test_a_forecast_is_a_plain_walk_of_each_row(run, looks):
    """One look: a straight line scan along the sign of the gradient. More: Adam's own steps with gradients carried forward."""
    table = predict(run, protocol=ADAM, looks=looks, sample_rows=6).table
    longer = {1: 1.8, 2: 1.27, 3: 1.16, 4: 1.12}[looks]
    start = run.model.snapshot()
    read = [
        run.train.index(id)
        for id in measure(run, ids=["r0-3"], protocol=ADAM, sample_rows=6).sample
    ]
    before = losses_of(run.model, [run.tokens[i] for i in read])
    words = [(row.prompt, row.completion) for row in run.train]
    for i, told in table.iterrows():
        steps, end = walked(run, int(i), base_loss(run.model, run.tokens[int(i)]), ADAM, looks)
        steps = steps / longer if steps > looks else steps
        assert told["steps"] == pytest.approx(steps if steps <= ADAM.steps else np.inf, rel=1e-7)
        assert told["moved"] == pytest.approx(float((end - start).norm()), rel=1e-7)
        with run.model.at(end):
            rises = losses_of(run.model, [run.tokens[j] for j in read]) - before
        others = [words[j] != words[int(i)] for j in read]
        assert told["read_damage"] == pytest.approx(rises[others].mean(), rel=1e-6)
        if np.isfinite(told["steps"]):  # the whole sample is read off
            assert told["damage"] == pytest.approx(rises[others].mean(), rel=1e-6)


@pytest.mark.parametrize("looks", [2, 3])
def test_under_sgd_a_stride_is_told_by_the_flow_s_own_clock(run, looks):
    protocol = Protocol("sgd", 2e-2, steps=2000)
    table = predict(run, protocol=protocol, looks=looks, sample_rows=2).table
    compared = 0
    for i, told in table.iterrows():
        plain = walked(run, int(i), base_loss(run.model, run.tokens[int(i)]), protocol, looks)[0]
        if looks < plain < 500:
            assert told["steps"] == pytest.approx(plain / lag("sgd", looks), rel=1e-6)
            compared += 1
    assert compared >= 5


def test_what_was_measured_decides_what_is_recommended():
    table = synthetic(4).assign(steps=10.0, damage=[0.5, 0.0, 0.5, 0.0], gap=1.0, share=0.01)
    for name in ("steps_low", "steps_high", "damage_low", "damage_high"):
        table[name] = 0.0
    forecast = Forecast(
        table[[*[c for c in COLUMNS if c in table], *[c for c in table if c not in COLUMNS]]],
        {"steps": 50},
        3,
        1.0,
    )
    forecast = replace(forecast, table=recommended(forecast.table, 1.0, 0.01, 50))
    assert forecast.table["recommended"].tolist() == ["edit", "ascent", "edit", "ascent"]
    found = forecast.with_measured(
        np.array([9.0, 9.0, np.nan, np.nan]), np.array([0.0, 0.5, np.nan, np.nan])
    )
    assert found.table["recommended"].tolist() == ["ascent", "edit", "edit", "ascent"]
    assert found.table["measured_steps"].tolist()[:2] == [9.0, 9.0]
    assert (found.table["steps"] == 10).all()


def test_rows_beyond_what_was_measured_are_corrected_no_further_than_its_ends():
    """A row barely under its target: forecast of next to nothing stays next to nothing."""
    table = synthetic(61)
    rng = np.random.default_rng(0)
    steps = (
        table["steps"] * table["gap"] ** 0.5 * rng.uniform(0.9, 1.1, 61)
    )  # a slope that goes on for ever
    damage = table["damage"] / table["gap"] * rng.uniform(0.9, 1.1, 61)
    last = table.index[-1]
    table.loc[last, ["gap", "steps", "damage", "first_order_steps", "moved"]] = [
        1e-5,
        1e-4,
        1e-7,
        1e-4,
        1e-6,
    ]
    real = np.where(np.arange(61) < 60, steps, np.nan), np.where(np.arange(61) < 60, damage, np.nan)
    told = calibrate(table, *real).applied(table).loc[last]
    usual = float(np.median(np.abs(damage)))
    assert abs(told["damage"]) < 3 * usual  # without ends it would be thousands of times that
    assert 0.3e-4 < told["steps"] < 3e-4


def test_one_look_under_adam_goes_along_the_sign(run):
    """`moved` = lr steps sqrt(P), for every coordinate moves by lr in a step."""
    table = predict(run, protocol=ADAM, looks=1, sample_rows=6).table
    ok = np.isfinite(table["steps"])
    walked_steps = np.where(
        table["steps"] > 1 / lag("adam", 1), table["steps"] * lag("adam", 1), table["steps"]
    )
    expected = pd.Series(ADAM.rate * walked_steps * np.sqrt(run.model.space.size))
    ok &= expected < 3 * ADAM.rate * ADAM.steps * np.sqrt(run.model.space.size)
    np.testing.assert_allclose(table["moved"][ok], expected[ok], rtol=1e-4)


def test_with_a_look_at_every_step_the_walk_is_the_ascent(run):
    """Strides of one step with fresh gradients are Adam's own: the same crossing and damage, but for the lag of three looks."""
    protocol = Protocol(
        "adam", 3e-3, steps=60
    )  # the lag divides, so all that get there are within it
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
        return float(np.median(np.abs(np.log(steps * lag("adam", looks) / truth.steps))))

    assert error(60) < error(4)
    assert error(60) < 0.05


def test_a_flow_at_a_small_rate_under_sgd_is_the_ascent(run):
    """With a look at every step the correction for growth is at most |g|^2's change in a step, and the crossing is the truth's."""
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
    """The EK-FAC of one point, written out from its eigenbases: sum over leaves of (wide x narrow) diag (wide x narrow)^T."""
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
    """With ten rows sampled: dense EK-FAC, plain gradients, and a bounded least-squares solver for the two weights."""
    from scipy.optimize import lsq_linear

    table = predict(run, protocol=ADAM, looks=2, sample_rows=10).table
    start, n = run.model.snapshot(), len(run.train)
    average = sum(dense_ekfac(run, number) for number in range(3)) / 3
    gradients = torch.stack([gradient_of(run, [j]) for j in range(n)])
    words = np.array([hash((row.prompt, row.completion)) for row in run.train])
    own, before = words[:, None] == words[None], losses_of(run.model, list(run.tokens))
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
        hit = [j for j in np.argsort(-cross[i]) if not own[i, j]][:6]
        with run.model.at(end):
            rises[i, hit] = losses_of(run.model, [run.tokens[j] for j in hit]) - before[hit]
    assert not all(seen)  # an extrapolated end teaches nothing about the weights
    read = np.isfinite(rises) & np.array(seen)[:, None]
    design = np.stack([np.repeat(closed[:, None], n, axis=1)[read], cross[read]], axis=1)
    size = design.mean(0)
    a, b = lsq_linear(design / size, rises[read], bounds=(0, np.inf), tol=1e-14).x / size
    told = a * closed[:, None] + b * cross
    both = np.where(np.isfinite(rises), rises, told)
    for i in range(n):
        assert table["closed_damage"][i] == pytest.approx(told[i, ~own[i]].mean(), rel=1e-6)
        assert table["read_damage"][i] == pytest.approx(np.nanmean(rises[i]), rel=1e-6)
        if np.isfinite(table["steps"][i]):
            assert table["damage"][i] == pytest.approx(both[i, ~own[i]].mean(), rel=1e-6)
    assert np.isfinite(table["damage"]).sum() >= 5


def test_the_closed_form_weighs_points_by_their_shares(run, monkeypatch):
    from dataclasses import replace

    from unlearn.difficulty.coarse_ascent import closed_form

    generator = torch.Generator().manual_seed(0)
    d = torch.randn(2, run.model.space.size, dtype=torch.float64, generator=generator)
    shares = [0.5, 0.3, 0.2]
    for point, share in zip(run.points, shares, strict=True):
        monkeypatch.setattr(point, "place", replace(point.place, share=share))
    average = sum(share * dense_ekfac(run, number) for number, share in enumerate(shares))
    np.testing.assert_allclose(closed_form(run, d), ((d @ average) * d).sum(1) / 2, rtol=1e-9)


def test_features_by_hand(run, found):
    table, model, counts = found.table, run.model, run.tokens.counts
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
    for i, told in table.iterrows():
        g, row = gradient_of(run, [i]), run.tokens[int(i)]
        now, base = losses_of(model, [row])[0], base_loss(model, row)
        assert told["loss"] == pytest.approx(now, rel=1e-10)
        assert told["base_loss"] == pytest.approx(base, rel=1e-10)
        assert told["gap"] == pytest.approx(base - now, rel=1e-8)
        assert told["tokens"] == counts[int(i)]
        assert told["share"] == 0.1
        assert told["gradient_norm"] == pytest.approx(float(g.norm()), rel=1e-8)
        assert told["gradient_l1"] == pytest.approx(float(g.abs().sum()), rel=1e-8)
        assert told["first_order_steps"] == pytest.approx(
            max(base - now, 0) / rate_of(g, ADAM), rel=1e-8
        )
        weight = counts[int(i)] / counts.sum()
        assert told["self_influence"] == pytest.approx(
            weight * float(g @ torch.linalg.solve(damped, g)), rel=1e-7
        )
        assert told["alignment"] == pytest.approx(
            float(g @ common / g.norm() / common.norm()), rel=1e-7
        )
    sgd = predict(run, protocol=SGD, sample_rows=6).table
    rates = [rate_of(gradient_of(run, [i]), SGD) for i in range(len(sgd))]
    np.testing.assert_allclose(
        sgd["first_order_steps"], np.maximum(sgd["gap"], 0) / rates, rtol=1e-8
    )
    assert found.retained_loss == pytest.approx(
        losses_of(model, [run.tokens[i] for i in sampled]).mean(), rel=1e-10
    )


def test_a_groups_features_are_those_of_its_mean_loss(run):
    groups = {"pair": ["r0-1", "r0-4"]}
    told = predict(run, groups=groups, protocol=ADAM, sample_rows=6).table.iloc[0]
    g = gradient_of(run, [1, 4])
    assert told["id"] == "pair"
    assert told["gradient_norm"] == pytest.approx(float(g.norm()), rel=1e-8)
    assert told["tokens"] == run.tokens.counts[[1, 4]].sum()
    assert told["share"] == 0.2
    assert told["loss"] == pytest.approx(
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
    assert (
        seen[False] <= 10 * n + 2 * n + sample
    )  # at most 10 a row; adapter's and base's losses; the sample before


def test_columns_are_in_their_places(run, found):
    assert list(found.table.columns) == BEFORE + TOLD
    assert found.table["id"].tolist() == run.train.ids
    assert len(found) == 10
    assert (found.looks, found.protocol, found.calibration, found.max_damage) == (
        3,
        ADAM.record(),
        None,
        0.01,
    )
    record = json.loads(json.dumps(found.record()))
    assert record["protocol"] == ADAM.record()
    assert record["calibration"] is None


def test_every_column_is_described(found):
    """A reader of `predict` finds each feature's name in its docstring."""
    missing = [name for name in found.table.columns if name not in (predict.__doc__ or "")]
    assert [name for name in missing if not name.endswith("_high")] == []


def in_order(table: pd.DataFrame) -> None:
    ok = np.isfinite(table["damage"])
    assert (table["steps"] >= 0).all()
    assert (table["steps_low"] <= table["steps"]).all()
    assert (table["steps"] <= table["steps_high"]).all()
    assert (table["damage_low"] <= table["damage"])[ok].all()
    assert (table["damage"] <= table["damage_high"])[ok].all()


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("lr", [1e-20, 0.1, 30.0, 1e200])
def test_any_rate_gives_a_table_without_nonsense(run, optimizer, lr):
    for looks in (1, 3):
        told = predict(run, protocol=Protocol(optimizer, lr, steps=20), sample_rows=6, looks=looks)
        in_order(told.table)
        assert not told.table["reason"].str.contains("nan|inf ").any()
        if lr == 1e-20:
            assert np.isinf(told.table["steps"]).all()
            assert (told.table["recommended"] == "edit").all()


def test_steps_cannot_be_negative_where_a_stride_overshoots(run):
    """The correction for a flow that speeds up belongs to the share of the stride before the crossing, not to all of it."""
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
        there = [
            base_loss(run.model, item) <= losses_of(run.model, [item])[0] for item in run.tokens
        ]
        for looks in (1, 3):
            table = predict(run, protocol=ADAM, sample_rows=6, looks=looks).table
            assert any(there)
            assert (table["steps"][there] == 0).all()
            assert (table["damage"][there] == 0).all()
            assert (table["moved"][there] == 0).all()
            assert (table["recommended"] == "none").tolist() == there
            in_order(table)


def test_a_row_does_not_depend_on_the_others_but_for_the_closed_forms_weights(run, found):
    few = predict(run, ids=["r0-6", "r0-1"], protocol=ADAM, sample_rows=6).table
    both = found.table.iloc[[6, 1]].reset_index(drop=True)
    own = [
        name for name in few.columns if name not in ("closed_damage", "id", "recommended", "reason")
    ]
    np.testing.assert_allclose(few[own].astype(float), both[own].astype(float), rtol=1e-7)
    many = predict(run, protocol=ADAM, sample_rows=10).table.iloc[[6, 1]].reset_index(drop=True)
    fewer = predict(run, ids=["r0-6", "r0-1"], protocol=ADAM, sample_rows=10).table
    shared = [name for name in own if not name.startswith("damage")]
    np.testing.assert_allclose(fewer[shared].astype(float), many[shared].astype(float), rtol=1e-7)
    assert (
        fewer["damage"] != many["damage"]
    ).all()  # four of ten rows are told by weights that all units fit
    np.testing.assert_allclose(fewer["damage"], many["damage"], rtol=0.5)


def walked_by_hand(closed, cross, rises, seen=None) -> Walked:
    closed, cross, rises = (np.array(values, dtype=float) for values in (closed, cross, rises))
    seen = np.ones(len(closed), bool) if seen is None else np.array(seen)
    return Walked(np.ones(len(closed)), seen, closed, cross, rises, {})


def test_a_unit_that_runs_away_does_not_set_the_others_weights():
    """Rises are the closed form's, but for a unit whose crossing was extrapolated a thousand times too far."""
    nan = np.nan
    closed, cross = [0.1, 0.2, 0.1, 1e6], [[0.0] * 3] * 4
    rises = [[0.1, 0.1, nan], [0.2, 0.2, nan], [0.1, 0.1, nan], [30.0, 30.0, nan]]
    own = np.zeros((4, 3), dtype=bool)
    alone = combined(walked_by_hand(closed[:3], cross[:3], rises[:3]), own[:3])[1]
    np.testing.assert_allclose(alone, [0.1, 0.2, 0.1], rtol=1e-6)
    together = combined(walked_by_hand(closed, cross, rises, [True, True, True, False]), own)[1][:3]
    np.testing.assert_allclose(together, alone, rtol=1e-12)


def test_the_same_call_gives_the_same_table(run, found):
    again = predict(run, protocol=ADAM, sample_rows=6)
    pd.testing.assert_frame_equal(again.table, found.table, check_exact=True)


def test_parts_of_one_row_give_the_same(run, found, monkeypatch):
    monkeypatch.setattr("influence.run.PART_BYTES", 1)
    again = predict(run, protocol=ADAM, sample_rows=6)
    pd.testing.assert_frame_equal(again.table, found.table, rtol=1e-7)


def test_steps_that_the_protocol_does_not_have_are_infinite(run, found):
    """A row whose forecast is above the protocol's steps is infinite, with no damage; those below stay."""
    limit = int(found.table["steps"].median())
    short = predict(run, protocol=Protocol("adam", 3e-3, steps=limit), sample_rows=6).table
    far = found.table["steps"] > 2 * limit
    near = found.table["steps"] < limit / 2
    assert far.any()
    assert near.any()
    assert np.isinf(short["steps"][far]).all()
    assert short["damage"][far].isna().all()
    assert (short["recommended"][far] == "edit").all()
    np.testing.assert_allclose(short["steps"][near], found.table["steps"][near], rtol=1e-6)


def test_one_row_of_many(run, found):
    told = predict(run, ids=["r0-4"], protocol=ADAM, sample_rows=6).table
    assert told["steps"][0] == pytest.approx(found.table["steps"][4], rel=1e-7)
    assert told["damage"][0] == pytest.approx(told["read_damage"][0], rel=1e-9)


def test_a_run_of_one_training_row_can_be_forecast(tmp_path):
    train = influence.examples_from_rows(rows(1))
    run = influence.fit(trained(train, 15), train, directory=tmp_path / "run", store="never")
    told = predict(run, protocol=ADAM).table.iloc[0]
    assert told["steps"] > 0
    assert told["recommended"] == "retrain"
    assert np.isnan(told["damage"])


def test_a_sample_of_the_units_own_rows_tells_no_damage(run):
    (sampled,) = measure(run, ids=["r0-3"], protocol=ADAM, sample_rows=1).sample
    assert sampled not in ("r0-2", "twin")
    told = predict(run, ids=[sampled], protocol=ADAM, sample_rows=1).table.iloc[0]
    assert np.isfinite(told["steps"])
    assert np.isnan(told["damage"])
    assert np.isnan(told["read_damage"])
    assert told["recommended"] == "edit"
    assert told["reason"] == "no retained row tells the damage of ascent"
    both = predict(run, ids=[sampled, "r0-3"], protocol=ADAM, sample_rows=1).table
    assert np.isnan(both["damage"][0])
    assert both["damage"][1] == pytest.approx(both["read_damage"][1])


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


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"looks": 0}, InputError, "looks 0 was given; expected a whole number of at least 1"),
        ({"looks": 2.0}, InputError, "looks 2.0 was given"),
        ({"looks": True}, InputError, "looks True was given"),
        ({"max_damage": -0.1}, InputError, "max_damage -0.1 was given; expected 0 or more"),
        ({"max_damage": float("nan")}, InputError, "max_damage nan was given"),
        ({"ids": []}, InputError, "no row was given"),
        ({"ids": ["nobody"]}, DataError, "no example has the id 'nobody'"),
        ({"sample_rows": 0}, InputError, "sample_rows 0 was given"),
    ],
)
def test_wrong_requests_are_refused(run, given, error, sentence):
    with pytest.raises(error, match=sentence):
        predict(run, **given)


# ---- both kinds of damage together ---------------------------------------------------------------------------


def test_damage_by_hand():
    """Rises 2 closed + 0 cross and 0.5 cross more where there is cross: a = 2, b = 0.5; own rows and unread ones told apart."""
    nan = np.nan
    found = walked_by_hand(
        [1.0, 3.0, 2.0],
        [[0, 4, 6], [2, 0, 8], [1, 1, 1]],
        [[2.0, 4.0, nan], [7.0, 6.0, nan], [nan, nan, nan]],
    )
    own = np.array([[False, False, False], [False, False, True], [True, True, True]])
    damage, closed, read = combined(found, own)
    np.testing.assert_allclose(damage, [(2 + 4 + 5) / 3, (7 + 6) / 2, nan], rtol=1e-9)
    np.testing.assert_allclose(closed, [(2 + 4 + 5) / 3, (7 + 6) / 2, nan], rtol=1e-9)
    np.testing.assert_allclose(read, [3, 6.5, nan], rtol=1e-12)


def test_weights_are_not_negative_and_what_was_read_off_stands():
    nan = np.nan
    found = walked_by_hand([1.0, 2.0], [[0.0, 0.0]] * 2, [[-0.1, nan], [-0.3, nan]])
    damage, closed, read = combined(found, np.zeros((2, 2), dtype=bool))
    np.testing.assert_allclose(read, [-0.1, -0.3])
    np.testing.assert_allclose(closed, [0, 0])
    np.testing.assert_allclose(damage, [-0.05, -0.15])


def test_without_anything_read_off_there_is_no_damage():
    damage, closed, read = combined(
        walked_by_hand([1.0], [[1.0, 2.0]], [[np.nan, np.nan]]), np.ones((1, 2), dtype=bool)
    )
    assert np.isnan([damage, closed, read]).all()


def test_intervals_are_in_order_where_a_damage_is_below_zero(run, monkeypatch):
    nothing = np.full(10, np.nan)
    monkeypatch.setattr(
        "unlearn.difficulty.forecast.combined",
        lambda found, own: (-found.closed, nothing, -found.closed),
    )
    table = predict(run, protocol=ADAM, sample_rows=6).table
    assert (table["damage"] < 0).any()
    in_order(table)


# ---- which way -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "damage", "gap", "share", "way", "reason"),
    [
        (0.0, 0.0, 0.0, 0.9, "none", "its loss is at the target already"),
        (0.0, 0.0, -2.0, 0.1, "none", "its loss is at the target already"),
        (
            9.0,
            0.01,
            1.0,
            0.51,
            "retrain",
            "51% of all rows: too few are left to hold the adapter in place",
        ),
        (9.0, 0.01, 1.0, 0.5, "ascent", "9 steps for +0.5% of retained loss, at most 1.0% allowed"),
        (
            np.inf,
            np.nan,
            1.0,
            0.1,
            "edit",
            "ascent is not forecast to reach the target in 30 steps",
        ),
        (9.0, np.nan, 1.0, 0.1, "edit", "no retained row tells the damage of ascent"),
        (9.4, 0.02, 1.0, 0.1, "ascent", "9 steps for +1.0% of retained loss, at most 1.0% allowed"),
        (9.0, 0.0201, 1.0, 0.1, "edit", "ascent would cost +1.0% of retained loss, more than 1.0%"),
        (9.0, 1.0, 1.0, 0.1, "edit", "ascent would cost +50.0% of retained loss, more than 1.0%"),
        (
            9.0,
            -1.0,
            1.0,
            0.1,
            "ascent",
            "9 steps for -50.0% of retained loss, at most 1.0% allowed",
        ),
    ],
)
def test_each_way(steps, damage, gap, share, way, reason):
    table = pd.DataFrame({"id": ["a"], "steps": [steps], "damage": [damage], "damage_high": [1.0]})
    table["gap"], table["share"] = gap, share
    out = recommended(table, 2.0, 0.01, 30)
    assert list(out.columns) == [
        "id",
        "steps",
        "damage",
        "damage_high",
        "recommended",
        "reason",
        "gap",
        "share",
    ]
    assert (out["recommended"][0], out["reason"][0]) == (way, reason)
    assert "nan" not in reason
    pd.testing.assert_frame_equal(recommended(out, 2.0, 0.01, 30), out)  # again: in the same places
    assert "recommended" not in table


# ---- the table as a file -------------------------------------------------------------------------------------


def test_tables_are_read_back(found, tmp_path):
    for name, read in (("t.csv", pd.read_csv), ("t.parquet", pd.read_parquet)):
        path = found.write(tmp_path / name)
        pd.testing.assert_frame_equal(
            read(path), found.table, check_exact=name.endswith("parquet"), rtol=1e-12
        )
    odd = found.table.assign(id=[f'a,"{i}"\nb🙂' for i in range(10)], steps=np.inf)
    changed = Forecast(odd, found.protocol, 3, 1.0)
    pd.testing.assert_frame_equal(pd.read_csv(changed.write(tmp_path / "odd.csv")), odd, rtol=1e-12)
    pd.testing.assert_frame_equal(
        pd.read_parquet(changed.write(str(tmp_path / "odd.parquet"))), odd
    )


def test_tables_are_refused(found, tmp_path):
    (tmp_path / "t.csv").write_text("mine")
    for name, sentence in (
        ("t.json", "expected a name that ends in .csv or .parquet"),
        ("t", "expected a name that ends"),
        ("nowhere/t.csv", "there is no folder"),
        ("t.csv", "exists: name another file, or give --overwrite to replace it"),
    ):
        with pytest.raises(InputError, match=sentence):
            found.write(tmp_path / name)
    assert (tmp_path / "t.csv").read_text() == "mine"
    assert found.write(tmp_path / "t.csv", overwrite=True).read_text().startswith("id,steps,")


# ---- calibration ---------------------------------------------------------------------------------------------


def synthetic(n: int, seed: int = 0) -> pd.DataFrame:
    """A forecast's table of features that have nothing to do with each other."""
    random = np.random.default_rng(seed)
    table = pd.DataFrame(
        {"id": [f"r{i}" for i in range(n)], "steps": np.exp(random.normal(2.5, 0.6, n))}
    )
    table["damage"] = np.exp(random.normal(-2, 0.7, n))
    for name in FEATURES:
        if name not in table:
            table[name] = np.exp(random.normal(0, 0.5, n))
    table["steps_low"], table["steps_high"] = table["steps"] * 0.8, table["steps"] * 1.2
    table["damage_low"], table["damage_high"] = table["damage"] * 0.3, table["damage"] * 3
    table["share"] = 1 / n
    return table


def truth_of(
    table: pd.DataFrame, noise: float = 0.0, seed: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Steps = forecast x 1.7 base_loss^0.6 / tokens^0.3 and damage = arcsinh-linear in sqrt(damage), with log-normal noise."""
    random = np.random.default_rng(seed)
    steps = table["steps"] * 1.7 * table["base_loss"] ** 0.6 / table["tokens"] ** 0.3
    damage = 0.2 * np.sinh(
        2 * np.sqrt(table["damage"])
        - 0.3 * np.log(table["gap"])
        - 0.2
        + noise * random.normal(size=len(table))
    )
    return (
        steps * np.exp(noise * random.normal(size=len(table)))
    ).to_numpy().copy(), damage.to_numpy().copy()


def relative(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.median(np.abs(found - truth) / np.abs(truth)))


def test_a_calibration_finds_what_the_forecast_lacks():
    table = synthetic(200)
    steps, damage = truth_of(table)
    found = calibrate(table, steps, damage)
    assert relative(table["steps"].to_numpy(), steps) > 0.35
    assert relative(found.steps, steps) < 0.005
    assert found.error == pytest.approx(relative(found.steps, steps))
    assert relative(found.damage, damage) < 0.2 * relative(table["damage"].to_numpy(), damage)
    assert found.spearman["steps"] > 0.999
    assert found.spearman["damage"] > 0.97
    assert found.measured == 200
    assert list(found.importances["steps"])[:2] == ["base_loss", "tokens"]
    assert set(list(found.importances["damage"])[:2]) == {"damage", "gap"}
    for told in found.importances.values():
        assert list(told.values()) == sorted(told.values(), reverse=True)
        assert set(told) == set(found.features) == set(FEATURES)
    assert json.loads(json.dumps(found.record()))["measured"] == 200


def test_rows_that_were_not_measured_are_corrected_too():
    table = synthetic(400)
    steps, damage = truth_of(table)
    some = np.arange(400) % 4 == 0
    found = calibrate(table, np.where(some, steps, np.nan), np.where(some, damage, np.nan))
    out = found.applied(table)
    assert found.rows.tolist() == np.flatnonzero(some).tolist()
    assert relative(out["steps"].to_numpy()[~some], steps[~some]) < 0.01
    assert relative(out["damage"].to_numpy()[~some], damage[~some]) < 0.25 * relative(
        table["damage"][~some], damage[~some]
    )
    np.testing.assert_allclose(out["steps"][some], found.steps)
    np.testing.assert_allclose(out["damage"][some], found.damage)
    others = [name for name in table if not name.startswith(("steps", "damage"))]
    pd.testing.assert_frame_equal(out[others], table[others])
    assert (out["steps_low"] < out["steps"]).all()
    assert (out["steps"] < out["steps_high"]).all()
    assert (out["damage_low"] <= out["damage"]).all()
    assert (out["damage"] <= out["damage_high"]).all()
    pd.testing.assert_frame_equal(synthetic(400), table)  # the one that was given is as it was


def test_noise_is_not_taken_for_knowledge():
    """Measured = forecast x log-normal noise of 0.3: nothing can be learnt, and the scores say so."""
    ratios, gains = [], []
    for seed in range(4):
        table = synthetic(80, seed)
        random = np.random.default_rng(100 + seed)
        steps = (table["steps"] * np.exp(0.3 * random.normal(size=80))).to_numpy()
        damage = np.exp(random.normal(size=80))  # of nothing at all
        found = calibrate(table, steps, damage)
        ratios.append(found.error / relative(table["steps"].to_numpy(), steps))
        gains.append(
            np.corrcoef(np.log(found.steps / table["steps"]), np.log(steps / table["steps"]))[0, 1]
        )
        assert found.spearman["damage"] < 0.3
    assert np.mean(ratios) > 0.9
    assert np.mean(gains) < 0.15


def test_a_rows_own_measurement_does_not_reach_its_own_forecast():
    """Ten times the steps, and damage that stays above the median (which sets the unit): its forecast stays, bit for bit."""
    table = synthetic(60)
    steps, damage = truth_of(table, noise=0.2)
    found = calibrate(table, steps, damage)
    changed = 0
    for row in np.argsort(damage)[-3:]:
        more, worse = steps.copy(), damage.copy()
        more[row] *= 10
        worse[row] *= 10
        other = calibrate(table, more, worse)
        assert other.steps[row] == found.steps[row]
        assert other.damage[row] == found.damage[row]
        changed += int((other.steps != found.steps).sum())
        applied = other.applied(table)
        assert applied["steps"][row] == pytest.approx(found.steps[row], rel=1e-12)
    assert changed > 120  # those of other folds did change


def test_rows_of_a_group_do_not_teach_about_each_other():
    table = synthetic(60)
    steps, damage = truth_of(table, noise=0.2)
    groups = [f"g{i % 12}" for i in range(60)]
    found = calibrate(table, steps, damage, groups)
    for name in ("g3",):
        own = np.array([group == name for group in groups])
        other = calibrate(table, np.where(own, 10 * steps, steps), damage, groups)
        assert np.array_equal(other.steps[own], found.steps[own])
        assert not np.array_equal(other.steps[~own], found.steps[~own])
        loose = calibrate(table, np.where(own, 10 * steps, steps), damage)
        assert not np.array_equal(loose.steps[own], calibrate(table, steps, damage).steps[own])


def test_few_groups_are_no_hindrance():
    table = synthetic(40)
    steps, damage = truth_of(table)
    found = calibrate(table, steps, damage, ["a", "b", "c", "d"] * 10)
    assert found.measured == 40
    assert found.error < 0.1


def test_the_seed_decides_the_folds():
    table = synthetic(40)
    steps, damage = truth_of(table, noise=0.2)
    one, two = (calibrate(table, steps, damage, seed=seed) for seed in (0, 0))
    assert np.array_equal(one.steps, two.steps)
    assert one.importances == two.importances
    assert not np.array_equal(one.steps, calibrate(table, steps, damage, seed=1).steps)


def test_too_few_rows_are_refused():
    table = synthetic(30)
    steps, damage = truth_of(table)
    steps[:4], steps[4:7], steps[7:9], damage[9:11] = np.nan, np.inf, 0.0, np.nan
    with pytest.raises(
        InputError,
        match=r"19 measured rows reached their targets.* needs at least 20: measure more rows",
    ):
        calibrate(table, steps, damage)


def test_rows_that_teach_nothing_are_left_out():
    table = synthetic(60)
    steps, damage = truth_of(table, noise=0.1)
    bad = steps.copy(), damage.copy()
    bad[0][:3], bad[0][3:6], bad[0][6:8], bad[1][8:10] = np.nan, np.inf, 0.0, np.nan
    given = table.copy()
    given.loc[10:12, ["steps", "steps_low", "steps_high"]] = np.inf
    given.loc[13:14, ["steps", "steps_low", "steps_high"]] = 0.0
    found = calibrate(given, *bad)
    assert found.rows.tolist() == list(range(15, 60))
    out = found.applied(given)
    pd.testing.assert_frame_equal(
        out.iloc[10:15], given.iloc[10:15]
    )  # no finite forecast, or none needed: they stay
    clean = calibrate(table.iloc[15:].reset_index(drop=True), steps[15:], damage[15:])
    np.testing.assert_allclose(found.steps, clean.steps, rtol=1e-9)
    assert np.isfinite(out["steps"].iloc[:10]).all()


def test_features_that_are_unknown_are_left_out():
    table = synthetic(40)
    steps, damage = truth_of(table)
    table["self_influence"] = np.nan
    table.loc[3, "closed_damage"] = np.nan
    found = calibrate(table.drop(columns=["moved"]), steps, damage)
    assert set(FEATURES) - set(found.features) == {"self_influence", "closed_damage", "moved"}
    assert found.error < 0.05


def test_intervals_hold_nine_of_ten_new_rows():
    """The quantiles of 150 errors leave a standard deviation of sqrt(0.9 x 0.1 / 150) = 0.024 in the coverage of one table."""
    inside = {"steps": [], "damage": []}
    for seed in range(4):
        table = synthetic(1500, seed)
        steps, damage = truth_of(table, noise=0.3, seed=10 + seed)
        some = np.arange(1500) < 150
        out = calibrate(
            table, np.where(some, steps, np.nan), np.where(some, damage, np.nan)
        ).applied(table)
        for name, real in (("steps", steps), ("damage", damage)):
            inside[name].append(
                ((out[f"{name}_low"] <= real) & (real <= out[f"{name}_high"]))[~some].mean()
            )
    for shares in inside.values():
        assert abs(np.mean(shares) - 0.9) < 3 * 0.024 / np.sqrt(4) + 0.01


def test_intervals_of_few_rows_err_towards_wide():
    """With 20 rows the ends are nearly the largest errors: coverage of at least 0.85 on average."""
    shares = []
    for seed in range(4):
        table = synthetic(500, seed)
        steps, damage = truth_of(table, noise=0.3, seed=30 + seed)
        some = np.arange(500) < 20
        out = calibrate(
            table, np.where(some, steps, np.nan), np.where(some, damage, np.nan)
        ).applied(table)
        shares.append(((out["steps_low"] <= steps) & (steps <= out["steps_high"]))[~some].mean())
    assert np.mean(shares) > 0.85


def test_a_forecast_is_calibrated_once_and_recommends_anew():
    table = synthetic(60)
    table["gap"] = table["gap"] + 0.1
    first = Forecast(recommended(table, 1.0, 0.01, 50), Protocol(steps=50).record(), 3, 1.0)
    steps, damage = truth_of(table)
    found = first.calibrated(steps, damage)
    assert first.calibration is None
    assert found.calibration is not None
    assert list(found.table.columns) == list(first.table.columns)
    expected = recommended(found.table, 1.0, 0.01, 50)
    assert found.table["reason"].tolist() == expected["reason"].tolist()
    assert found.table["reason"].tolist() != first.table["reason"].tolist()
    assert json.loads(json.dumps(found.record()))["calibration"]["measured"] == 60
    with pytest.raises(
        InputError, match="is calibrated already: calibrate the one that `predict` returned"
    ):
        found.calibrated(steps, damage)


def test_a_calibrated_forecast_beyond_the_protocol_is_infinite():
    """As an uncalibrated one is: 50 steps do not reach what is forecast to take 80."""
    table = synthetic(60)
    table["steps"] = np.linspace(30, 45, 60)
    first = Forecast(recommended(table, 1.0, 0.01, 50), Protocol(steps=50).record(), 3, 1.0)
    some = table["steps"].to_numpy() < 38
    found = first.calibrated(
        np.where(some, 1.3 * table["steps"], np.nan), np.where(some, table["damage"], np.nan)
    )
    beyond = 1.3 * table["steps"].to_numpy() > 52
    assert np.isinf(found.table["steps"][beyond]).all()
    assert (found.table["recommended"][beyond] == "edit").all()


def test_a_real_forecast_can_be_calibrated(tmp_path):
    train = examples(26)
    run = influence.fit(
        trained(train, 25),
        train,
        directory=tmp_path / "run",
        curvature=influence.KFAC(),
        path=(1.0,),
    )
    protocol = Protocol("adam", 3e-3, steps=60)
    first, truth = predict(run, protocol=protocol), measure(run, protocol=protocol)
    found = first.calibrated(truth.steps, truth.damage)
    assert found.calibration.measured >= 20
    raw = (
        np.abs(first.table["steps"] - truth.steps)[found.calibration.rows]
        / truth.steps[found.calibration.rows]
    )
    assert found.calibration.error < 2 * float(np.median(raw))
    assert not found.table["reason"].str.contains("nan").any()
