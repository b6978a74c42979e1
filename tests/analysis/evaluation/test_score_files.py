"""Score files of this project and of other tools: their sum over the queries, and refusals."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

import influence
from analysis.evaluation.score_files import helpfulness_in
from influence.errors import InputError, MismatchError
from tests.conftest import build_model, examples, rows

TRAIN, QUERIES = examples(6), examples(3, seed=9)
VALUES = np.arange(18, dtype=np.float32).reshape(3, 6) - 7.5
SUM = VALUES.sum(axis=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    model = build_model("llama", layers=1)
    folder = tmp_path_factory.mktemp("scored") / "run"
    return influence.fit(model, TRAIN, directory=folder, path=(1.0,))


def read(path):
    return helpfulness_in(path, QUERIES, TRAIN)


# ---- this project's ------------------------------------------------------------------------------


def test_scores_of_this_project_are_added_over_the_queries(run, tmp_path):
    scores = run.score(QUERIES, out=tmp_path / "s.h5")
    total = read(tmp_path / "s.h5")
    assert total.dtype == np.float64
    np.testing.assert_array_equal(total, scores.values.sum(axis=0, dtype=np.float64))


def test_a_measurement_that_falls_counts_the_other_way(run, tmp_path):
    scores = run.score(QUERIES, out=tmp_path / "m.h5", measurement="margin")
    assert not scores.attributes["rises"]
    np.testing.assert_array_equal(
        read(tmp_path / "m.h5"), -scores.values.sum(axis=0, dtype=np.float64)
    )


@pytest.mark.parametrize("aggregate", ["sum", "mean"])
def test_queries_scored_together_name_the_same_rows(run, tmp_path, aggregate):
    run.score(QUERIES, out=tmp_path / "each.h5")
    run.score(QUERIES, out=tmp_path / "all.h5", aggregate=aggregate)
    size = {"sum": 1, "mean": 3}[aggregate]
    np.testing.assert_allclose(
        size * read(tmp_path / "all.h5"), read(tmp_path / "each.h5"), rtol=1e-5, atol=1e-7
    )
    with pytest.raises(MismatchError, match=r"all.h5 is of query rows of another content than"):
        helpfulness_in(tmp_path / "all.h5", QUERIES[:2], TRAIN)


def test_scores_of_groups_of_queries_are_refused(run, tmp_path):
    grouped = influence.examples_from_rows([row | {"group": "g"} for row in rows(3, seed=9)])
    run.score(grouped, out=tmp_path / "g.h5", aggregate="group")
    with pytest.raises(InputError, match="has scores of every group of queries: score each query"):
        helpfulness_in(tmp_path / "g.h5", grouped, TRAIN)


@pytest.mark.parametrize(
    ("queries", "train", "sentence"),
    [
        (examples(3, seed=8), TRAIN, "query ids differ: the file of queries has others"),
        (QUERIES[::-1], TRAIN, "query ids differ: .* the same ones in another order"),
        (QUERIES, examples(5), "train ids differ: the run has 5 of them, and the scores 6"),
    ],
)
def test_scores_of_other_rows_are_refused(run, tmp_path, queries, train, sentence):
    run.score(QUERIES, out=tmp_path / "s.h5")
    with pytest.raises(MismatchError, match=f"s.h5: {sentence}"):
        helpfulness_in(tmp_path / "s.h5", queries, train)


@pytest.mark.parametrize("which", ["query", "train"])
def test_the_same_ids_with_another_content_are_refused(run, tmp_path, which):
    run.score(QUERIES, out=tmp_path / "s.h5")
    changed = rows(3, seed=9) if which == "query" else rows(6)
    changed[1]["completion"] = " old cats"
    other = influence.examples_from_rows(changed)
    assert other.ids == (QUERIES.ids if which == "query" else TRAIN.ids)
    given = (other, TRAIN) if which == "query" else (QUERIES, other)
    with pytest.raises(
        MismatchError, match=f"is of {which} rows of another content than .* score again"
    ):
        helpfulness_in(tmp_path / "s.h5", *given)


def test_what_is_no_finished_score_file_is_refused(run, tmp_path):
    run.self_influence(out=tmp_path / "self.h5")
    (tmp_path / "text.h5").write_text("no HDF5")
    run.score(QUERIES, out=tmp_path / "half.h5")
    with h5py.File(tmp_path / "half.h5", "r+") as file:
        file.attrs["complete"] = False
    for name, sentence in (
        ("self.h5", "is no score file: it lacks scores"),
        ("text.h5", "is damaged, truncated, or not an HDF5 file"),
        ("nowhere.h5", "does not exist"),
        ("half.h5", "is unfinished"),
    ):
        with pytest.raises(InputError, match=f"{name} {sentence}.* or a .npy or .npz of another"):
            read(tmp_path / name)


# ---- other tools' --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int64])
def test_a_plain_array_is_taken_as_it_is(tmp_path, kind):
    np.save(tmp_path / "s.npy", VALUES.astype(kind))
    np.testing.assert_array_equal(read(tmp_path / "s.npy"), VALUES.astype(kind).sum(axis=0))


@pytest.mark.parametrize(
    ("arrays", "sign"),
    [
        ({"scores": VALUES, "gradients": np.ones((4, 4)), "time": np.array(3.0)}, 1),
        ({"all_modules": VALUES, "time": np.array(3.0)}, 1),
        ({"scores": VALUES, "query_ids": QUERIES.ids, "train_ids": TRAIN.ids}, 1),
        ({"scores": VALUES, "train_ids": [id.encode() for id in TRAIN.ids]}, 1),
        ({"scores": VALUES, "rises": False}, -1),
        ({"scores": VALUES, "rises": True}, 1),
    ],
)
def test_the_scores_among_several_arrays(tmp_path, arrays, sign):
    np.savez(tmp_path / "s.npz", **arrays)
    np.testing.assert_array_equal(read(tmp_path / "s.npz"), sign * SUM)


def test_ids_beside_an_array_must_be_those_of_the_rows(tmp_path):
    np.savez(tmp_path / "s.npz", scores=VALUES, train_ids=TRAIN.ids[::-1])
    with pytest.raises(MismatchError, match=r"s.npz: train ids differ: the run has the same ones"):
        read(tmp_path / "s.npz")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (VALUES.T, r"shape \[6, 3\]; expected \[query, train\], \[3, 6\]: turn it over"),
        (VALUES[:2], r"shape \[2, 6\]; .*: score these queries and rows, in order"),
        (VALUES.sum(axis=0), r"shape \[6\]; expected"),
        (VALUES.astype(complex), "type complex128; expected real numbers"),
        (VALUES > 0, "type bool; expected real numbers"),
        (np.where(VALUES == 1.5, np.nan, VALUES), "1 scores that are NaN .* query 1, row 3"),
        (np.where(VALUES < -6, np.inf, VALUES), "2 scores that are NaN .* query 0, row 0"),
    ],
)
def test_arrays_that_cannot_be_these_scores_are_refused(tmp_path, values, sentence):
    np.save(tmp_path / "s.npy", values)
    with pytest.raises(InputError, match=f"s.npy holds .*{sentence}"):
        read(tmp_path / "s.npy")


def test_files_that_hold_no_scores_are_refused(tmp_path):
    np.savez(tmp_path / "two.npz", a=VALUES, b=VALUES)
    np.savez(tmp_path / "none.npz")
    np.save(tmp_path / "objects.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "two.npz").read_bytes()[:200])
    for name, sentence in (
        ("two.npz", "holds a, b; expected one array of scores .*: call it scores"),
        ("none.npz", "holds nothing; expected one array"),
        ("objects.npy", "cannot be read .it holds no plain arrays."),
        ("text.npy", "cannot be read"),
        ("cut.npz", "cannot be read"),
        ("nowhere.npy", "does not exist: check the path"),
    ):
        with pytest.raises(InputError, match=f"{name} {sentence}"):
            read(tmp_path / name)
