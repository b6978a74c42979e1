"""Which rows a method names, by hand: the largest sums over the queries, ties in order."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

import influence
from analysis.evaluation.named_rows import (
    Ranking,
    counts_of,
    own_ranking,
    parted,
    random_rows,
    rankings_of_others,
)
from influence.errors import InputError, MismatchError
from influence.text_search import bm25, text_of
from tests.conftest import build_model, examples

TRAIN, QUERIES = examples(6), examples(3, seed=9)


@pytest.fixture
def run(tokenizer):
    """What naming reads of a run where nothing is scored."""
    return SimpleNamespace(train=TRAIN, model=SimpleNamespace(tokenizer=tokenizer))


def test_the_first_rows_are_the_largest_and_ties_keep_their_order():
    ranking = Ranking("m", np.array([0.0, 2.0, -1.0, 2.0, 5.0, 0.0]))
    assert [ranking.first(k).tolist() for k in (1, 2, 3, 5)] == [
        [4],
        [4, 1],
        [4, 1, 3],
        [4, 1, 3, 0, 5],
    ]


@pytest.mark.parametrize(
    ("shares", "n", "counts"),
    [
        ((0.01, 0.05), 200, [2, 10]),
        ((0.01, 0.05), 12, [1, 1]),  # fewer rows than 1 / share
        ((0.29, 0.07), 100, [29, 7]),  # 0.29 * 100 is 28.999... in binary
        ((0.5,), 3, [2]),
    ],
)
def test_a_share_is_rounded_and_at_least_one_row(shares, n, counts):
    assert counts_of(shares, n) == counts


@pytest.mark.parametrize(("shares", "n"), [((0.01,), 1), ((0.9,), 4)])
def test_something_must_be_left_to_train_on(shares, n):
    with pytest.raises(InputError, match=f"--share {shares[0]} of {n} rows is all of them"):
        counts_of(shares, n)


def test_random_rows_depend_on_seed_and_draw():
    order = random_rows(20, 1, 3)
    assert sorted(order.tolist()) == list(range(20))
    np.testing.assert_array_equal(order, random_rows(20, 1, 3))
    others = [random_rows(20, 0, 3), random_rows(20, 2, 3), random_rows(20, 1, 4)]
    assert all(order.tolist() != other.tolist() for other in others)


def test_files_and_text_are_added_over_the_queries(run, tmp_path):
    values = np.array([[0, 1, 2, 3, 4, 5], [6, 0, 1, 2, 3, 4], [5, 6, 0, 1, 2, 3.5]])
    np.save(tmp_path / "s.npy", values)
    (by_file, by_text), left_out = rankings_of_others(run, QUERIES, [tmp_path / "s.npy"])
    assert (by_file.method, by_text.method, left_out) == (str(tmp_path / "s.npy"), "BM25", {})
    assert by_file.helpfulness.tolist() == [11, 7, 3, 6, 9, 12.5]
    each = bm25([text_of(row) for row in QUERIES], [text_of(row) for row in TRAIN])
    np.testing.assert_allclose(by_text.helpfulness, each.sum(axis=0), rtol=1e-12)
    assert each.any()


def test_token_ids_without_a_text_are_read_as_what_they_decode_to(run):
    words = ["<eos>", "red", "fox", "old", "dog"]

    def decode(ids, *, skip_special_tokens):
        return " ".join(words[id] for id in ids if id or not skip_special_tokens)

    run.model.tokenizer = SimpleNamespace(decode=decode)
    run.train = influence.examples_from_rows([{"input_ids": ids} for ids in ([1, 2, 0], [3, 4, 0])])
    queries = influence.examples_from_rows([{"input_ids": [1, 4, 0]}, {"text": "a red fox"}])
    (by_text,), _ = rankings_of_others(run, queries, [])
    expected = bm25(["red dog a red fox"], ["red fox", "old dog"])[0]
    np.testing.assert_array_equal(by_text.helpfulness, expected)


def test_a_method_that_says_nothing_of_the_rows_is_left_out(run, tmp_path):
    np.save(tmp_path / "same.npy", np.ones((1, 6)) * 0.3)
    strange = influence.examples_from_rows([{"prompt": "zebra", "completion": " quartz"}])
    found, left_out = rankings_of_others(run, strange, [tmp_path / "same.npy"])
    assert found == []
    assert left_out == {
        str(tmp_path / "same.npy"): "it gives every row the same",
        "BM25": "it has no word in common with any row",
    }
    kept, none = parted([Ranking("m", np.array([0.0, 0.0, 1.0]))])
    assert (len(kept), none) == (1, {})


def test_files_are_told_apart_by_their_names(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("s.npy", np.eye(3, 6))
    for files in (["s.npy", "s.npy"], ["random"]):
        with pytest.raises(InputError, match=r"expected different files, not called influence, BM"):
            rankings_of_others(run, QUERIES, files)


def test_the_runs_own_scores_are_kept_and_read_again(tmp_path, monkeypatch):
    model = build_model("llama", layers=1)
    run = influence.fit(model, TRAIN, directory=tmp_path / "run", path=(1.0,))
    ranking = own_ranking(run, QUERIES, tmp_path / "own.h5")
    expected = run.score(QUERIES).values.sum(axis=0, dtype=np.float64)
    np.testing.assert_allclose(ranking.helpfulness, expected, rtol=1e-5, atol=1e-7)
    assert ranking.method == "influence"
    kept = (tmp_path / "own.h5").read_bytes()
    own_ranking(run, QUERIES, tmp_path / "own.h5")
    assert (tmp_path / "own.h5").read_bytes() == kept
    with pytest.raises(MismatchError, match="holds other scores"):
        own_ranking(run, QUERIES[:2], tmp_path / "own.h5")
    own_ranking(run, QUERIES[:2], tmp_path / "own.h5", overwrite=True)
