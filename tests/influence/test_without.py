"""What the model would lose without a set of rows: named rows, bounds, the command."""

from __future__ import annotations

import csv

import numpy as np
import pytest

import influence
from influence.cli import main
from influence.errors import InputError
from influence.without import MOST, SIZE, chosen_rows, predictions
from tests.conftest import rows, teach
from tests.helpers import save, write_rows

SITES = {"layers": 1, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that commands can open: base, adapter and rows lie in files."""
    folder = tmp_path_factory.mktemp("without")
    base, adapter = save(folder, **SITES)
    taught = [row | {"group": f"g{i // 3}"} for i, row in enumerate(rows(9))]
    train = write_rows(folder / "train.jsonl", taught)
    write_rows(folder / "queries.jsonl", rows(4, seed=1))
    model = influence.load(base, adapter, device="cpu", dtype="float64")
    data = influence.read_examples(train)
    teach(model, data)
    model.model.save_pretrained(str(folder / "taught"))
    model = influence.load(base, folder / "taught", device="cpu")
    return influence.fit(model, data, directory=folder / "run")


# ---- which rows ----------------------------------------------------------------------------------


def test_rows_are_named_by_id_group_or_both():
    train = influence.examples_from_rows(
        [row | {"group": f"g{i // 2}"} for i, row in enumerate(rows(6))]
    )
    ids = train.ids
    assert chosen_rows(train, [ids[5], ids[0]], None).tolist() == [0, 5]
    assert chosen_rows(train, [], "g1").tolist() == [2, 3]
    assert chosen_rows(train, [ids[2], ids[0]], "g1").tolist() == [0, 2, 3]
    for names, group, said in (
        (["nobody"], None, "1 are no training row's .nobody."),
        ([], "g9", "no training row has it"),
        ([], None, "no rows were named"),
        (ids, None, "every training row was named"),
    ):
        with pytest.raises(InputError, match=said):
            chosen_rows(train, names, group)


# ---- what cannot be ------------------------------------------------------------------------------


def test_predictions_are_held_where_a_loss_can_be():
    before, base = np.array([1.0, 1.0, 1.0, 4.0]), np.array([2.0, 2.0, 2.0, 2.0])
    changes = np.array([0.2, 31.5, -38.0, 0.0])
    found = predictions(["a", "b", "c", "d"], changes, before, base)
    assert [each.predicted for each in found] == [1.2, MOST * 2, 0.0, 4.0]
    assert [each.beyond for each in found] == [False, True, True, False]
    assert all(each.low <= each.predicted <= each.high for each in found)
    assert (found[0].low, found[0].high) == pytest.approx((1 + 0.2 * SIZE[0], 1 + 0.2 * SIZE[1]))
    assert found[3].change == 0


def test_what_was_asked_before_is_answered_without_the_model(run, monkeypatch):
    queries = influence.read_examples(run.directory.parent / "queries.jsonl")
    first = run.without(run.train.ids[:3], queries).as_json()
    monkeypatch.setattr("influence.without.raw_parts", None)
    monkeypatch.setattr("influence.credit.row_kernel", None)
    assert run.without(run.train.ids[:3], queries).as_json() == first
    monkeypatch.undo()
    other = run.without(run.train.ids[:3], queries, damping="mean:3").as_json()
    assert other != first
    assert run.without(run.train.ids[:3], queries).as_json() == first


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_says_what_python_says(run, tmp_path, run_main):
    queries = run.directory.parent / "queries.jsonl"
    effect = run.without(group="g1", queries=influence.read_examples(queries))
    call = ("influence", "without", "--run", run.directory, "--group", "g1", "--queries", queries)
    done = run_main(main, *call, "--json", "--out", tmp_path / "table.csv")
    assert done.status == 0, done.err
    assert done.json() == effect.as_json()
    assert [each["id"] for each in done.json()["removed"]] == run.train.ids[3:6]
    table = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [row["kind"] for row in table] == ["queries"] * 4 + ["removed"] * 3
    assert float(table[0]["predicted"]) == pytest.approx(effect.queries[0].predicted)
    again = run_main(main, *call, "--out", tmp_path / "table.csv")
    assert again.status == 2
    assert "exists" in again.err


def test_the_command_shows_tables(run, run_main):
    ids = ",".join(run.train.ids[:2])
    done = run_main(main, "influence", "without", "--run", run.directory, "--ids", ids)
    assert done.status == 0, done.err
    assert "the removed rows themselves" in done.out
    assert "queries without" not in done.out
    assert "credit shared, size from the losses along the path" in " ".join(done.out.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "name the rows to do without"),
        (("--ids", "nobody"), "nobody"),
        (("--group", "nobodies"), "no training row has it"),
    ],
)
def test_a_wrong_call_says_what_to_do(run, run_main, options, said):
    done = run_main(main, "influence", "without", "--run", run.directory, *options)
    assert done.status == 2
    assert said in done.err
