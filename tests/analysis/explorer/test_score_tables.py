from __future__ import annotations

import numpy as np
import pytest

from analysis.explorer.score_tables import TOKEN_NAMES, open_scores, self_influences
from influence.errors import InputError, MismatchError, StoreError
from influence.store import write_file
from tests.analysis.explorer.helpers import rows_of, write_run, write_scores

N, Q = 9, 5


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with its scores in whole, and the two strongest of either end."""
    run = tmp_path_factory.mktemp("tables") / "run"
    manifest = write_run(run, rows_of(N))
    values = np.random.default_rng(1).normal(size=(Q, N)).astype(np.float32)
    tokens = np.arange(Q * 2 * N, dtype=np.float32).reshape(Q, 2 * N)
    whole = write_scores(
        run,
        values,
        rows_of(Q, "query"),
        modules=np.stack([values / 4, 3 * values / 4], 1),
        self_influence=np.arange(N),
        tokens=tokens,
        token_ids=np.arange(100, 100 + 2 * N, dtype=np.int32),
        offsets=np.arange(0, 2 * N + 1, 2),
    )
    some = write_scores(run, values, rows_of(Q, "query"), name="strongest.h5", kept=2)
    ids = [f"row-{k}" for k in range(N)]
    tables = [open_scores(path, manifest.digest, ids) for path in (whole, some)]
    return run, manifest, values, tokens, *tables


def test_names_are_those_of_the_score_file():
    from influence.scorefile import TOKEN_NAMES as there

    assert there == TOKEN_NAMES


def test_rows_of_a_query_in_order(made):
    values, table = made[2], made[4]
    for query in range(Q):
        rows, scores = table.query(query)
        pairs = sorted(enumerate(values[query].tolist()), key=lambda pair: -pair[1])
        assert list(zip(rows.tolist(), scores.tolist(), strict=True)) == pairs


def test_queries_of_a_row_in_order(made):
    values, table = made[2], made[4]
    queries, scores = table.row(3)
    assert queries.tolist() == sorted(range(Q), key=lambda q: -values[q, 3])
    assert scores.tolist() == sorted(values[:, 3].tolist(), reverse=True)


def test_a_measurement_that_falls_has_its_proponents_below(made, tmp_path):
    run, manifest, values = made[:3]
    path = write_scores(run, values, rows_of(Q, "query"), name="margin.h5", rises=False)
    rows, _ = open_scores(path, manifest.digest, None).query(0)
    assert rows.tolist() == sorted(range(N), key=lambda i: values[0, i])


def test_the_strongest_say_what_the_whole_says_of_them(made):
    values, whole, some = made[2], made[4], made[5]
    assert (whole.kept, some.kept) == (None, 2)
    for query in range(Q):
        rows, scores = some.query(query)
        order = whole.query(query)[0].tolist()
        assert rows.tolist() == order[:2] + order[-2:]
        assert scores.tolist() == values[query, rows].tolist()
    kept = [q for q in range(Q) if 4 in some.query(q)[0]]
    queries, scores = some.row(4)
    assert sorted(queries.tolist()) == kept
    assert scores.tolist() == [values[q, 4] for q in queries]
    matrix = some.matrix()
    assert np.isfinite(matrix).sum() == 4 * Q
    assert np.array_equal(matrix[np.isfinite(matrix)], values[np.isfinite(matrix)])


def test_sums_over_groups(made):
    values, whole, some = made[2], made[4], made[5]
    members = np.array([0, 1, -1] * 3)
    expected = [[sum(values[q, i] for i in (g, g + 3, g + 6)) for g in (0, 1)] for q in range(Q)]
    np.testing.assert_allclose(whole.group_sums(members, 2), expected, rtol=1e-6)
    for query in range(Q):
        rows = some.query(query)[0].tolist()
        expected = [sum(values[query, i] for i in rows if members[i] == g) for g in (0, 1)]
        np.testing.assert_allclose(
            some.group_sums(members, 2)[query], expected, rtol=1e-5, atol=1e-7
        )


def test_splits_are_read_for_one_pair(made):
    values, tokens, table = made[2:5]
    detail = table.detail(3, 5)
    assert detail.tokens == [(110, tokens[3, 10]), (111, tokens[3, 11])]
    assert [name for name, _ in detail.modules] == ["layers.0.q_proj", "layers.1.q_proj"]
    np.testing.assert_allclose(
        [value for _, value in detail.modules], values[3, 5] * np.array([0.25, 0.75])
    )
    assert made[5].detail(3, 5).tokens is made[5].detail(3, 5).modules is None


def test_self_influences_are_of_this_run(made):
    run, manifest = made[:2]
    values, unit = self_influences(run / "scores.h5", manifest.digest)
    assert (values.tolist(), unit) == (list(range(N)), "nats per token")
    assert self_influences(run / "scores.h5", "0" * 64) is None
    assert self_influences(run / "strongest.h5", manifest.digest) is None
    assert self_influences(run / "none.h5", manifest.digest) is None


def test_other_files_are_refused(made, tmp_path):
    run, manifest = made[:2]
    with pytest.raises(InputError, match="does not exist"):
        open_scores(tmp_path / "none.h5", manifest.digest, None)
    with pytest.raises(MismatchError, match="another run"):
        open_scores(run / "scores.h5", "0" * 64, None)
    with pytest.raises(MismatchError, match="another run"):
        open_scores(run / "scores.h5", manifest.digest, ["other"] * N)
    write_file(tmp_path / "empty.h5", attrs={"x": 1})
    with pytest.raises(StoreError, match="no scores"):
        open_scores(tmp_path / "empty.h5", manifest.digest, None)
    strings = {"query_ids": ["q"], "train_ids": ["r"]}
    write_file(
        tmp_path / "half.h5",
        {"scores": np.zeros((1, 1))},
        attrs={"complete": False},
        strings=strings,
    )
    with pytest.raises(StoreError, match="unfinished"):
        open_scores(tmp_path / "half.h5", manifest.digest, None)
