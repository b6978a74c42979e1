"""Figures of scores, rows and edits: what is in them, and refusals. Looked at by eye too."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import influence
from analysis import plots
from influence import Scores, SelfInfluence
from influence.errors import InputError
from unlearn.difficulty import Forecast
from unlearn.record.edit_record import EditRecord

ODD = "$x^2$ <b>&"
TRAIN = influence.examples_from_rows(
    [
        {
            "id": f"t{k}",
            "prompt": f"p{k}",
            "completion": " c",
            "group": f"g{k % 2}" if k < 5 else None,
        }
        for k in range(6)
    ]
)


@pytest.fixture
def scores():
    values = np.array([[3.0, -1.0, 0.5, 0.0, -2.0, 1.0], [0.0] * 6], np.float32)
    modules = np.stack([0.25 * values, 0.75 * values], 1)
    attributes = {"unit": "nats per token"}
    return Scores(
        values, [ODD, "q1"], TRAIN.ids, np.zeros(2), np.ones(2, bool), attributes, modules, ["layers.0", "layers.1"],
        train_rows=TRAIN,
    )  # fmt: skip


def texts(path) -> list[str]:
    from html import unescape

    return [unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())]


def test_proponents_above_opponents(scores, tmp_path):
    found = texts(plots.top_plot(scores, 0, tmp_path / "top.svg"))
    rows = [text.split(":")[0] for text in found if re.match(r"t\d: ", text)]
    assert rows == ["t0", "t5", "t2", "t1", "t4"]
    assert "t0: c" in found
    assert f"Rows behind {ODD}" in found
    assert "score, nats per token" in found
    assert {"+3", "-2"} <= {text.replace("\u2212", "-") for text in found}
    fewer = texts(plots.top_plot(scores, ODD, tmp_path / "one.svg", k=1))
    assert [text.split(":")[0] for text in fewer if re.match(r"t\d: ", text)] == ["t0", "t4"]
    assert "t0" in texts(plots.top_plot(replace(scores, train_rows=None), 0, tmp_path / "ids.svg"))


def test_a_measurement_that_falls_turns_the_ends(scores, tmp_path):
    falls = replace(scores, attributes=scores.attributes | {"rises": False})
    found = texts(plots.top_plot(falls, 0, tmp_path / "top.svg", k=1))
    assert [text.split(":")[0] for text in found if re.match(r"t\d: ", text)] == ["t4", "t0"]


def test_modules_by_what_they_say_for_and_against(scores, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "analysis.figures._bars", lambda axes, names, values, *a, **k: drawn.append((names, values))
    )
    plots.modules_plot(scores, 0, tmp_path / "modules.png")
    assert [names for names, _ in drawn] == [["layers.0", "layers.1"]] * 2
    np.testing.assert_allclose([values for _, values in drawn], [[1.125, 3.375], [-0.75, -2.25]])
    found = texts(plots.modules_plot(scores, 0, tmp_path / "one.svg", k=1))
    assert "the 1 strongest of 2" in found
    assert drawn[-2][0] == ["layers.1"]


def test_sums_of_groups(scores, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    shown = []
    image = Axes.imshow
    monkeypatch.setattr(
        Axes, "imshow", lambda axes, values, **k: shown.append(values) or image(axes, values, **k)
    )
    found = texts(plots.groups_plot(scores, tmp_path / "groups.svg"))
    np.testing.assert_allclose(shown[0], [[3 + 0.5 - 2, -1 + 0], [0, 0]])
    assert {"g0", "g1", ODD, "q1", "sum of scores, nats per token"} <= set(found)
    many = replace(
        scores, values=np.repeat(scores.values, 50, 0), query_ids=[f"q{k}" for k in range(100)]
    )
    assert "60 of 100 queries" in texts(plots.groups_plot(many, tmp_path / "many.svg"))


def forecast(steps) -> Forecast:
    table = pd.DataFrame({"id": TRAIN.ids[: len(steps)], "steps": steps})
    return Forecast(table, {"steps": 200}, 2, 0.5)


def test_self_influence_beside_difficulty(tmp_path):
    own = SelfInfluence(np.array([0.1, 0.2, 0.3, -0.1, 0.5, 0.6], np.float32), TRAIN.ids, 0.0)
    steps = forecast([3.0, 5.0, np.inf, 4.0, 9.0, 2.0])
    found = texts(plots.difficulty_plot(own, steps, tmp_path / "map.svg", train=TRAIN))
    assert {"g0", "g1", "other rows", "self-influence, nats per token"} <= set(found)
    assert "1 rows that no ascent reaches are left out" in found
    assert "g0" not in texts(plots.difficulty_plot(own, steps, tmp_path / "plain.svg"))
    for none in (forecast([np.inf]), forecast([])):
        with pytest.raises(InputError, match="no row has both"):
            plots.difficulty_plot(own, none, tmp_path / "none.svg")


def record(edited, retained, target=1.0) -> EditRecord:
    losses = {
        "edited": dict(zip(("before", "after"), edited, strict=True))
        | {"target": target, "rows": 1},
        "retained": dict(zip(("before", "after"), retained, strict=True)) | {"rows": 1},
    }
    return EditRecord.salvaged({"kind": "remove", "losses": losses})


def test_edits_by_what_they_reach_and_cost(tmp_path):
    edits = {ODD: record((0.1, 1.1), (0.5, 0.6)), "b": record((0.1, 2.0), (0.5, 0.9))}
    found = texts(plots.trade_off_plot(edits, tmp_path / "trade.svg"))
    assert {ODD, "b", "loss to reach", "hollow: before the edit"} <= set(found)
    for none in ({}, {"a": EditRecord.salvaged({})}):
        with pytest.raises(InputError, match="no edit was given that has its losses"):
            plots.trade_off_plot(none, tmp_path / "none.svg")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s, p: plots.top_plot(s, 9, p), "query 9 was given"),
        (lambda s, p: plots.top_plot(s, 1, p), "has no score but 0"),
        (lambda s, p: plots.modules_plot(replace(s, modules=None), 0, p), "per_module=True"),
        (lambda s, p: plots.groups_plot(replace(s, train_rows=None), p), "give train="),
        (lambda s, p: plots.groups_plot(s, p, train=TRAIN[:2]), "give train="),
        (
            lambda s, p: plots.groups_plot(
                s,
                p,
                train=influence.examples_from_rows([{"id": i, "text": "t"} for i in TRAIN.ids]),
            ),
            "no training row has a group",
        ),
        (lambda s, p: plots.top_plot(s, 0, p.with_suffix(".pdf")), r"ends in \.png or \.svg"),
    ],
)
def test_what_cannot_be_drawn_is_said(scores, tmp_path, call, words):
    with pytest.raises(InputError, match=words):
        call(scores, tmp_path / "f.png")
    assert list(tmp_path.iterdir()) == []
