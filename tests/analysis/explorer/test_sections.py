from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from analysis.explorer import sections
from analysis.explorer.data import gather
from tests.analysis.explorer.helpers import rows_of, write_run, write_scores


def test_the_heat_map_sums_scores_over_groups(world):
    (plot,) = sections.heatmap(world.explored)
    assert plot["columns"] == ["group 0", "group 1", "group 2"]
    groups = world.explored.queries.groups
    assert plot["index"] == sorted(range(4), key=lambda q: groups[q])
    assert plot["lines"] == [f"query-{q}" for q in plot["index"]]
    for line, query in enumerate(plot["index"]):
        for group in range(3):
            expected = sum(float(world.values[query, i]) for i in range(12) if i % 3 == group)
            assert plot["values"][line][group] == pytest.approx(expected, rel=6e-3)


def test_rows_without_a_group_are_in_no_column(tmp_path):
    rows = rows_of(4)
    del rows[1]["group"]
    rows[2]["group"], rows[3]["group"] = "group 10", "group 9"
    write_run(tmp_path / "run", rows)
    write_scores(tmp_path / "run", np.array([[1.0, 2, 4, 8]]), rows_of(1, "query"))
    (plot,) = sections.heatmap(gather(tmp_path / "run"))
    assert plot["columns"] == ["group 0", "group 9", "group 10"]
    assert plot["values"] == [[1, 8, 4]]


def test_of_many_groups_and_queries_the_strongest_and_first_are_said(world, monkeypatch):
    monkeypatch.setattr(sections, "GROUPS", 2)
    monkeypatch.setattr(sections, "HEAT_QUERIES", 3)
    note, plot = sections.heatmap(world.explored)
    assert (
        note["text"] == "Shown: the 2 groups of 3 with the largest sums; the first 3 queries of 4."
    )
    assert (len(plot["columns"]), len(plot["lines"])) == (2, 3)
    sums = [np.abs(world.values[:, g::3].sum(1)).max() for g in range(3)]
    assert plot["columns"] == [f"group {g}" for g in sorted(np.argsort(sums)[1:])]


def test_names_with_numbers_are_in_their_order():
    names = ["b 10", "b 9", "a", "10", "9", "", "b", "²"]
    assert sorted(names, key=sections.in_order) == ["", "9", "10", "a", "b", "b 9", "b 10", "²"]


def test_the_cleaning_list_can_be_ticked(world):
    counted, unknown, found = sections.cleaning(world.explored)
    assert counted["text"].startswith(
        "4 entries: 2 duplicate, 2 outlier. Rows to look at, no verdict."
    )
    assert unknown["text"].startswith("1 of them name")
    assert found["kind"] == "rows"
    assert found["index"] == [3, 3, 9, -1]
    assert [each["label"] for each in found["columns"]] == [
        *("id", "reason", "score", "evidence", "gain", "suggested", "decision"),
    ]
    assert found["rows"][1] == ["row-3", "outlier", 0.5, "far from all", None, "", "keep"]
    assert found["reasons"] == {"duplicate": 2, "outlier": 2}
    (empty,) = sections.cleaning(replace(world.explored, cleaning=[]))
    assert "empty" in empty["text"]


def test_the_map_of_rows(world):
    unreached, plot, table = sections.rows_map(world.explored)
    assert unreached["text"].startswith("1 row not drawn")
    points = {
        index: (x, y)
        for series in plot["series"]
        for index, x, y in zip(series["index"], series["x"], series["y"], strict=True)
    }
    assert sorted(points) == [k for k in range(12) if k != 2]
    for k, (x, y) in points.items():
        assert (x, y) == pytest.approx((k + 1.5, float(world.own[k])), rel=1e-3)
    assert [series["name"] for series in plot["series"]] == ["group 0", "group 1", "group 2"]
    medians = {row[0]: row[2] for row in table["rows"]}
    assert medians["group 1"] == pytest.approx(float(np.median(world.own[1::3])))


def test_the_map_of_self_influence_alone_and_of_difficulty_alone(world):
    own, _ = sections.rows_map(replace(world.explored, difficulty=None))
    ranks = {
        i: x for series in own["series"] for i, x in zip(series["index"], series["x"], strict=True)
    }
    order = np.argsort(-world.own)
    assert [ranks[i] for i in order.tolist()] == list(range(1, 13))
    _, hard, _ = sections.rows_map(replace(world.explored, self_influence=None))
    y = {
        i: y for series in hard["series"] for i, y in zip(series["index"], series["y"], strict=True)
    }
    assert y[7] == 0.07


def test_of_many_rows_the_highest_are_all_drawn(world, monkeypatch):
    monkeypatch.setattr(sections, "POINTS", 6)
    said, plot, _ = sections.rows_map(replace(world.explored, difficulty=None))
    shown = [i for series in plot["series"] for i in series["index"]]
    assert set(np.argsort(-world.own)[:3].tolist()) <= set(shown)
    assert len(shown) == len(set(shown)) == 6
    assert said["text"].startswith("6 of 12 rows are drawn: the 3 highest")


def test_small_groups_share_one_colour(world, monkeypatch):
    monkeypatch.setattr(sections, "COLOURED", 1)
    plot = sections.rows_map(replace(world.explored, difficulty=None))[0]
    assert [(each["name"], each["other"]) for each in plot["series"]] == [
        ("group 0", False),
        ("other rows", True),
    ]


def test_rows_without_any_number(world):
    forecast = {"row-2": {"steps": float("inf"), "damage": None}}
    found = sections.rows_map(replace(world.explored, self_influence=None, difficulty=forecast))
    assert found[-1]["tone"] == "warn"


def test_axes_are_logarithmic_where_values_are_wide():
    assert sections._wide(np.array([1.0, 2, 3, 200]))
    assert not sections._wide(np.array([1.0, 2, 3]))
    assert not sections._wide(np.array([-1.0, 2, 3, 200]))


def test_sections_that_a_run_has(world):
    assert sections.present(world.explored)[:2] == ["queries", "cleaning"]
    assert "edits" not in sections.present(world.explored)
    (world.directory / "audit.jsonl").write_text("")
    try:
        assert "edits" not in sections.present(world.explored)  # a lock left it empty
        (world.directory / "audit.jsonl").write_text("{}\n")
        assert "edits" in sections.present(world.explored)
    finally:
        (world.directory / "audit.jsonl").unlink()
    for each in sections.SECTIONS.values():
        assert not each.missing or "--run RUN" in each.missing.split("`")[1]
    assert sections.SECTIONS["queries"].blocks(world.explored) == []
