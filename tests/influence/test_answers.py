"""What `influence top` shows of a score file; of `without`, see test_without.py."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest

from influence.answers import describe
from tests.conftest import rows
from tests.helpers import untouched, write_rows
from tests.influence.toy_commands import fit_arguments, wrong


def test_what_scores_were_made_with_is_said_in_one_line():
    attributes = {"geometry": "raw", "curvature": "ekfac", "damping": "mean:0.1"}
    attributes |= {"points": ["0.4", "0.8"], "calibration": "none"}
    made = "raw ekfac, damping mean:0.1, points 0.4, 0.8, credit "
    retrained = {"calibration": "retraining of 3 subsets"}
    for more, said in (
        ({}, "additive, size not calibrated"),  # as files say that were written before
        ({"credit": "additive"}, "additive, size not calibrated"),
        ({"credit": "additive"} | retrained, "additive, size calibrated by retraining of 3 subse"),
        ({"credit": "shared"}, "shared, size from the losses along the path"),
        ({"credit": "shared"} | retrained, "shared, size calibrated by retraining of 3 subsets"),
    ):
        assert describe(attributes | more).startswith(made + said)


def test_top_lists_proponents_and_opponents_by_id_or_position(influence, made):
    by_id = influence("top", "--run", made / "run", "--query", "r9-1", "-k", 2, "--json")
    by_position = influence("top", "--run", made / "run", "--query", 1, "-k", 2, "--json")
    assert by_id.status == by_position.status == 0
    assert by_id.json() == by_position.json()
    with h5py.File(made / "run" / "scores.h5") as file:
        row, ids = file["scores"][1], file["train_ids"].asstr()[()]
    found = by_id.json()
    assert found["query"] == "r9-1"
    assert [entry["id"] for entry in found["proponents"]] == [ids[i] for i in np.argsort(-row)[:2]]
    assert [entry["id"] for entry in found["opponents"]] == [ids[i] for i in np.argsort(row)[:2]]
    assert all(
        entry["score"] == float(row[entry["index"]])
        for entry in found["proponents"] + found["opponents"]
    )
    text = influence("top", "--run", made / "run", "--query", "r9-1", "-k", 2)
    assert text.status == 0
    assert "proponents of r9-1" in text.out
    assert "opponents of r9-1" in text.out
    assert all(entry["id"] in text.out for entry in found["proponents"] + found["opponents"])


def test_top_needs_no_model_but_the_rows_it_was_fitted_on(influence, at):
    manifest = at / "run" / "manifest.json"
    record = json.loads(manifest.read_text())
    record["base"]["path"] = record["adapter"]["path"] = "gone"
    record["data"]["path"] = str(at / "train.jsonl")
    manifest.write_text(json.dumps(record))
    assert influence("top", "--run", at / "run", "--query", 0).status == 0
    write_rows(at / "train.jsonl", rows(20, seed=1))
    result = influence("top", "--run", at / "run", "--query", 0)
    assert result.status == 2
    assert "has changed since" in result.err
    (at / "train.jsonl").unlink()
    assert (
        influence("top", "--run", at / "run", "--query", 0).status == 0
    )  # ids and scores are still shown


def test_top_shows_no_texts_where_the_hub_is_not_reached(influence, at, monkeypatch):
    manifest = json.loads((at / "run" / "manifest.json").read_text())
    manifest["data"]["path"] = "org/name@v1:train"
    (at / "run" / "manifest.json").write_text(json.dumps(manifest))

    def unreachable(*given, **how):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    shown = influence("top", "--run", at / "run", "--query", 0)
    assert shown.status == 0, shown.err
    assert "note: the rows' texts are not shown: org/name@v1:train is no file" in shown.err


@pytest.mark.parametrize("query", ["r9-99", "4", "-1", "", "0.5"])
def test_an_unknown_query(influence, at, query):
    sentence = (
        f"query {query!r} was given; there are 4 scored queries: give a position 0..3 or one of "
        "the ids r9-0, r9-1"
    )
    wrong(influence, at, ["top", "--run", at / "run", f"--query={query}"], sentence)


def test_top_refuses_scores_of_another_run(influence, at):
    influence(*fit_arguments(at, seed=1))
    with untouched(at):
        result = influence(
            "top", "--run", at / "new", "--scores", at / "run" / "scores.h5", "--query", 0
        )
    assert result.status == 2
    assert "belongs to another run than" in result.err


def test_a_run_with_self_influence_only_has_no_scores_to_show(influence, at):
    influence("self", "--run", at / "run", "--out", at / "self.h5")
    wrong(
        influence,
        at,
        ["top", "--run", at / "run", "--scores", at / "self.h5", "--query", 0],
        "it lacks scores",
        status=1,
    )
