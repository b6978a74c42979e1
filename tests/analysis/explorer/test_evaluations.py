from __future__ import annotations

from dataclasses import replace

import pytest

from analysis.explorer import evaluations
from influence.manifest import CalibrationRecord, TunedRecord


def test_sets_and_adapters_side_by_side(world):
    table, further, answers = evaluations.blocks(world.explored.evaluations)
    assert table["title"] == "evaluation.json: /adapters/new"
    assert [each["label"] for each in table["columns"]] == [
        *("rows", "under", "how many", "loss", "tokens right"),
    ]
    assert table["rows"] == [["forget", "base", 2, 3.0, None], ["forget", "adapter", 2, 2.5, 0.25]]
    assert further["rows"] == [["membership, adapter, loss, auc", 0.61]]
    assert answers["answers"] == [
        {
            "id": "row-1",
            "prompt": "Who?",
            "said": [["the row itself", " Ann."], ["adapter", " Bob."]],
        }
    ]


def test_records_with_something_else_in_them_are_shown_as_far_as_they_go():
    odd = {
        "sets": ["x"],
        "rows": {"a": 1},
        "adapter": "gone",
        "kl": {"a": {"b": "c", "d": float("nan")}},
    }
    found = evaluations.blocks([("odd.json", odd)])
    assert [each["kind"] for each in found] == ["table"]
    assert found[0]["rows"] == []
    rows = [None, 3, {"generated": "x"}, {"generated": {"adapter": "y"}}]
    found = evaluations.blocks([("odd.json", {"sets": {}, "rows": rows})])
    assert [each["said"] for each in found[-1]["answers"]] == [
        [["the row itself", ""], ["adapter", "y"]]
    ]


def test_many_answers_are_cut_and_said_so(monkeypatch):
    monkeypatch.setattr(evaluations, "ANSWERS", 2)
    rows = [{"id": k, "generated": {"adapter": "y"}} for k in range(3)]
    found = evaluations.blocks([("e.json", {"sets": {}, "rows": rows})])[-1]
    assert [each["id"] for each in found["answers"]] == ["0", "1"]
    assert found["title"].endswith("(the first 2)")


def test_faithfulness_with_its_interval_and_by_query(world):
    facts, plot = evaluations.faithfulness(world.explored.manifest, world.explored.lds)
    shown = {fact["label"]: fact["value"] for fact in facts["facts"]}
    assert shown == {
        "LDS": "0.460 (95%: 0.410 to 0.490)",
        "retrained adapters": "40",
        "queries": "4",
    }
    assert plot["names"] == ["query-1", "query-3", "query-0", "query-2"]
    assert plot["values"] == [0.9, 0.4, 0.1, None]


def test_a_query_whose_correlation_is_nought_is_not_taken_for_undefined(world):
    record = {"lds": None, "per_query": [-0.5, 0.0, None]}
    facts, plot = evaluations.faithfulness(world.explored.manifest, [("f", record)])
    assert facts["facts"][0]["value"] == "not defined"
    assert plot["values"] == [0.0, -0.5, None]


def test_what_was_tuned_and_calibrated(world):
    manifest = replace(
        world.explored.manifest,
        tuned=TunedRecord(None, "kfac", None, "end", "the local checks"),
        calibration={"ekfac mean:0.1": CalibrationRecord(1.25, "retraining")},
    )
    tuned, size, said = evaluations.faithfulness(manifest, [])
    assert [fact["value"] for fact in tuned["facts"]] == ["kfac", "end", "the local checks"]
    assert size["facts"][0]["value"] == "1.25 times"
    assert "analysis lds" in said["text"]


@pytest.mark.parametrize("ids", [None, 3, "ab", ["a"], {"a": 1, "b": 2}])
def test_queries_without_ids_of_their_own_are_numbered(world, ids):
    """Whatever a file has in their place."""
    record = {"lds": [], "per_query": [0.25, 0.5], "query_ids": ids}
    facts, plot, *_ = evaluations.faithfulness(world.explored.manifest, [("f.json", record)])
    assert facts["facts"][0]["value"] == "not defined"
    assert (plot["names"], plot["values"]) == (["1", "0"], [0.5, 0.25])
