"""Queries taken together: the mean, the sum, the groups."""

from __future__ import annotations

import numpy as np
import pytest

import influence
from influence.errors import InputError, MismatchError
from tests.conftest import build_model, rows, teach
from tests.oracles import close

N = 8


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    data = influence.examples_from_rows(rows(N))
    model = teach(build_model(layers=1, target_modules=["q_proj", "v_proj"]), data)
    return influence.fit(model, data, directory=tmp_path_factory.mktemp("asked") / "run")


@pytest.fixture(scope="module")
def queries():
    return influence.examples_from_rows(
        [row | {"group": f"g{i % 2}"} for i, row in enumerate(rows(5, seed=1))]
    )


@pytest.mark.parametrize("credit", ["shared", "additive"])
def test_a_set_of_queries_is_the_mean_or_sum_of_its_members(
    run, queries, credit, double, monkeypatch
):
    monkeypatch.setattr("influence.at_point.PART_BYTES", 2 * 8 * run.model.space.size)
    each = run.score(queries, credit=credit).values
    mean, total, group = (
        run.score(queries, credit=credit, aggregate=name) for name in ("mean", "sum", "group")
    )
    close(mean.values, each.mean(0, keepdims=True))
    close(total.values, each.sum(0, keepdims=True))
    close(group.values, np.stack([each[[0, 2, 4]].mean(0), each[[1, 3]].mean(0)]))
    assert (mean.query_ids, total.query_ids, group.query_ids) == (["mean"], ["sum"], ["g0", "g1"])
    assert mean.attributes["aggregate"] == "mean"


def test_parts_of_a_set_add_up_too(run, queries, double):
    scores = run.score(queries, aggregate="mean", per_module=True, per_token=True)
    close(scores.modules.sum(1), scores.values)
    close([scores.tokens.row(0, row)[1].sum() for row in range(N)], scores.values[0], 1e-8)


def test_contrasts_are_taken_together(run, double):
    asked = rows(3, seed=1)
    other = [row | {"completion": " red dog"} for row in asked]
    queries, against = (influence.examples_from_rows(each) for each in (asked, other))
    contrast = influence.Contrast(against)
    each = run.score(queries, measurement=contrast).values
    close(run.score(queries, measurement=contrast, aggregate="mean").values[0], each.mean(0))


def test_a_file_of_a_set_is_not_taken_for_one_of_single_queries(run, queries, tmp_path):
    one = run.score(queries[:1], out=tmp_path / "scores.h5", aggregate="mean")
    assert influence.Scores.load(tmp_path / "scores.h5").query_ids == ["mean"]
    assert run.score(queries[:1], out=tmp_path / "scores.h5", aggregate="mean").values == (
        pytest.approx(one.values)
    )
    with pytest.raises(MismatchError, match="aggregate mean there, sum now"):
        run.score(queries[:1], out=tmp_path / "scores.h5", aggregate="sum")
    with pytest.raises(MismatchError, match="aggregate mean there, the default now"):
        run.score(queries[:1], out=tmp_path / "scores.h5")


def test_what_cannot_be_taken_together_is_refused(run, queries):
    with pytest.raises(InputError, match="expected mean, sum, group or none"):
        run.score(queries, aggregate="median")
    nameless = influence.examples_from_rows(rows(2, seed=4))
    with pytest.raises(InputError, match="2 of 2 have none"):
        run.score(nameless, aggregate="group")
