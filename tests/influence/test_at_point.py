"""A run at one of its points: geometries, files, curvatures that its factors hold."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest

import influence
from influence import at_point
from influence.at_point import AtPoint
from influence.errors import MismatchError, StoreError
from influence.memory import bounded
from tests.conftest import build_model, examples, fit_end
from tests.helpers import untouched
from tests.influence.toy_runs import fit, solver_of
from tests.oracles import close

N, PATH = 9, (0.4, 0.8)


SITES = {"layers": 1, "target_modules": ["attn.c_attn"]}


@pytest.fixture(scope="module")
def model():
    return build_model("gpt2", **SITES)


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    return influence.fit(
        model, examples(N), path=PATH, directory=tmp_path_factory.mktemp("path") / "run"
    )


def test_a_bound_on_memory_holds_for_one_leaf_of_all_rows(run):
    point = run.points[0]
    largest = max(leaf.stop - leaf.start for leaf in run.model.space.leaves)
    rows = at_point.LEAF_BYTES // (largest * run.model.dtype.itemsize)
    assert point.by_leaf(rows)
    with bounded(memory=1.0):  # a sixteenth of it
        assert not point.by_leaf(rows)
        assert point.by_leaf(rows // 18)


@pytest.mark.parametrize("at_once", [1, 1 << 20])
@pytest.mark.parametrize("geometry", ["raw", "adam"])
def test_leaves_of_stored_rows_are_their_features(tmp_path, monkeypatch, geometry, at_once):
    """Leaf by leaf, or several read together; of the last leaves alone too."""
    monkeypatch.setattr("influence.at_point.BLOCK_BYTES", at_once)
    model = build_model(layers=1, target_modules=["q_proj", "v_proj"])
    run = fit_end(model, examples(5), directory=tmp_path / "run", geometry=geometry)
    point, leaves = run.points[0], model.space.leaves
    whole = point.gradients_of(np.arange(5))
    found = dict(point.leaf_blocks(range(len(leaves))))
    assert list(found) == list(range(len(leaves)))
    last = dict(point.leaf_blocks(range(2, len(leaves))))
    assert list(last) == list(range(2, len(leaves)))
    for number, leaf in enumerate(leaves):
        close(found[number], whole[:, leaf.slice].unflatten(1, leaf.shape), 1e-12)
        if number in last:
            close(last[number], found[number], 1e-12)
    assert point.by_leaf(5)
    monkeypatch.setattr("influence.at_point.LEAF_BYTES", 100)
    assert not point.by_leaf(5)


@pytest.mark.parametrize("geometry", ["function", "adam"])
def test_geometries_do_not_depend_on_the_store_or_the_order(model, tmp_path, double, geometry):
    data, queries = examples(6), examples(3, seed=1)
    results = []
    for number, (path, store) in enumerate(
        ((PATH, "always"), (PATH, "never"), (PATH[::-1], "never"))
    ):
        fitted = influence.fit(
            model,
            data,
            path=path,
            store=store,
            geometry=geometry,
            reduction="example",
            token_budget=20,
            directory=tmp_path / str(number),
        )
        results.append((fitted.score(queries).values, fitted.self_influence().values))
    for scores, self_influence in results[1:]:
        close(scores, results[0][0], 1e-8)
        close(self_influence, results[0][1], 1e-8)


@pytest.mark.parametrize("geometry", ["function", "adam"])
def test_the_geometry_of_the_end_is_that_of_the_end(model, tmp_path, double, geometry):
    """`identity` at the end of a run that has no factors there: the geometry there, not that of its
    first point.
    """
    data, queries = examples(6), examples(3, seed=1)
    expected = fit_end(model, data, geometry=geometry, directory=tmp_path / "end")
    for number, path in enumerate((PATH, PATH[::-1])):
        fitted = influence.fit(
            model, data, path=path, geometry=geometry, directory=tmp_path / str(number)
        )
        scores = fitted.score(queries, curvature="identity").values
        close(scores, expected.score(queries, curvature="identity").values, 1e-8)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Puts a copy of a finished fit into a directory; each is made once."""
    made = {}

    def copied(directory, kind, **options):
        key = (kind, *options.items())
        if key not in made:
            made[key] = tmp_path_factory.mktemp("finished") / "run"
            fit(made[key], kind, **options)
        shutil.copytree(made[key], directory, dirs_exist_ok=True)

    return copied


@pytest.mark.parametrize("kind", ["ekfac", "kfac", "fisher", "ggn"])
@pytest.mark.parametrize("name", ["factors.h5", "gradients.h5", "rows.h5"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.98])
def test_a_truncated_file_is_named_and_nothing_is_overwritten(
    tmp_path, finished, kind, name, share
):
    finished(tmp_path, kind)
    path = tmp_path / name
    if not path.exists():
        pytest.skip(f"{kind} runs keep no {name}")
    size = path.stat().st_size
    os.truncate(path, int(share * size))
    run = fit(tmp_path, kind)  # finished: opened as it is
    with (
        untouched(tmp_path),
        pytest.raises(StoreError, match=f"{name} is damaged, truncated, or not an HDF5 file"),
    ):
        run.score(examples(2, seed=9), out=tmp_path / "scores.h5", solver=solver_of(kind))


@pytest.mark.parametrize("kind", ["ekfac", "fisher", "ggn"])
@pytest.mark.parametrize("name", ["factors.h5", "gradients.h5", "rows.h5"])
def test_a_file_of_another_run_is_refused_and_nothing_is_overwritten(
    tmp_path, finished, kind, name
):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    finished(ours, kind)
    finished(theirs, kind, seed=1)
    if not (ours / name).exists():
        pytest.skip(f"{kind} runs keep no {name}")
    shutil.copy(theirs / name, ours / name)
    message = (
        rf"{name} belongs to another run \(digest [0-9a-f]{{12}}, this run has [0-9a-f]{{12}}\)"
    )
    with untouched(ours), pytest.raises(MismatchError, match=message):
        fit(ours, kind).score(examples(2, seed=9), out=ours / "scores.h5", solver=solver_of(kind))


def test_a_run_without_a_file_it_needs_says_which(tmp_path):
    run = fit(tmp_path)
    (tmp_path / "gradients.h5").unlink()
    with pytest.raises(StoreError, match=r"gradients.h5 does not exist"):
        run.score(examples(2, seed=9))
    (tmp_path / "factors.h5").unlink()
    with pytest.raises(StoreError, match=r"factors.h5 does not exist"):
        fit(tmp_path).score(examples(2, seed=9))


def test_factors_that_stay_in_their_file_give_the_same_scores(model, run, monkeypatch):
    queries = examples(3, seed=1)
    expected = run.score(queries).values
    monkeypatch.setattr("influence.store.MAPPED_BYTES", 1)
    opened = influence.Run.open(run.directory, model=model, train=run.train)
    wide = opened.curvature().leaf_blocks[0].wide
    assert (opened.score(queries).values == expected).all()
    assert (wide == run.curvature().leaf_blocks[0].wide).all()
    if os.path.exists("/proc/self/maps"):  # where this process's memory comes from
        with open("/proc/self/maps") as maps:
            assert str(run.points[-1].file("factors").resolve()) in maps.read()


def test_scales_of_several_dampings_are_each_its_own_and_read_the_rows_once(run, monkeypatch):
    grid = [(name, rule) for name in ("ekfac", "kfac", "ggn") for rule in ("mean:1", "abs:0.01")]
    grid.append(("identity", None))
    point, reads = AtPoint(run, 0, run.points[0].place), []
    gradients_of = AtPoint.gradients_of

    def counted(at, rows):
        reads.extend(rows.tolist())
        return gradients_of(at, rows)

    monkeypatch.setattr(AtPoint, "gradients_of", counted)
    found = point.scales([point.operator(*key) for key in grid])
    assert sorted(reads) == list(range(N))
    for key, scale in zip(grid, found, strict=True):
        alone = AtPoint(run, 0, run.points[0].place)
        assert alone.scale(alone.operator(*key)) == pytest.approx(scale, rel=1e-10)
    rows = gradients_of(point, np.arange(N)).double()  # by the definition, of plain products
    own = rows.square().sum(1).numpy() * run.weights / run.tokens.counts
    assert found[-1] == pytest.approx(own.mean(), rel=1e-5)
    reads.clear()
    assert point.scales([point.operator("kfac", "mean:1")]) == [found[2]]
    assert reads == []  # they are kept
