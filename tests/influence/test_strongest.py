"""The strongest rows of each query are those of the whole matrix, whatever the slices."""

from __future__ import annotations

import numpy as np
import pytest

import influence
from influence import strongest as module
from influence.damping import Damping
from influence.errors import InputError, MismatchError
from influence.measurements import Contrast, TokenLoss
from influence.strongest import Strongest, strongest
from tests.conftest import build_model, examples, teach
from tests.helpers import untouched

N, K = 9, 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    model = teach(build_model("llama", layers=1), examples(N), steps=5)
    folder = tmp_path_factory.mktemp("strongest")
    return influence.fit(model, examples(N), directory=folder / "run", path=(0.5,))


def queries(n: int = 5):
    return examples(n, seed=9)


@pytest.mark.parametrize("slices", [1, 5])
@pytest.mark.parametrize("measurement", ["loss", "margin"])
def test_rankings_are_those_of_all_scores(run, monkeypatch, slices, measurement):
    if slices == 5:
        monkeypatch.setattr(module, "MEMORY_SHARE", 0.0)  # one query at a time
    whole = run.score(queries(), measurement=measurement)
    found = strongest(run, queries(), K, measurement=measurement)
    for query in range(5):
        assert found.top(query, K) == whole.top(query, K)
        assert found.top(whole.query_ids[query], 1) == whole.top(query, 1)
    assert found.highest.shape == found.lowest.shape == (5, K)
    with pytest.raises(InputError, match="4 rows were asked for, and the file keeps 3"):
        found.top(0, 4)


def test_a_contrast_is_of_the_same_queries_in_every_slice(run, monkeypatch):
    pairs = [("a", "b"), ("c", "d"), ("e", "f")]
    one, two = (
        influence.examples_from_rows(
            [{"prompt": f"the {k}", "completion": f" {pair[side]}"} for k, pair in enumerate(pairs)]
        )
        for side in (0, 1)
    )
    whole = run.score(one, measurement=Contrast(two))
    monkeypatch.setattr(module, "MEMORY_SHARE", 0.0)
    found = strongest(run, one, K, measurement=Contrast(two))
    for query in range(3):
        assert found.top(query, K) == whole.top(query, K)


def test_the_file_is_read_again_and_nothing_else_is_overwritten(run, tmp_path):
    path = tmp_path / "strongest.h5"
    first = strongest(run, queries(), K, out=path)
    with untouched(tmp_path):
        again = strongest(run, queries(), K, out=path)
        read = Strongest.load(path)
        with pytest.raises(MismatchError, match="another top"):
            strongest(run, queries(), 2, out=path)
        with pytest.raises(MismatchError, match="of other queries"):
            strongest(run, queries(4), K, out=path)
        with pytest.raises(MismatchError, match=r"damping mean:0\.1 there, mean:1 now"):
            strongest(run, queries(), K, out=path, damping="mean:1")
    for found in (again, read):
        assert found.top(1, K) == first.top(1, K)
        np.testing.assert_array_equal(found.lowest_scores, first.lowest_scores)
    assert strongest(run, queries(), 2, out=path, overwrite=True).highest.shape == (5, 2)


def test_objects_and_a_new_damping_of_the_run_are_told_apart(run, tmp_path):
    """Requests are compared by what scores are made with, not by the words of the options."""
    path = tmp_path / "strongest.h5"
    strongest(run, queries(), K, out=path, measurement=TokenLoss(0))
    with pytest.raises(MismatchError, match="measurement"):
        strongest(run, queries(), K, out=path, measurement=TokenLoss(-1))
    strongest(run, queries(), K, out=path, overwrite=True, damping=Damping("mean", 0.1))
    with pytest.raises(MismatchError, match=r"damping mean:0\.1 there, mean:10 now"):
        strongest(run, queries(), K, out=path, damping=Damping("mean", 10.0))
    strongest(run, queries(), K, out=path, overwrite=True)
    options = {"path": (0.5,), "damping": "mean:10"}
    again = influence.fit(run.model, examples(N), directory=run.directory, **options)
    with pytest.raises(MismatchError, match=r"damping mean:0\.1 there"):
        strongest(again, queries(), K, out=path)
    influence.fit(run.model, examples(N), directory=run.directory, path=(0.5,))


def test_what_cannot_be_is_refused(run):
    with pytest.raises(InputError, match="expected at least 1"):
        strongest(run, queries(), 0)
    with pytest.raises(InputError, match="per_module was given with the strongest rows alone"):
        strongest(run, queries(), K, per_module=True)
    with pytest.raises(InputError, match="no queries"):
        strongest(run, queries()[:0], K)
