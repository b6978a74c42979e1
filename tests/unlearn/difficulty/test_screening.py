"""Screening: who is looked at closely, what is learnt of them, and whether the intervals hold."""

from __future__ import annotations

import json
from dataclasses import replace
from math import ceil

import numpy as np
import pandas as pd
import pytest
import torch

import influence
from influence.errors import InputError
from tests.conftest import rows
from tests.helpers import statuses
from tests.unlearn.difficulty.helpers import ADAM, SGD, gradient_of, in_order, losses_of, trained
from unlearn.difficulty import Protocol, predict
from unlearn.difficulty.forecast import Forecast
from unlearn.difficulty.screening import (
    FEATURES,
    FEWEST,
    GRADIENT_FEATURES,
    Screening,
    conformal_ends,
    say_cost,
    screening_of,
)
from unlearn.difficulty.units import find_units

COUNT, LOOKED = 48, 24


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A run of 48 rows with stored gradients."""
    train = influence.examples_from_rows(rows(COUNT))
    directory = tmp_path_factory.mktemp("screening") / "run"
    return influence.fit(trained(train, 25), train, directory=directory, path=(0.8, 1.0))


@pytest.fixture(scope="module")
def units(many):
    return find_units(many, None, None, ADAM, None, 6)


@pytest.fixture(scope="module")
def close(many, units):
    """Every row looked at closely."""
    return predict(many, protocol=ADAM, units=units, screen=0)


@pytest.fixture(scope="module")
def screened(many, units):
    return predict(many, protocol=ADAM, units=units, screen=LOOKED)


def test_close_rows_are_as_ever_and_every_row_is_there_once_in_order(many, units, screened):
    table = screened.table
    assert table["id"].tolist() == many.train.ids
    assert table["how"].value_counts().to_dict() == {"close": LOOKED, "screened": COUNT - LOOKED}
    some = table["how"] == "close"
    alone = predict(
        many, ids=table["id"][some].tolist(), protocol=ADAM, sample_rows=6, screen=0
    ).table
    assert list(alone.columns) == list(table.columns)
    numbers = alone.select_dtypes("number").columns
    np.testing.assert_allclose(table.loc[some, numbers], alone[numbers], rtol=1e-7)
    assert table.loc[some, "recommended"].tolist() == alone["recommended"].tolist()
    others = table[~some]
    in_order(others)
    assert others[["loss", "base_loss", "gap", "tokens", "share"]].notna().all(axis=None)
    assert others[["gradient_norm", "moved", "closed_damage"]].isna().all(axis=None)
    assert others["recommended"].isin(["none", "ascent", "edit"]).all()


def test_the_sample_has_a_row_of_every_stratum_that_is_not_at_its_target(units):
    gap = units.target - units.loss
    moving = np.flatnonzero(gap > 0)
    assert LOOKED < len(moving) < COUNT
    parts = np.array_split(moving[np.argsort(gap[moving])], LOOKED)
    seen = set()
    for seed in range(4):
        chosen = screening_of(units, ADAM.rule, LOOKED, seed).chosen
        assert chosen.tolist() == sorted(set(chosen.tolist()))
        assert [int(np.isin(part, chosen).sum()) for part in parts] == [1] * LOOKED
        seen.add(tuple(chosen))
    assert len(seen) > 1
    again = screening_of(units, ADAM.rule, LOOKED, 3).chosen
    assert tuple(again) in seen


@pytest.mark.parametrize("screen", [0, COUNT, COUNT + 1])
def test_no_more_rows_than_the_number_are_all_looked_at_closely(units, screen):
    assert screening_of(units, ADAM.rule, screen) is None


def test_rows_at_their_targets_take_no_step_and_no_look(many, units):
    """With all but five at their targets, nothing is learnt and nothing need be."""
    target = units.loss - 1.0
    target[[3, 8, 20, 21, 40]] += 1.2
    odd = replace(units, target=target)
    forecast = predict(many, protocol=ADAM, units=odd, screen=LOOKED)
    table = forecast.table
    assert (table["how"] == "close").sum() == LOOKED
    assert (table.loc[[3, 8, 20, 21, 40], "how"] == "close").all()
    others = table[table["how"] == "screened"]
    columns = [f"{name}{end}" for name in ("steps", "damage") for end in ("", "_low", "_high")]
    assert (others[columns] == 0).all(axis=None)
    assert (others["recommended"] == "none").all()
    assert forecast.screening["steps"] == {
        "taught": 5,
        "spearman": None,
        "median_relative_error": None,
    }


def test_where_too_few_reach_their_targets_nothing_is_told_of_the_others(many, units):
    short = Protocol("adam", 1e-9, steps=3)
    forecast = predict(many, protocol=short, units=units, screen=LOOKED)
    others = forecast.table[(forecast.table["how"] == "screened") & (forecast.table["gap"] > 0)]
    assert np.isinf(others["steps"]).all()
    assert (others["steps_low"] == 0).all()
    assert others["damage"].isna().all()
    assert (others["recommended"] == "edit").all()
    json.dumps(forecast.record(), allow_nan=False)


def test_steps_beyond_the_protocols_are_infinite(many, units, close):
    limit = int(close.table.loc[close.table["gap"] > 0, "steps"].quantile(0.8))
    short = replace(ADAM, steps=limit)
    table = predict(many, protocol=short, units=units, screen=LOOKED).table
    others = table[table["how"] == "screened"]
    for name in ("steps", "steps_low", "steps_high"):
        assert (others[name][np.isfinite(others[name])] <= limit).all()
    assert others.loc[np.isinf(others["steps"]), "damage"].isna().all()


@pytest.mark.parametrize("protocol", [ADAM, SGD], ids=["adam", "sgd"])
def test_features_are_those_of_plain_gradients(many, units, protocol):
    found = screening_of(units, protocol.rule, LOOKED).features
    assert tuple(found.columns) == FEATURES + GRADIENT_FEATURES
    sample = units.sample.tolist()
    cross = torch.stack([gradient_of(many, [row]) for row in sample])
    counts = [int(item.supervised.sum()) for item in many.tokens]
    losses = losses_of(many.model, many.tokens)
    for row in (0, sample[0], 17):
        g = gradient_of(many, [row])  # the run's last point is the adapter
        move = g.sign() if protocol is ADAM else g
        others = [k for k, j in enumerate(sample) if j != row]
        met = [float(cross[k] @ move / move.norm()) ** 2 * counts[sample[k]] for k in others]
        expected = {
            "loss": losses[row],
            "gap": units.base_loss[row] - losses[row],
            "tokens": counts[row],
            "share": 1 / COUNT,
            "gradient_norm": float(g.norm()),
            "first_rise": float(move @ g),
            "cross": np.mean(met),
        }
        for name, value in expected.items():
            # stored in float32; Adam's first move is a sign only far from 0
            assert found.loc[row, name] == pytest.approx(value, rel=1e-3), name


def test_without_stored_gradients_losses_alone_are_learnt_from(tmp_path):
    train = influence.examples_from_rows(rows(30))
    run = influence.fit(
        trained(train, 25), train, directory=tmp_path / "run", path=(1.0,), store="never"
    )
    units = find_units(run, None, None, ADAM, None, 6)
    assert tuple(screening_of(units, ADAM.rule, 20).features.columns) == FEATURES


def test_a_group_is_a_unit_by_its_means(many):
    ids = many.train.ids
    groups = {f"g{k}": ids[2 * k : 2 * k + 2] for k in range(COUNT // 2)}
    pairs = find_units(many, None, groups, ADAM, None, 6)
    single = find_units(many, None, None, ADAM, None, 6)
    found = screening_of(pairs, ADAM.rule, 20).features
    alone = screening_of(single, ADAM.rule, 20).features
    for name in (*GRADIENT_FEATURES, "loss", "gap"):
        np.testing.assert_allclose(found[name], alone[name].to_numpy().reshape(-1, 2).mean(1))
    np.testing.assert_allclose(found["tokens"], alone["tokens"].to_numpy().reshape(-1, 2).sum(1))


# ---- what is learnt: synthetic worlds whose truth is known -----------------------------------------


class World:
    """Rows whose steps and damage follow from their features, but for noise."""

    def __init__(self, n: int, noise: float, seed: int, limit: int = 10**9) -> None:
        random = np.random.default_rng(seed)
        self.features = pd.DataFrame(
            {
                name: np.exp(random.normal(0, 0.5, n))
                for name in ("loss", "base_loss", "gap", "tokens")
            }
        ).assign(share=1 / n)
        x = np.log(self.features[["loss", "gap", "tokens"]].to_numpy())
        steps = np.exp(2 + x @ [0.3, 1.0, -0.4] + noise * random.normal(size=n))
        self.steps = np.where(steps <= limit, steps, np.inf)
        self.damage = 0.1 * np.sinh(0.5 + x @ [0.2, 0.7, 0.1] + noise * random.normal(size=n))
        self.limit = limit

    def table(self, places) -> pd.DataFrame:
        """The close forecasts of some rows."""
        columns = {"id": [f"r{i}" for i in places]}
        for name in ("steps", "damage"):
            for end in ("", "_low", "_high"):
                columns[name + end] = getattr(self, name)[places]
        columns |= {"recommended": "edit", "reason": ""}
        features = self.features.loc[places].reset_index(drop=True)
        return pd.concat([pd.DataFrame(columns), features], axis=1).assign(how="close")

    def screened(self, chosen, seed: int = 0) -> Forecast:
        """What is forecast of all from the rows `chosen`."""
        units = type("Named", (), {"names": [f"r{i}" for i in range(len(self.steps))]})
        units.__len__ = lambda self: len(self.names)
        protocol = {"steps": self.limit}
        forecast = Forecast(self.table(chosen), protocol, 5, 1.0)
        return Screening(units(), chosen, self.features, seed).extended(forecast)


def test_a_law_without_noise_is_found():
    world = World(200, 0.0, 0)
    chosen = np.arange(0, 200, 4)
    forecast = world.screened(chosen)
    table = forecast.table
    inside = np.ones(200, dtype=bool)
    for name in ("loss", "base_loss", "gap", "tokens"):  # beyond the sample its ends are taken
        values = world.features[name]
        inside &= (values >= values[chosen].min()) & (values <= values[chosen].max())
    assert 120 < inside.sum() < 200
    np.testing.assert_allclose(table["steps"][inside], world.steps[inside], rtol=0.02)
    assert forecast.screening["steps"]["spearman"] > 0.99
    assert forecast.screening["steps"]["median_relative_error"] < 0.02
    assert forecast.screening["close"] == 50
    assert forecast.screening["screened"] == 150


@pytest.mark.slow
def test_intervals_hold_nine_rows_of_ten_whatever_the_size_of_the_sample():
    for size in (20, 30, 100):
        held = {"steps": [], "damage": []}
        for seed in range(40):
            world = World(300, 0.4, seed)
            chosen = np.sort(np.random.default_rng(seed).permutation(300)[:size])
            table = world.screened(chosen, seed).table
            others = table[table["how"] == "screened"]
            for name, values in held.items():
                truth = getattr(world, name)[others.index]
                values.append(
                    ((others[f"{name}_low"] <= truth) & (truth <= others[f"{name}_high"])).mean()
                )
        for name, values in held.items():
            assert 0.88 < np.mean(values) < 0.96, (size, name)


def test_rows_out_of_reach_widen_the_interval_to_infinity():
    world = World(300, 0.4, 1, limit=9)
    assert 0.2 < np.isinf(world.steps).mean() < 0.6
    chosen = np.arange(0, 300, 3)
    table = world.screened(chosen).table
    others = table[table["how"] == "screened"]
    truth = world.steps[others.index]
    held = ((others["steps_low"] <= truth) & (truth <= others["steps_high"])).mean()
    assert held > 0.87
    assert others["steps"][np.isfinite(others["steps"])].max() <= 9


def test_conformal_ends_are_the_order_statistics_of_the_paper():
    for n in (19, 20, 39, 400):
        errors = np.random.default_rng(n).permutation(np.arange(n, dtype=float))
        k = ceil((n + 1) * 0.95 - 1e-9)
        assert conformal_ends(errors) == (n - k, k - 1)
    assert conformal_ends(np.arange(18.0)) == (-np.inf, np.inf)
    assert conformal_ends(np.array([0.0] * 90 + [np.inf] * 10)) == (0.0, np.inf)


# ---- what is refused and said ----------------------------------------------------------------------


@pytest.mark.parametrize("screen", [-1, 1, FEWEST - 1, 2.5, True])
def test_numbers_that_teach_nothing_are_refused_before_any_work(many, monkeypatch, screen):
    monkeypatch.setattr(
        "unlearn.difficulty.units.shared_losses", lambda *_, **__: pytest.fail("a forward ran")
    )
    with pytest.raises(InputError, match=r"\(--screen\); expected how many rows .* at least 20"):
        predict(many, protocol=ADAM, screen=screen)


def test_the_cost_is_said_before(many, capsys):
    say_cost(many, None, None, looks=5, screen=20, sample_rows=6)
    say_cost(many, None, {"a": many.train.ids[:6], "b": many.train.ids[6:8]}, looks=2, screen=0)
    first, second = capsys.readouterr().err.splitlines()
    # 6 + 2 (48 + 6) / 3; 20 (5 + 4 / 3 + 6 / 3)
    assert first == (
        "48 rows: 20 looked at closely, the others screened by them; cost: 42 row-gradients for "
        "losses and retained rows, at most 167 for the close looks"
    )
    # 16 + 2 (8 + 16) / 3; 2 (4 (2 + 4 / 3) + 6 / 3)
    assert second == (
        "2 groups, all looked at closely; cost: 32 row-gradients for losses and retained rows, at "
        "most 31 for the close looks"
    )


def test_processes_screen_alike(many, units, screened, tmp_path):
    """The stored gradients are read by all together: who is chosen, and what is said of the rest."""

    def work(rank: int) -> None:
        again = find_units(many, None, None, ADAM, None, 6)
        np.testing.assert_allclose(again.loss, units.loss, rtol=1e-10)
        found = predict(many, protocol=ADAM, units=again, screen=LOOKED).table
        expected = screened.table
        assert found["how"].tolist() == expected["how"].tolist()
        numbers = expected.select_dtypes("number").columns
        np.testing.assert_allclose(found[numbers], expected[numbers], rtol=1e-6, atol=1e-9)

    assert statuses(work, tmp_path, 2) == [0, 0]
