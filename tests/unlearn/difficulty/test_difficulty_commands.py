"""`unlearn difficulty`, as a person calls it: its table, what is measured, what is refused."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

import influence
import unlearn
from influence.run import Run
from tests.conftest import rows
from tests.helpers import contents, save, untouched, write_rows
from unlearn.cli import main
from unlearn.difficulty import Protocol, read_measured
from unlearn.difficulty.forecast import COLUMNS
from unlearn.difficulty.units import find_units
from unlearn.retraining.recipe import Recipe

#: Enough for a calibration; two groups, and rows without one.
ROWS = [row | ({"group": f"g{i % 2}"} if i < 20 else {}) for i, row in enumerate(rows(26))]
FAST = ("--lr", "3e-3", "--steps", "60")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on disk of an adapter that was trained on its rows."""
    at = tmp_path_factory.mktemp("difficulty")
    save(at, layers=1, target_modules=["q_proj", "v_proj"])
    write_rows(at / "train.jsonl", ROWS)
    write_rows(at / "unseen.jsonl", rows(9, seed=7))
    train = influence.read_examples(at / "train.jsonl")
    start = influence.fit(
        influence.load(at / "base", at / "adapter", device="cpu"),
        train,
        directory=at / "start",
        path=(1.0,),
    )
    recipe = Recipe(lr=2e-2, epochs=30, batch_size=4, dropout=False)
    unlearn.retrain(start, [], out=at / "trained", recipe=recipe)
    influence.fit(
        influence.load(at / "base", at / "trained", device="cpu"),
        train,
        directory=at / "run",
        path=(0.6, 1.0),
    )
    return at / "run"


@pytest.fixture
def call(run, run_main, tmp_path):
    def call(*arguments, out="t.csv"):
        given = ["--run", run, "--out", tmp_path / out, "--device", "cpu", *FAST, *arguments]
        return run_main(main, "unlearn", "difficulty", *given)

    return call


def test_every_row_is_forecast_and_nothing_else_is_written(call, run, tmp_path):
    with untouched(run):
        done = call()
    assert done.status == 0, done.err
    table = pd.read_csv(tmp_path / "t.csv", dtype={"id": str})
    assert tuple(table.columns[: len(COLUMNS)]) == COLUMNS
    assert table["id"].tolist() == [row["id"] for row in ROWS]
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]
    assert "recommended: " in done.out
    assert max(len(line) for line in done.out.splitlines() if "t.csv" not in line) < 160


def test_measured_rows_stand_beside_their_forecast_and_decide(call, tmp_path):
    done = call("--ids", "r0-3,r0-5,r0-21", "--measure", "--json", out="t.parquet")
    assert done.status == 0, done.err
    assert json.loads(done.out)["rows"] == 3
    table = pd.read_parquet(tmp_path / "t.parquet")
    measured = read_measured(tmp_path / "t.difficulty.h5")
    assert tuple(table.columns[: len(COLUMNS) + 2]) == (
        *COLUMNS,
        "measured_steps",
        "measured_damage",
    )
    np.testing.assert_array_equal(table["measured_steps"], measured.steps)
    np.testing.assert_array_equal(table["measured_damage"], measured.damage)
    allowed = 0.01 * json.loads(done.out)["retained_loss"]
    for row in table.itertuples():
        if 0 < row.measured_steps < np.inf:
            assert (row.recommended == "ascent") == (row.measured_damage <= allowed)


@pytest.mark.slow
def test_the_target_unseen_follows_the_recipe_of_a_file_or_the_recorded_one(call, run, tmp_path):
    recipe = Recipe(lr=1e-2, epochs=2, batch_size=4, dropout=False)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe.as_json()))
    asked = ("--ids", "r0-3,r0-5", "--target", "unseen", "--measure")
    loaded = Run.open(run)
    targets = []
    for given, how in (((), None), (("--recipe", path), recipe)):
        done = call(*asked, *given, "--overwrite")
        assert done.status == 0, done.err
        assert "local retrainings, about" in done.err
        protocol = Protocol(target="unseen", recipe=how)
        units = find_units(loaded, ["r0-3", "r0-5"], None, protocol, None)
        measured = read_measured(tmp_path / "t.difficulty.h5")
        np.testing.assert_allclose(measured.target, units.target, rtol=1e-6)
        assert ("recipe" in measured.protocol) == (how is not None)
        targets.append(measured.target)
    assert (np.abs(targets[0] - targets[1]) > 1e-3).all()


def test_a_second_call_measures_nothing_again(call, tmp_path, monkeypatch):
    assert call("--ids", "r0-3,r0-5", "--measure").status == 0
    first = (tmp_path / "t.csv").read_bytes()
    monkeypatch.setattr(
        "unlearn.difficulty.measured.climb_units",
        lambda *_: pytest.fail("a row was unlearned again"),
    )
    assert call("--ids", "r0-3,r0-5", "--measure", "--overwrite").status == 0
    assert (tmp_path / "t.csv").read_bytes() == first


def test_calibrated_rows_say_what_was_measured_and_how_good_it_is(call, tmp_path):
    done = call("--calibrate", "22")
    if done.status:  # too few of the drawn rows reached their targets in this tiny world: said
        assert "a calibration needs at least" in done.err
        done = call("--calibrate", "26", "--steps", "400", "--overwrite")
    assert done.status == 0, done.err
    table = pd.read_csv(tmp_path / "t.csv")
    assert table["measured_steps"].notna().sum() in (22, 26)
    assert "out of fold (and before)" in done.out


def test_groups_are_whole_and_rows_without_one_are_units(call, tmp_path):
    done = call("--by-group", "--ids", "r0-0,r0-22")
    assert done.status == 0, done.err
    table = pd.read_csv(tmp_path / "t.csv", dtype={"id": str})
    assert table["id"].tolist() == ["g0", "r0-22"]
    np.testing.assert_allclose(table["share"], [10 / 26, 1 / 26])


def test_many_rows_are_screened_by_the_close_looks_at_some(call, tmp_path):
    done = call("--screen", "22", "--calibrate", "20", "--checkpointing", "--memory", "1", "--json")
    if done.status:  # too few of the drawn rows reached their targets in this tiny world: said
        assert "a calibration needs at least" in done.err
        done = call("--screen", "22", "--json", "--overwrite")
    assert done.status == 0, done.err
    assert "26 rows: 22 looked at closely, the others screened by them; cost: " in done.err
    table = pd.read_csv(tmp_path / "t.csv", dtype={"id": str})
    assert table["id"].tolist() == [row["id"] for row in ROWS]
    assert table["how"].value_counts().to_dict() == {"close": 22, "screened": 4}
    record = json.loads(done.out)["screening"]
    assert (record["close"], record["screened"]) == (22, 4)
    assert record["features"][:3] == ["loss", "base_loss", "gap"]


def test_rows_named_by_id_are_looked_at_closely_unless_they_are_too_many(call, tmp_path):
    named = ",".join(row["id"] for row in ROWS[:21])
    for screen, screened in ((21, 0), (20, 1)):
        done = call("--ids", named, "--screen", screen, "--overwrite")
        assert done.status == 0, done.err
        table = pd.read_csv(tmp_path / "t.csv")
        assert (table["how"] == "screened").sum() == screened
        assert ("screened by them, from loss" in done.out) == bool(screened)


def test_checkpointing_and_memory_change_no_number(call, tmp_path):
    plain = call("--ids", "r0-3,r0-5")
    less = call("--ids", "r0-3,r0-5", "--checkpointing", "--memory", "0.001", out="u.csv")
    assert (plain.status, less.status) == (0, 0), less.err
    first, second = (pd.read_csv(tmp_path / name) for name in ("t.csv", "u.csv"))
    numbers = first.select_dtypes("number").columns
    np.testing.assert_allclose(second[numbers], first[numbers], rtol=1e-2)  # float32


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--screen", "5"), "screen 5 was given (--screen)"),
        (("--screen", "30", "--measure"), "--screen and --measure"),
        (("--memory", "1e-6"), "(--memory); the ascent of one row"),
        (("--screen", "20", "--calibrate", "21"), "--calibrate 21"),
        (("--ids", "nobody"), "nobody"),
        (("--ids", "r0-1,r0-1"), "more than once"),
        (("--ids", "r0-1", "--ids-file", "x.txt"), "--ids and --ids-file were both given"),
        (("--calibrate", "5"), "--calibrate 5"),
        (("--calibrate", "-3"), "--calibrate -3"),
        (("--calibrate", "20", "--measure"), "--calibrate and --measure"),
        (("--looks", "0"), "--looks 0"),
        (("--seed", "-1"), "--seed -1"),
        (("--max-damage", "-1"), "--max-damage -1"),
        (("--optimizer", "adagrad"), "adagrad"),
        (("--target", "zero"), "zero"),
        (("--holdout", "HELD"), "--holdout was given"),
        (("--target", "unseen", "--holdout", "HELD"), "--holdout was given"),
        (("--recipe", "r.json"), "--recipe was given: it is for --target unseen"),
        (("--target", "unseen", "--recipe", "HELD"), "unseen.jsonl"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(call, run, tmp_path, arguments, said):
    arguments = [run.parent / "unseen.jsonl" if word == "HELD" else word for word in arguments]
    done = call(*arguments)
    assert done.status == 2
    assert said in done.err
    assert list(tmp_path.iterdir()) == []


def test_nothing_that_is_there_is_lost(call, tmp_path):
    for name in ("t.csv", "t.difficulty.h5"):
        (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    assert call("--ids", "r0-1").status == 2
    # the measurements' place is taken by something else
    assert call("--ids", "r0-1", "--measure", "--overwrite").status != 0
    assert contents(tmp_path) == before
    (tmp_path / "folder.csv").mkdir()
    assert call("--overwrite", out="folder.csv").status == 2
    assert call(out="nowhere/t.csv").status == 2
    assert call(out="t.xlsx").status == 2


def test_hostile_ids_stay_one_line_and_come_back(run_main, run, tmp_path):
    hostile = ["a,b", 'q"uote', "x\rr0-1", "line\nrecommended: none 10", "=1+1", "007"]
    write_rows(
        tmp_path / "train.jsonl",
        [row | {"id": id} for row, id in zip(rows(6), hostile, strict=True)],
    )
    model = influence.load(run.parent / "base", run.parent / "trained", device="cpu")
    influence.fit(
        model,
        influence.read_examples(tmp_path / "train.jsonl"),
        directory=tmp_path / "run",
        path=(1.0,),
    )
    done = run_main(
        main,
        "unlearn",
        "difficulty",
        "--run",
        tmp_path / "run",
        "--out",
        tmp_path / "t.csv",
        "--device",
        "cpu",
    )
    assert done.status == 0, done.err
    table = pd.read_csv(tmp_path / "t.csv", dtype={"id": str}, keep_default_na=False)
    assert table["id"].tolist() == hostile
    assert sum(line.startswith("recommended:") for line in done.out.splitlines()) == 1
    assert "\r" not in done.out
