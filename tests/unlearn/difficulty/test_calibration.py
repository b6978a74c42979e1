"""Calibrations on tables of known truth."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from influence.errors import InputError
from tests.unlearn.difficulty.helpers import synthetic, truth_of
from unlearn.difficulty.calibration import FEATURES, calibrate


def relative(values: np.ndarray, truth: np.ndarray) -> float:
    """Median relative error."""
    return float(np.median(np.abs(values - truth) / np.abs(truth)))


def test_a_calibration_finds_what_the_forecast_lacks():
    table = synthetic(200)
    steps, damage = truth_of(table)
    calibration = calibrate(table, steps, damage)
    assert relative(table["steps"].to_numpy(), steps) > 0.35
    assert relative(calibration.steps, steps) < 0.005
    assert calibration.error == pytest.approx(relative(calibration.steps, steps))
    assert relative(calibration.damage, damage) < 0.2 * relative(table["damage"].to_numpy(), damage)
    assert calibration.spearman["steps"] > 0.999
    assert calibration.spearman["damage"] > 0.97
    assert calibration.measured == 200
    assert list(calibration.importances["steps"])[:2] == ["base_loss", "tokens"]
    assert set(list(calibration.importances["damage"])[:2]) == {"damage", "gap"}
    for falls in calibration.importances.values():
        assert list(falls.values()) == sorted(falls.values(), reverse=True)
        assert set(falls) == set(calibration.features) == set(FEATURES)
    assert json.loads(json.dumps(calibration.record()))["measured"] == 200


def test_rows_that_were_not_measured_are_corrected_too():
    table = synthetic(400)
    steps, damage = truth_of(table)
    some = np.arange(400) % 4 == 0
    calibration = calibrate(table, np.where(some, steps, np.nan), np.where(some, damage, np.nan))
    out = calibration.applied(table)
    assert calibration.rows.tolist() == np.flatnonzero(some).tolist()
    assert relative(out["steps"].to_numpy()[~some], steps[~some]) < 0.01
    assert relative(out["damage"].to_numpy()[~some], damage[~some]) < 0.25 * relative(
        table["damage"][~some], damage[~some]
    )
    np.testing.assert_allclose(out["steps"][some], calibration.steps)
    np.testing.assert_allclose(out["damage"][some], calibration.damage)
    others = [name for name in table if not name.startswith(("steps", "damage"))]
    pd.testing.assert_frame_equal(out[others], table[others])
    assert (out["steps_low"] < out["steps"]).all()
    assert (out["steps"] < out["steps_high"]).all()
    assert (out["damage_low"] <= out["damage"]).all()
    assert (out["damage"] <= out["damage_high"]).all()
    pd.testing.assert_frame_equal(synthetic(400), table)  # the one that was given is as it was


def test_noise_is_not_taken_for_knowledge():
    """Measured = forecast x log-normal noise: nothing can be learnt, and the scores say so."""
    ratios, gains = [], []
    for seed in range(4):
        table = synthetic(80, seed)
        random = np.random.default_rng(100 + seed)
        steps = (table["steps"] * np.exp(0.3 * random.normal(size=80))).to_numpy()
        damage = np.exp(random.normal(size=80))  # of nothing at all
        calibration = calibrate(table, steps, damage)
        ratios.append(calibration.error / relative(table["steps"].to_numpy(), steps))
        learnt, wanted = (np.log(values / table["steps"]) for values in (calibration.steps, steps))
        gains.append(np.corrcoef(learnt, wanted)[0, 1])
        assert calibration.spearman["damage"] < 0.3
    assert np.mean(ratios) > 0.9
    assert np.mean(gains) < 0.15


def test_a_rows_own_measurement_does_not_reach_its_own_forecast():
    """Ten times the steps, and a damage above the median, which sets the unit: bit for bit."""
    table = synthetic(60)
    steps, damage = truth_of(table, noise=0.2)
    calibration = calibrate(table, steps, damage)
    changed = 0
    for row in np.argsort(damage)[-3:]:
        more, worse = steps.copy(), damage.copy()
        more[row] *= 10
        worse[row] *= 10
        other = calibrate(table, more, worse)
        assert other.steps[row] == calibration.steps[row]
        assert other.damage[row] == calibration.damage[row]
        changed += int((other.steps != calibration.steps).sum())
        applied = other.applied(table)
        assert applied["steps"][row] == pytest.approx(calibration.steps[row], rel=1e-12)
    assert changed > 120  # those of other folds did change


def test_rows_of_a_group_do_not_teach_about_each_other():
    table = synthetic(60)
    steps, damage = truth_of(table, noise=0.2)
    groups = [f"g{i % 12}" for i in range(60)]
    calibration = calibrate(table, steps, damage, groups)
    in_group = np.array([group == "g3" for group in groups])
    other = calibrate(table, np.where(in_group, 10 * steps, steps), damage, groups)
    assert np.array_equal(other.steps[in_group], calibration.steps[in_group])
    assert not np.array_equal(other.steps[~in_group], calibration.steps[~in_group])
    loose = calibrate(table, np.where(in_group, 10 * steps, steps), damage)
    ungrouped = calibrate(table, steps, damage)
    assert not np.array_equal(loose.steps[in_group], ungrouped.steps[in_group])


def test_few_groups_are_no_hindrance():
    table = synthetic(40)
    steps, damage = truth_of(table)
    calibration = calibrate(table, steps, damage, ["a", "b", "c", "d"] * 10)
    assert calibration.measured == 40
    assert calibration.error < 0.1


def test_the_seed_decides_the_folds():
    table = synthetic(40)
    steps, damage = truth_of(table, noise=0.2)
    first, second = (calibrate(table, steps, damage, seed=seed) for seed in (0, 0))
    assert np.array_equal(first.steps, second.steps)
    assert first.importances == second.importances
    assert not np.array_equal(first.steps, calibrate(table, steps, damage, seed=1).steps)


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
    calibration = calibrate(given, *bad)
    assert calibration.rows.tolist() == list(range(15, 60))
    out = calibration.applied(given)
    # no finite forecast, or none needed: they stay
    pd.testing.assert_frame_equal(out.iloc[10:15], given.iloc[10:15])
    clean = calibrate(table.iloc[15:].reset_index(drop=True), steps[15:], damage[15:])
    np.testing.assert_allclose(calibration.steps, clean.steps, rtol=1e-9)
    assert np.isfinite(out["steps"].iloc[:10]).all()


def test_features_that_are_unknown_are_left_out():
    table = synthetic(40)
    steps, damage = truth_of(table)
    table["self_influence"] = np.nan
    table.loc[3, "closed_damage"] = np.nan
    calibration = calibrate(table.drop(columns=["moved"]), steps, damage)
    assert set(FEATURES) - set(calibration.features) == {"self_influence", "closed_damage", "moved"}
    assert calibration.error < 0.05


def test_intervals_hold_nine_of_ten_new_rows():
    """The quantiles of 150 errors leave a standard deviation of sqrt(0.9 x 0.1 / 150) = 0.024.

    It is that of the coverage of one table.
    """
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


def test_rows_beyond_what_was_measured_are_corrected_no_further_than_its_ends():
    """A row barely under its target: forecast of next to nothing stays next to nothing."""
    table = synthetic(61)
    rng = np.random.default_rng(0)
    # a slope that goes on for ever
    steps = table["steps"] * table["gap"] ** 0.5 * rng.uniform(0.9, 1.1, 61)
    damage = table["damage"] / table["gap"] * rng.uniform(0.9, 1.1, 61)
    last = table.index[-1]
    small = {"gap": 1e-5, "steps": 1e-4, "damage": 1e-7, "first_order_steps": 1e-4, "moved": 1e-6}
    table.loc[last, list(small)] = list(small.values())
    real = np.where(np.arange(61) < 60, steps, np.nan), np.where(np.arange(61) < 60, damage, np.nan)
    corrected = calibrate(table, *real).applied(table).loc[last]
    usual = float(np.median(np.abs(damage)))
    assert abs(corrected["damage"]) < 3 * usual  # without ends it would be thousands of times that
    assert 0.3e-4 < corrected["steps"] < 3e-4


@pytest.mark.parametrize(("steps", "damage", "groups"), [(29, 30, 30), (30, 31, 30), (30, 30, 29)])
def test_measurements_of_another_length_are_refused(steps, damage, groups):
    sentence = f"{steps} steps and {damage} damages were given for a forecast of 30 rows"
    with pytest.raises(InputError, match=sentence):
        calibrate(synthetic(30), np.ones(steps), np.ones(damage), ["g"] * groups)
