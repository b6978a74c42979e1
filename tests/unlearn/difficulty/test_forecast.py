"""The table of a forecast: its columns and intervals, what depends on what, its file."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import influence
from influence.errors import DataError, InputError
from tests.conftest import examples, rows
from tests.helpers import statuses
from tests.unlearn.difficulty.helpers import ADAM, in_order, synthetic, trained, truth_of
from unlearn.difficulty import Protocol, measure, predict
from unlearn.difficulty import forecast as forecast_module
from unlearn.difficulty.advice import recommended
from unlearn.difficulty.forecast import COLUMNS, Forecast
from unlearn.difficulty.units import ALONE

FIRST = [
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
FEATURES_BEHIND = [
    "loss",
    "base_loss",
    "gap",
    "tokens",
    "share",
    "gradient_norm",
    "gradient_l1",
    "curvature",
    "self_influence",
    "alignment",
    "first_order_steps",
    "moved",
    "closed_damage",
    "read_damage",
    "how",
]


def test_columns_are_in_their_places(run, forecast):
    assert list(forecast.table.columns) == FIRST + FEATURES_BEHIND
    assert forecast.table["id"].tolist() == run.train.ids
    assert len(forecast) == 10
    assert (forecast.looks, forecast.protocol, forecast.calibration, forecast.max_damage) == (
        5,
        ADAM.record(),
        None,
        0.01,
    )
    record = json.loads(json.dumps(forecast.record()))
    assert record["protocol"] == ADAM.record()
    assert record["calibration"] is None


def test_every_column_is_described(forecast):
    """A reader of `predict` finds each feature's name in its docstring."""
    missing = [name for name in forecast.table.columns if name not in (predict.__doc__ or "")]
    assert [name for name in missing if not name.endswith("_high")] == []


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("lr", [1e-20, 0.1, 30.0, 1e200])
def test_any_rate_gives_a_table_without_nonsense(run, optimizer, lr):
    for looks in (1, 3):
        protocol = Protocol(optimizer, lr, steps=20)
        table = predict(run, protocol=protocol, sample_rows=6, looks=looks).table
        in_order(table)
        assert not table["reason"].str.contains("nan|inf ").any()
        if lr == 1e-20:
            assert np.isinf(table["steps"]).all()
            assert (table["recommended"] == "edit").all()


def test_a_row_does_not_depend_on_the_others_but_for_the_closed_forms_weights(run, forecast):
    few = predict(run, ids=["r0-6", "r0-1"], protocol=ADAM, sample_rows=6).table
    both = forecast.table.iloc[[6, 1]].reset_index(drop=True)
    others = ("closed_damage", "id", "recommended", "reason", "how")
    names = [name for name in few.columns if name not in others]
    np.testing.assert_allclose(few[names].astype(float), both[names].astype(float), rtol=1e-7)
    many = predict(run, protocol=ADAM, sample_rows=10).table.iloc[[6, 1]].reset_index(drop=True)
    fewer = predict(run, ids=["r0-6", "r0-1"], protocol=ADAM, sample_rows=10).table
    shared = [name for name in names if not name.startswith("damage")]
    np.testing.assert_allclose(fewer[shared].astype(float), many[shared].astype(float), rtol=1e-7)
    # four of ten rows are row by weights that all units fit
    assert (fewer["damage"] != many["damage"]).all()
    np.testing.assert_allclose(fewer["damage"], many["damage"], rtol=0.5)


def test_the_same_call_gives_the_same_table(run, forecast):
    again = predict(run, protocol=ADAM, sample_rows=6)
    pd.testing.assert_frame_equal(again.table, forecast.table, check_exact=True)


def test_parts_of_one_row_give_the_same(run, forecast):
    one = ALONE * 8 * run.model.space.size
    again = predict(run, protocol=ADAM, sample_rows=6, memory=one)
    pd.testing.assert_frame_equal(again.table, forecast.table, rtol=1e-7)


def test_steps_that_the_protocol_does_not_have_are_infinite(run, forecast):
    """A row whose forecast is above the protocol's steps is infinite, with no damage."""
    limit = int(forecast.table["steps"].median())
    short = predict(run, protocol=Protocol("adam", 3e-3, steps=limit), sample_rows=6).table
    far = forecast.table["steps"] > 2 * limit
    near = forecast.table["steps"] < limit / 2
    assert far.any()
    assert near.any()
    assert np.isinf(short["steps"][far]).all()
    assert short["damage"][far].isna().all()
    assert (short["recommended"][far] == "edit").all()
    np.testing.assert_allclose(short["steps"][near], forecast.table["steps"][near], rtol=1e-6)


def test_one_row_of_many(run, forecast):
    row = predict(run, ids=["r0-4"], protocol=ADAM, sample_rows=6).table
    assert row["steps"][0] == pytest.approx(forecast.table["steps"][4], rel=1e-7)
    # all is read off, at an end that is too far by the lag
    assert 0.7 * row["read_damage"][0] < row["damage"][0] <= row["read_damage"][0]


def test_a_run_of_one_training_row_can_be_forecast(tmp_path):
    train = influence.examples_from_rows(rows(1))
    run = influence.fit(trained(train, 15), train, directory=tmp_path / "run", store="never")
    row = predict(run, protocol=ADAM).table.iloc[0]
    assert row["steps"] > 0
    assert row["recommended"] == "retrain"
    assert np.isnan(row["damage"])


def test_a_sample_of_the_units_own_rows_tells_no_damage(run):
    (sampled,) = measure(run, ids=["r0-3"], protocol=ADAM, sample_rows=1).sample
    assert sampled not in ("r0-2", "twin")
    row = predict(run, ids=[sampled], protocol=ADAM, sample_rows=1).table.iloc[0]
    assert np.isfinite(row["steps"])
    assert np.isnan(row["damage"])
    assert np.isnan(row["read_damage"])
    assert row["recommended"] == "edit"
    assert row["reason"] == "no retained row tells the damage of ascent"
    both = predict(run, ids=[sampled, "r0-3"], protocol=ADAM, sample_rows=1).table
    assert np.isnan(both["damage"][0])
    assert 0.7 * both["read_damage"][1] < both["damage"][1] <= both["read_damage"][1]


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


def test_intervals_are_in_order_where_a_damage_is_below_zero(run, monkeypatch):
    nothing = np.full(10, np.nan)
    monkeypatch.setattr(
        "unlearn.difficulty.forecast.combined",
        lambda walked, excluded: (-walked.closed, nothing, -walked.closed),
    )
    table = predict(run, protocol=ADAM, sample_rows=6).table
    assert (table["damage"] < 0).any()
    in_order(table)


def test_tables_are_read_back(forecast, tmp_path):
    for name, read in (("t.csv", pd.read_csv), ("t.parquet", pd.read_parquet)):
        path = forecast.write(tmp_path / name)
        pd.testing.assert_frame_equal(
            read(path), forecast.table, check_exact=name.endswith("parquet"), rtol=1e-12
        )
    odd = forecast.table.assign(id=[f'a,"{i}"\nb🙂' for i in range(10)], steps=np.inf)
    changed = Forecast(odd, forecast.protocol, 3, 1.0)
    pd.testing.assert_frame_equal(pd.read_csv(changed.write(tmp_path / "odd.csv")), odd, rtol=1e-12)
    pd.testing.assert_frame_equal(
        pd.read_parquet(changed.write(str(tmp_path / "odd.parquet"))), odd
    )


def test_tables_are_refused(forecast, tmp_path):
    (tmp_path / "t.csv").write_text("mine")
    for name, sentence in (
        ("t.json", "expected a name that ends in .csv or .parquet"),
        ("t", "expected a name that ends"),
        ("nowhere/t.csv", "there is no folder"),
        ("t.csv", "exists: name another file, or give --overwrite to replace it"),
    ):
        with pytest.raises(InputError, match=sentence):
            forecast.write(tmp_path / name)
    assert (tmp_path / "t.csv").read_text() == "mine"
    assert forecast.write(tmp_path / "t.csv", overwrite=True).read_text().startswith("id,steps,")


# ---- measurements beside it, and a calibration --------------------------------------------


def test_what_was_measured_decides_what_is_recommended():
    table = synthetic(4).assign(steps=10.0, damage=[0.5, 0.0, 0.5, 0.0], gap=1.0, share=0.01)
    for name in ("steps_low", "steps_high", "damage_low", "damage_high"):
        table[name] = 0.0
    first = [name for name in COLUMNS if name in table]
    table = table[[*first, *(name for name in table if name not in first)]]
    forecast = Forecast(table, {"steps": 50}, 3, 1.0)
    forecast = replace(forecast, table=recommended(forecast.table, 1.0, 0.01, 50))
    assert forecast.table["recommended"].tolist() == ["edit", "ascent", "edit", "ascent"]
    beside = forecast.with_measured(
        np.array([9.0, 9.0, np.nan, np.nan]), np.array([0.0, 0.5, np.nan, np.nan])
    )
    assert beside.table["recommended"].tolist() == ["ascent", "edit", "edit", "ascent"]
    assert beside.table["measured_steps"].tolist()[:2] == [9.0, 9.0]
    assert (beside.table["steps"] == 10).all()


def test_a_forecast_is_calibrated_once_and_recommends_anew():
    table = synthetic(60)
    table["gap"] = table["gap"] + 0.1
    first = Forecast(
        recommended(table, 1.0, 0.01, 50), Protocol(lr=1e-4, steps=50).record(), 3, 1.0
    )
    steps, damage = truth_of(table)
    corrected = first.calibrated(steps, damage)
    assert first.calibration is None
    assert corrected.calibration is not None
    assert list(corrected.table.columns) == list(first.table.columns)
    expected = recommended(corrected.table, 1.0, 0.01, 50)
    assert corrected.table["reason"].tolist() == expected["reason"].tolist()
    assert corrected.table["reason"].tolist() != first.table["reason"].tolist()
    assert json.loads(json.dumps(corrected.record()))["calibration"]["measured"] == 60
    with pytest.raises(
        InputError, match="is calibrated already: calibrate the one that `predict` returned"
    ):
        corrected.calibrated(steps, damage)


def test_a_calibrated_forecast_beyond_the_protocol_is_infinite():
    """As an uncalibrated one is: 50 steps do not reach what is forecast to take 80."""
    table = synthetic(60)
    table["steps"] = np.linspace(30, 45, 60)
    first = Forecast(
        recommended(table, 1.0, 0.01, 50), Protocol(lr=1e-4, steps=50).record(), 3, 1.0
    )
    some = table["steps"].to_numpy() < 38
    corrected = first.calibrated(
        np.where(some, 1.3 * table["steps"], np.nan), np.where(some, table["damage"], np.nan)
    )
    beyond = 1.3 * table["steps"].to_numpy() > 52
    assert np.isinf(corrected.table["steps"][beyond]).all()
    assert (corrected.table["recommended"][beyond] == "edit").all()


@pytest.mark.slow
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
    corrected = first.calibrated(truth.steps, truth.damage)
    assert corrected.calibration.measured >= 20
    errors = np.abs(first.table["steps"] - truth.steps) / truth.steps
    errors = errors[corrected.calibration.rows]
    assert corrected.calibration.error < 2 * float(np.median(errors))
    assert not corrected.table["reason"].str.contains("nan").any()


@pytest.mark.parametrize("processes", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_any_number_of_processes_forecasts_the_same(run, tmp_path, processes):
    """Units are dealt out, also where there are fewer than processes; the first writes."""
    # a stride, so that the processes must agree on the rate
    options = {"protocol": Protocol("adam", stride=0.01, steps=40), "sample_rows": 6, "looks": 3}
    expected = predict(run, **options)

    def work(rank: int) -> None:
        walked, real = [], forecast_module.walk

        def walk(units, rows, *others):
            walked.extend(rows.tolist())
            return real(units, rows, *others)

        forecast_module.walk = walk
        found = predict(run, **options)
        (tmp_path / f"walked-{rank}").write_text(json.dumps(walked))
        assert found.protocol == expected.protocol
        assert found.retained_loss == pytest.approx(expected.retained_loss, rel=1e-12)
        for name in expected.table:
            one, other = expected.table[name], found.table[name]
            if one.dtype.kind == "f":
                np.testing.assert_allclose(other, one, rtol=1e-8, atol=1e-10, err_msg=name)
            elif name != "reason":  # in which numbers are rounded
                assert other.tolist() == one.tolist()
        assert found.write(tmp_path / "table.csv") == tmp_path / "table.csv"  # by one of them

    assert statuses(work, tmp_path, processes) == [0] * processes
    assert pd.read_csv(tmp_path / "table.csv")["id"].tolist() == run.train.ids
    each = [json.loads((tmp_path / f"walked-{rank}").read_text()) for rank in range(processes)]
    assert sorted(row for rows in each for row in rows) == list(range(10))
    assert max(map(len, each)) <= -(-10 // processes) + 1
