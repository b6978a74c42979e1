"""Reranking puts exact raw scores in the place of those of few bytes, for the rows that come first."""

from __future__ import annotations

import numpy as np
import pytest

import influence
from influence.asked import Asked
from influence.errors import InputError
from influence.measurements import MeanLoss
from influence.reranking import exact_parts, first_rows
from influence.scores import raw_parts
from influence.setting import Setting
from tests.conftest import build_model, examples, teach
from tests.influence.toy_runs import Interruption

N = 12


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    model = teach(build_model("llama", layers=1), examples(N), steps=5)
    folder = tmp_path_factory.mktemp("reranking")
    options = {"path": (0.4, 0.8), "row_bytes": 64}
    return {
        store: influence.fit(model, examples(N), directory=folder / store, store=store, **options)
        for store in ("full", "features")
    }


def test_first_rows_are_the_ends_of_every_ranking():
    parts = np.array([[[3.0, -1.0, 0.0, 2.0], [0.0, 0.0, 5.0, -9.0]]])
    assert first_rows(parts, lambda each: each[0], 1).tolist() == [0, 1, 2, 3]
    assert first_rows(parts[:, :1], lambda each: each[0], 1).tolist() == [0, 1]
    assert first_rows(parts, lambda each: each[0], 9).tolist() == [0, 1, 2, 3]


def test_exact_parts_are_those_of_a_run_with_whole_gradients(runs):
    queries, rows = examples(3, seed=9), np.array([1, 4, 10])
    tokens = runs["full"].query_tokens(queries)
    setting = Setting.of(runs["features"], credit="shared")
    found = exact_parts(setting, Asked.each(tokens, MeanLoss()), rows)
    exact = raw_parts(Setting.of(runs["full"], credit="shared"), tokens, MeanLoss())
    np.testing.assert_allclose(found, exact[:, :, rows], rtol=1e-9)
    rough = raw_parts(setting, tokens, MeanLoss())[:, :, rows]
    assert np.abs(rough - found).max() > 1e-3 * np.abs(found).max()  # there is something to mend


@pytest.mark.parametrize("credit", ["additive", "shared"])
def test_all_rows_reranked_have_their_exact_scores(runs, credit, tmp_path):
    queries = examples(3, seed=9)
    exact = runs["full"].score(queries, credit=credit)
    rough = runs["features"].score(queries, credit=credit)
    out = tmp_path / "scores.h5"
    found = runs["features"].score(queries, credit=credit, rerank=N, out=out)
    error, before = (np.abs(each.values - exact.values).max() for each in (found, rough))
    # shared credit still takes the rows' similarities from few bytes
    assert error < (1e-5 * np.abs(exact.values).max() if credit == "additive" else before)
    assert found.attributes["rerank"] == N
    assert "rerank" not in rough.attributes
    np.testing.assert_array_equal(
        runs["features"].score(queries, credit=credit, rerank=N, out=out).values, found.values
    )


def test_a_rerank_that_cannot_be_is_told(runs, capsys):
    with pytest.raises(InputError, match="rerank 0 was given; expected at least 1"):
        runs["features"].score(examples(1, seed=9), rerank=0)
    with pytest.raises(InputError, match="rerank 2 was given with per_module"):
        runs["features"].score(examples(1, seed=9), rerank=2, per_module=True)
    found = runs["full"].score(examples(1, seed=9), rerank=2)
    assert "rerank" not in found.attributes
    assert "rerank changes nothing" in capsys.readouterr().err


@pytest.mark.parametrize("credit", ["additive", "shared"])
def test_a_call_killed_after_the_rows_were_computed_again_gives_the_same(
    runs, credit, tmp_path, monkeypatch
):
    queries, run = examples(3, seed=9), runs["features"]
    whole = run.score(queries, credit=credit, rerank=2)
    out = tmp_path / "scores.h5"

    def killed(*_: object) -> None:
        raise Interruption

    with monkeypatch.context() as patch:
        patch.setattr("influence.scorefile.ScoresInTheMaking.seal", killed)
        with pytest.raises(Interruption):
            run.score(queries, credit=credit, rerank=2, out=out)
    found = run.score(queries, credit=credit, rerank=2, out=out)
    np.testing.assert_array_equal(found.values, whole.values)
