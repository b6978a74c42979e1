"""Scores as a frame and as an xarray data set, beside the matrix itself."""

from __future__ import annotations

import sys
from dataclasses import replace

import h5py
import numpy as np
import pytest

import influence
from influence import Scores
from influence.errors import InputError, MismatchError
from influence.tokenwise import Tokenwise
from tests.helpers import write_rows

VALUES = np.array([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]], np.float32)
TRAIN = influence.examples_from_rows(
    [
        {"id": "a", "prompt": "p", "completion": " one", "group": "g"},
        {"id": "b", "text": "two"},
        {"id": "c", "prompt": "p", "completion": " one"},
    ]
)
QUERIES = influence.examples_from_rows(
    [{"id": "q", "prompt": "who", "completion": " me"}, {"id": "r", "text": "two"}]
)


@pytest.fixture
def scores():
    attributes = {"unit": "nats per token", "measurement": "loss"}
    return Scores(
        VALUES,
        ["q", "r"],
        ["a", "b", "c"],
        np.array([0.1, 0.2]),
        np.array([True, False]),
        attributes,
    )


def test_a_line_for_each_query_and_row(scores):
    frame = scores.to_frame()
    assert frame.columns.tolist() == ["query_id", "train_id", "score"]
    expected = [(q, i, VALUES[k, n]) for k, q in enumerate("qr") for n, i in enumerate("abc")]
    assert list(frame.itertuples(index=False, name=None)) == expected
    wide = frame.pivot(index="query_id", columns="train_id", values="score")
    np.testing.assert_array_equal(wide.to_numpy(), VALUES)
    assert frame["score"].dtype == np.float32
    strongest = frame.loc[frame.groupby("query_id", observed=True)["score"].idxmax(), "train_id"]
    assert strongest.tolist() == ["a", "b"]


def test_texts_and_groups_are_added(scores):
    frame = scores.to_frame(texts=True, train=TRAIN, queries=QUERIES)
    assert frame["query_text"].tolist() == ["who me"] * 3 + ["two"] * 3
    assert frame["train_text"].tolist() == ["p one", "two", "p one"] * 2
    assert frame["train_group"].isna().tolist() == [False, True, True] * 2
    assert frame["train_group"][0] == "g"
    assert "query_group" not in frame
    held = replace(scores, train_rows=TRAIN, query_rows=QUERIES).to_frame(texts=True)
    assert held.equals(frame)


def test_a_long_text_is_held_once(scores):
    """A line costs a few bytes however long its texts are."""
    count = 200
    rows = influence.examples_from_rows(
        [{"id": str(k), "text": f"{k} " + "x" * 10_000} for k in range(count)]
    )
    many = replace(
        scores, values=np.zeros((count, count), np.float32), query_ids=rows.ids, train_ids=rows.ids
    )
    frame = many.to_frame(texts=True, train=rows, queries=rows)
    assert frame.memory_usage(deep=True).sum() < 2 * 1.3 * count * 10_000 + 20 * count**2


def test_sets_of_queries_have_no_text(scores):
    grouped = replace(scores, attributes=scores.attributes | {"aggregate": "group"})
    frame = grouped.to_frame(texts=True, train=TRAIN)
    assert frame.columns.tolist() == ["query_id", "train_id", "score", "train_text", "train_group"]


def test_what_is_not_known_is_asked_for(scores):
    for given, words in (
        ({}, r"the training rows are not known here: give train=influence\.read_examples"),
        ({"train": TRAIN}, r"the queries are not known here: give queries="),
    ):
        with pytest.raises(InputError, match=words):
            scores.to_frame(texts=True, **given)
    with pytest.raises(MismatchError, match=r"queries= has 3 rows, and not the 2 queries"):
        scores.to_frame(texts=True, train=TRAIN, queries=TRAIN)


def test_no_query_and_no_row():
    empty = Scores(np.zeros((0, 0), np.float32), [], [], np.zeros(0), np.zeros(0, bool))
    assert empty.to_frame().empty
    assert repr(empty).startswith("Scores(0 queries x 0 training rows")


def test_texts_of_a_file_are_read_again(made, tmp_path):
    """From the run that the file lies in, and from where the queries lay."""
    frame = Scores.load(made / "run" / "scores.h5").to_frame(texts=True)
    train = influence.read_examples(made / "train.jsonl")
    assert frame["train_text"][3] == train[3].prompt + train[3].completion
    with h5py.File(made / "run" / "scores.h5") as file:
        np.testing.assert_array_equal(frame["score"], file["scores"][()].ravel())
    moved = tmp_path / "scores.h5"
    moved.write_bytes((made / "run" / "scores.h5").read_bytes())
    with pytest.raises(InputError, match="training rows are not known here"):
        Scores.load(moved).to_frame(texts=True)
    write_rows(tmp_path / "manifest.json", [])
    assert Scores.load(moved).to_frame(texts=False).shape == (80, 3)


def test_an_xarray_data_set_with_named_coordinates(scores):
    pytest.importorskip("xarray")
    modules = np.stack([0.25 * VALUES, 0.75 * VALUES], 1)
    tokens = Tokenwise(
        np.arange(10, dtype=np.float32).reshape(2, 5), np.array([0, 2, 2, 5]), np.arange(5)
    )
    found = replace(scores, modules=modules, module_names=["m", "n"], tokens=tokens).to_xarray()
    assert float(found["scores"].sel(query="r", train="b")) == 3.0
    assert not bool(found["converged"].sel(query="r"))
    np.testing.assert_array_equal(found["by_module"].sum("module"), VALUES)
    assert found["by_module"].dims == ("query", "module", "train")
    assert found["by_token"].dims == ("query", "position")
    assert found["token_row"].values.tolist() == [0, 0, 2, 2, 2]
    assert found.attrs["unit"] == "nats per token"
    assert "by_module" not in scores.to_xarray()


def test_without_xarray_it_is_said_what_to_install(scores, monkeypatch):
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(InputError, match=r"xarray is not installed: pip install xarray"):
        scores.to_xarray()
