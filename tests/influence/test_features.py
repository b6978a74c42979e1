"""Rows in few bytes: what is kept of them, what is answered from them, and when they are not used."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import influence
from influence import features
from influence.errors import InputError
from influence.measurements import MeanLoss
from influence.store import RowFile, open_rows
from tests.conftest import build_model, examples, teach
from tests.influence.toy_runs import Interruption, interrupt_after

N = 14
PATH = (0.4, 0.8)


@pytest.fixture(scope="module")
def taught():
    return teach(build_model("llama", layers=1), examples(N), steps=5)


@pytest.fixture(scope="module")
def runs(taught, tmp_path_factory):
    """The same fit with whole gradients and with features."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        store: influence.fit(taught, examples(N), directory=folder / store, path=PATH, store=store)
        for store in ("full", "features")
    }


def no_rows(monkeypatch) -> None:
    """Let every pass over training rows fail; queries go through `features` alone."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a training row was run")

    monkeypatch.setattr("influence.at_point.stream_gradients", fail)


def damped_inverse(point) -> torch.Tensor:
    """`(C + lambda I)^-1` [P, P], column by column."""
    operator = point.operator()
    size = point.model.space.size
    dense = torch.cat([operator.matvec(part) for part in torch.eye(size).double().split(64)])
    return torch.linalg.inv((dense + dense.T) / 2)


def test_squares_are_exact_and_products_those_of_the_dense_inverse(runs):
    run = runs["features"]
    for point, whole in zip(run.points, runs["full"].points, strict=True):
        stored = point.features(point.operator())
        G = whole.gradients_of(np.arange(N))
        exact = G @ damped_inverse(point) @ G.T
        np.testing.assert_allclose(stored.squares, exact.diagonal().numpy(), rtol=1e-9)
        found = stored.products(stored.of_rows(np.arange(N)))
        # four bits of each of two rows: an error of about 1 % of their lengths' product
        lengths = np.sqrt(np.outer(stored.squares, stored.squares))
        assert np.abs((found - exact.numpy()) / lengths).max() < 0.04
        np.testing.assert_allclose(found.diagonal(), stored.squares, rtol=1e-5)


def alike(found: np.ndarray, exact: np.ndarray) -> None:
    """Nearly parallel and as long: four bits of a normal number hold 0.994 of its direction."""
    found, exact = found.ravel().astype(float), exact.ravel().astype(float)
    assert np.corrcoef(found, exact)[0, 1] > 0.99
    assert 0.96 < (found @ exact) / (exact @ exact) < 1.02


@pytest.mark.parametrize("credit", ["shared", "additive"])
def test_everything_is_answered_without_a_training_row(runs, monkeypatch, credit):
    whole, run = runs["full"], runs["features"]
    queries = examples(4, seed=9)
    exact = whole.score(queries, credit=credit, per_module=True)
    own = whole.self_influence(credit=credit).values
    ids = whole.train.ids[2:4]
    effect = whole.without(ids, queries)
    if credit == "additive":
        run.score(queries[:1], credit=credit)  # the size of additive scores is measured once
        whole.score(queries[:1], credit=credit)
    no_rows(monkeypatch)
    found = run.score(queries, credit=credit, per_module=True)
    alike(found.values, exact.values)
    alike(found.modules, exact.modules)
    np.testing.assert_allclose(found.modules.sum(1), found.values, atol=1e-5)
    assert found.attributes["store"].startswith("features of")
    assert "store" not in exact.attributes
    np.testing.assert_allclose(run.self_influence(credit=credit).values, own, rtol=0.03)
    predicted = run.without(ids, queries)
    for name in ("queries", "removed"):
        pairs = zip(getattr(predicted, name), getattr(effect, name), strict=True)
        for here, there in pairs:
            assert here.predicted == pytest.approx(there.predicted, rel=0.05)


def test_whole_sets_of_queries_and_contrasts_are_asked_too(runs):
    queries, others = examples(4, seed=9), examples(4, seed=9)
    for options in ({"aggregate": "mean"}, {"measurement": "margin"}):
        exact = runs["full"].score(queries, **options).values
        found = runs["features"].score(others, **options).values
        alike(found, exact)


def test_another_damping_passes_over_the_rows_and_is_exact(runs):
    queries = examples(2, seed=9)
    exact = runs["full"].score(queries, damping="mean:1", credit="additive")
    found = runs["features"].score(queries, damping="mean:1", credit="additive")
    np.testing.assert_allclose(found.values, exact.values, rtol=1e-5)
    assert "store" not in found.attributes


def stored_of(point) -> features.StoredFeatures:
    """The features of a point's rows."""
    stored = point.features(point.operator())
    assert stored is not None
    return stored


def squares_of(point) -> np.ndarray:
    """The stored squares of a point's rows."""
    return stored_of(point).squares


def test_a_new_damping_keeps_the_rows_anew(taught, tmp_path):
    options = {"directory": tmp_path, "path": (0.5,), "store": "features"}
    first = influence.fit(taught, examples(N), **options)
    before = squares_of(first.points[0])
    again = influence.fit(taught, examples(N), damping="mean:1", **options)
    after = squares_of(again.points[0])
    exact = influence.fit(
        taught, examples(N), directory=tmp_path / "x", path=(0.5,), damping="mean:1"
    )
    point = exact.points[0]
    G = point.gradients_of(np.arange(N))
    np.testing.assert_allclose(after, (G @ damped_inverse(point) @ G.T).diagonal(), rtol=1e-9)
    assert not np.allclose(before, after)


def test_a_killed_pass_goes_on(taught, tmp_path, monkeypatch):
    options = {"path": (0.5,), "store": "features", "token_budget": 20}
    whole = influence.fit(taught, examples(N), directory=tmp_path / "whole", **options)
    real = features.collate
    with monkeypatch.context() as patch:
        cut_short(patch, 3)
        with pytest.raises(Interruption):
            influence.fit(taught, examples(N), directory=tmp_path / "run", **options)
    path = tmp_path / "run" / "features.h5"
    done = np.array(open_rows(path, "done"))
    assert 0 < done.sum() < N
    monkeypatch.setattr(features, "collate", counted := Counted(real))
    run = influence.fit(taught, examples(N), directory=tmp_path / "run", **options)
    assert sorted(counted.rows) == np.flatnonzero(done == 0).tolist()  # none again, none left out
    for name in ("codes", "scales", "squares", "done"):
        assert np.array_equal(
            open_rows(path, name), open_rows(whole.points[0].file("features"), name)
        )
    assert run.features_stored


class Counted:
    """A `collate` that notes the rows it was given."""

    def __init__(self, real) -> None:
        self.real, self.rows, self.sizes = real, [], []

    def __call__(self, tokens, rows, **keywords):
        self.rows += rows.tolist()
        self.sizes.append(len(rows))
        return self.real(tokens, rows, **keywords)


def cut_short(monkeypatch, after: int):
    """Let the pass over rows to features end after so many batches."""
    real, left = features.collate, [after]

    def collate(*arguments, **keywords):
        left[0] -= 1
        if left[0] < 0:
            raise Interruption
        return real(*arguments, **keywords)

    monkeypatch.setattr(features, "collate", collate)


@pytest.mark.slow
@pytest.mark.parametrize("finished", [True, False])
def test_a_new_damping_that_was_killed_on_the_way_goes_on(taught, tmp_path, monkeypatch, finished):
    """Features of a point are of one damping, whenever the call before was killed."""
    options = {"directory": tmp_path / "run", "path": PATH, "store": "features", "token_budget": 20}
    data = examples(N)
    if finished:
        influence.fit(taught, data, **options)
    with monkeypatch.context() as patch:
        cut_short(patch, 3 if finished else 9)  # in the first point, or in the second
        with pytest.raises(Interruption):
            influence.fit(taught, data, damping="mean:1" if finished else "mean:0.1", **options)
    run = influence.fit(taught, data, damping="mean:1", **options)
    whole = influence.fit(
        taught, data, damping="mean:1", **{**options, "directory": tmp_path / "x"}
    )
    for point, other in zip(run.points, whole.points, strict=True):
        np.testing.assert_array_equal(squares_of(point), squares_of(other))
    assert run.score(examples(2, seed=9)).attributes["store"].startswith("features of")


def test_what_was_stored_otherwise_before_a_kill_is_removed(taught, tmp_path, monkeypatch):
    """A fit that kept whole gradients, killed, and gone on with less disk."""
    size = N * taught.space.size * 8 * 2
    options = {"directory": tmp_path, "path": PATH, "token_budget": 20}
    with monkeypatch.context() as patch:
        interrupt_after(patch, 9)
        with pytest.raises(Interruption):
            influence.fit(taught, examples(N), disk_budget=size, **options)
    assert (tmp_path / "gradients.h5").exists()
    run = influence.fit(taught, examples(N), disk_budget=size - 1, **options)
    assert run.features_stored
    assert not list(tmp_path.glob("gradients*"))


def test_a_batch_holds_no_more_than_is_said(taught, tmp_path, monkeypatch):
    run = influence.fit(taught, examples(N), directory=tmp_path, path=(0.5,), store="features")
    stored = stored_of(run.points[0])
    monkeypatch.setattr(features, "BATCH_BYTES", 2 * 8 * stored.kept.size)
    assert stored.map.most_rows == 2
    monkeypatch.setattr(features, "collate", counted := Counted(features.collate))
    stored.of_measurement(run.query_tokens(examples(5, seed=9)), MeanLoss())
    assert max(counted.sizes) == 2


def test_auto_takes_the_first_that_fits(taught, tmp_path):
    size = taught.space.size
    budgets = {"gradients": N * size * 8, "features": N * size * 7, "neither": N * 8}
    for name, budget in budgets.items():
        run = influence.fit(
            taught, examples(N), directory=tmp_path / name, path=(0.5,), disk_budget=budget
        )
        assert (run.gradients_stored, run.features_stored) == (
            name == "gradients",
            name == "features",
        )


def test_features_are_refused_where_there_is_no_root(taught, tmp_path):
    with pytest.raises(InputError, match=r"needs a curvature with a root .* and fisher has none"):
        influence.fit(
            taught,
            examples(N),
            directory=tmp_path / "run",
            curvature=influence.Fisher(),
            store="features",
        )
    assert not (tmp_path / "run").exists()


def test_no_gradient_of_all_leaves_is_ever_formed(taught, tmp_path, monkeypatch):
    """Rows are made into features leaf by leaf: `[b, P]` is for `store=full`."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a row's whole gradient was formed")

    run = influence.fit(
        taught, examples(N), directory=tmp_path, path=(0.5,), store="features", token_budget=20
    )
    (tmp_path / "features.h5").unlink()
    monkeypatch.setattr("influence.gradients.GradientSink.__init__", fail)
    point = run.points[0]
    with run.model.at(point.place.theta):
        features.write_features(point)
    assert open_rows(tmp_path / "features.h5", "done").all()


def test_a_row_is_told_done_only_once_it_is_on_the_disk(taught, tmp_path, monkeypatch):
    """Of what is written between two waits for the disk, any part may be lost with the power."""
    run = influence.fit(
        taught, examples(N), directory=tmp_path, path=(0.5,), store="features", token_budget=20
    )
    (tmp_path / "features.h5").unlink()
    monkeypatch.setattr(features, "VOUCH_SECONDS", 0.0)
    written: dict[str, set[int]] = {}
    safe: set[int] = set()
    vouched = []
    write, flush, init = RowFile.write, RowFile.flush, RowFile.__init__

    def named(file, path, name, **options):
        init(file, path, name, **options)
        file.name = name

    def noted(file, rows, values):
        if file.name == "done":
            assert set(rows.tolist()) <= safe
            vouched.extend(rows.tolist())
        else:
            written.setdefault(file.name, set()).update(rows.tolist())
        write(file, rows, values)

    def waited(file):
        flush(file)
        if len(written) == 3:  # one file: a wait for any of its datasets is one for all
            safe.update(set.intersection(*written.values()))

    for name, replaced in (("write", noted), ("flush", waited), ("__init__", named)):
        monkeypatch.setattr(RowFile, name, replaced)
    point = run.points[0]
    with run.model.at(point.place.theta):
        features.write_features(point)
    assert sorted(vouched) == list(range(N))
    assert open_rows(tmp_path / "features.h5", "done").all()
