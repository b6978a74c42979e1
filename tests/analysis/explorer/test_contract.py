from __future__ import annotations

import json

import numpy as np
import pytest

from analysis.explorer import contract
from analysis.explorer.data import gather
from influence.errors import InputError
from tests.analysis.explorer.helpers import rows_of, write_run


def test_meta(world):
    meta = contract.meta(world.explored)
    assert (meta["rows"], meta["queries"], meta["unit"]) == (12, 4, "nats per token")
    names = [name for name, _ in meta["sections"]]
    assert names == [
        "queries",
        "cleaning",
        "heatmap",
        "map",
        "evaluations",
        "faithfulness",
        "about",
    ]
    assert meta["missing"] == {}
    json.dumps(meta, allow_nan=False)


def test_what_is_missing_says_how_to_make_it(tmp_path):
    write_run(tmp_path / "run", rows_of(2))
    meta = contract.meta(gather(tmp_path / "run"))
    assert [name for name, _ in meta["sections"]] == ["about"]
    assert set(meta["missing"]) == {"map", "faithfulness"}
    assert "influence self --run" in meta["missing"]["map"][1]


def test_search_finds_every_word_in_any_place(world):
    def find(kind, text):
        return contract.search(world.explored, kind, text)

    assert find("rows", "") == list(range(12))
    assert find("rows", "ROW-3") == [3]
    assert find("rows", "group kind NUMBER") == list(range(12))
    assert find("queries", "group 1 NUMBER") == [1]
    assert find("rows", "kind 4.") == [4, 9]
    assert find("rows", "nothing like it") == []


def test_a_query_names_its_rows_proponents_first(world):
    found = contract.query(world.explored, 2)
    expected = sorted(range(12), key=lambda i: -world.values[2, i])
    assert found["rows"] == expected
    np.testing.assert_allclose(found["scores"], world.values[2, expected], rtol=1e-4)
    assert (found["id"], found["group"], found["parts"][0][0]) == ("query-2", "group 2", "prompt")


def test_a_row_names_its_queries(world):
    found = contract.row(world.explored, 5)
    expected = sorted(range(4), key=lambda q: -world.values[q, 5])
    assert found["queries"] == expected
    np.testing.assert_allclose(found["scores"], world.values[expected, 5], rtol=1e-4)
    assert found["facts"] == world.explored.facts_of(5)


def test_lines_keep_the_order_asked_for(world):
    assert [each["id"] for each in contract.lines(world.explored, "rows", [7, 0])] == [
        "row-7",
        "row-0",
    ]


def test_a_pair_is_split_as_far_as_the_file_splits_it(world):
    found = contract.pair(world.explored, 1, 2)
    assert found["tokens"] is None
    assert [name for name, _ in found["modules"]] == [f"layers.{k}.q_proj" for k in range(3)]
    total = sum(value for _, value in found["modules"])
    assert total == pytest.approx(world.values[1, 2], rel=1e-4)
    assert "--per-token" in found["why"]


def test_every_answer_is_json(world):
    explored = world.explored
    answers = [
        *(contract.query(explored, q) for q in range(4)),
        *(contract.row(explored, i) for i in range(12)),
        *(contract.section(explored, name) for name, _ in contract.meta(explored)["sections"]),
    ]
    for answer in answers:
        assert json.loads(json.dumps(answer, allow_nan=False)) == answer


def test_without_scores_rows_are_there_all_the_same(tmp_path):
    write_run(tmp_path / "run", rows_of(2))
    explored = gather(tmp_path / "run")
    found = contract.row(explored, 1)
    assert (found["id"], found["queries"], found["scores"]) == ("row-1", [], [])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda e: contract.query(e, 4), "there are 4"),
        (lambda e: contract.query(e, -1), "there are 4"),
        (lambda e: contract.row(e, 12), "there are 12"),
        (lambda e: contract.pair(e, 0, 12), "there are 12"),
        (lambda e: contract.lines(e, "rows", [12]), "there are 12"),
        (lambda e: contract.search(e, "people", "x"), "expected queries or rows"),
        (lambda e: contract.section(e, "edits"), "there are queries"),
    ],
)
def test_wrong_questions_are_refused(world, call, says):
    with pytest.raises(InputError, match=says):
        call(world.explored)
