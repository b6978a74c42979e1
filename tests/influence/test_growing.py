"""Which rows stay, come and go, and what is refused before anything is written."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

import influence
from influence import EKFAC, Run
from influence.errors import InputError, MismatchError
from influence.manifest import change_manifest
from influence.rows import Examples
from tests.conftest import build_model, examples, rows, teach
from tests.helpers import contents, save, untouched

SITES = {"layers": 1, "target_modules": ["q_proj"]}
ALL = list(examples(10))
OPTIONS = {"path": (1.0,), "curvature": influence.Identity()}


@pytest.fixture(scope="module")
def model():
    return build_model("llama", **SITES)


@pytest.fixture(scope="module")
def before(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("before") / "run"
    return influence.fit(model, Examples(ALL[:8]), directory=directory, **OPTIONS)


def grow(model, before, data, directory, **options):
    options = OPTIONS | {"grown_from": before} | options
    return influence.fit(model, Examples(data), directory=directory, **options)


def test_rows_are_matched_by_id_and_content(model, before, tmp_path):
    """A row under another id has other sampled labels, so that it is another row."""
    changed, renamed = replace(ALL[2], completion=" red"), replace(ALL[3], id="other")
    regrouped = replace(ALL[4], group="people")
    data = [ALL[9], changed, renamed, regrouped, *ALL[5:8], ALL[0]]
    record = grow(model, before, data, tmp_path / "run").manifest.grown
    assert (record.kept, record.added, record.removed, record.changed) == (5, 3, 3, 1)
    assert record.run.digest == before.digest
    assert record.run.path == str(before.directory.resolve())
    assert record.curvature_rows == 8
    assert record.otherwise == ()


def test_a_grown_run_is_opened_and_found_again_like_any_other(model, before, tmp_path, monkeypatch):
    made = grow(model, before, ALL, tmp_path / "run")
    assert made.manifest.data.rows == 10
    assert made.manifest.complete
    again = Run.open(tmp_path / "run", model=model, train=Examples(ALL))
    queries = examples(2, seed=9)
    assert (again.score(queries).values == made.score(queries).values).all()
    monkeypatch.setattr("influence.fitting.fit_points", None)
    assert grow(model, before, ALL, tmp_path / "run").manifest == made.manifest
    with pytest.raises(MismatchError, match=r"grown_from is .* there and null here"):
        influence.fit(model, Examples(ALL), directory=tmp_path / "run", **OPTIONS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reduction": "example"}, "reduction is token there and example here"),
        ({"path": (0.5,)}, "points is 1 there and 0.5 here"),
        ({"curvature": EKFAC()}, 'curvature is {"name": "identity"} there'),
        ({"seed": 3}, "seed is 0 there and 3 here"),
        ({"max_length": 64}, "max_length is null there and 64 here"),
        ({"store": "none"}, "store is auto there and none here"),
    ],
)
def test_other_options_are_named(model, before, tmp_path, options, words):
    with pytest.raises(MismatchError) as caught:
        grow(model, before, ALL, tmp_path / "run", **options)
    assert words in str(caught.value)
    assert "or fit from scratch, without --from" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_another_adapter_is_refused_because_all_gradients_are_others(before, tmp_path):
    other = teach(build_model("llama", **SITES), examples(4), steps=1)
    with pytest.raises(MismatchError, match=r"adapter is .*every row's gradient is another one"):
        grow(other, before, ALL, tmp_path / "run")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (ALL[:8], "no row came to .*, went or changed"),
        (ALL[:2], "2 rows are|all 2 rows"),
        (list(examples(8, seed=5)), "which is .* tokens to run where all 8 rows"),
    ],
)
def test_growing_that_is_not_worth_it_is_refused(model, before, tmp_path, data, words):
    with untouched(before.directory), pytest.raises(InputError, match=words):
        grow(model, before, data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_curvature_of_too_few_of_the_rows_is_refused(model, tmp_path):
    options = {"curvature": EKFAC(), "store": "features", "path": (1.0,)}
    influence.fit(model, Examples(ALL[:5]), directory=tmp_path / "old", **options)
    more = grow(model, tmp_path / "old", ALL[:8], tmp_path / "run", **options)
    assert more.manifest.grown.curvature_rows == 5
    rest = [*ALL, *examples(2, seed=6)]
    with pytest.raises(InputError, match="of 12 rows 5 are among those that the curvature"):
        grow(model, tmp_path / "run", rest, tmp_path / "third", **options)
    with pytest.raises(MismatchError, match="damping, by which its features are whitened, is"):
        grow(model, tmp_path / "old", ALL[:8], tmp_path / "x", **options, damping="mean:1")


def test_weights_that_change_too_unevenly_are_refused(model, tmp_path):
    options = {"curvature": influence.KFAC(), "reduction": "batch:2"}
    influence.fit(model, Examples(ALL[:6]), directory=tmp_path / "old", path=(1.0,), **options)
    with pytest.raises(InputError, match=r"change unevenly, by up to \d+% .*batch:2"):
        grow(model, tmp_path / "old", ALL, tmp_path / "run", **options)


def test_the_run_itself_is_not_written_to(model, before):
    with untouched(before.directory), pytest.raises(InputError, match="give another --run"):
        grow(model, before, ALL, before.directory, overwrite=True)


def test_a_run_of_sums_that_no_version_kept_is_refused(model, tmp_path):
    import h5py

    options = {"curvature": influence.KFAC(), "path": (1.0,)}
    run = influence.fit(model, Examples(ALL[:8]), directory=tmp_path / "old", **options)
    with h5py.File(run.points[0].file("factors"), "r+") as file:
        del file["moments"]
    with pytest.raises(InputError, match="did not keep the eigenvalues of the moments"):
        grow(model, tmp_path / "old", ALL, tmp_path / "run", **options)


@pytest.mark.slow
def test_adams_estimated_metric_stays_and_is_said(model, tmp_path):
    options = {"geometry": "adam", "path": (1.0,)}
    old = influence.fit(model, Examples(ALL[:8]), directory=tmp_path / "old", **options)
    run = grow(model, old, ALL, tmp_path / "run", **options, curvature=None)
    assert (run.points[0].geometry.scale == old.points[0].geometry.scale).all()
    assert "Adam's second moments are those estimated" in run.manifest.grown.otherwise[-1]
    again = grow(model, run, ALL[:9], tmp_path / "again", **options, curvature=None)
    assert again.manifest.grown.otherwise == run.manifest.grown.otherwise


# ---- as commands ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A base, an adapter, and rows on disk."""
    base, adapter = save(tmp_path, **SITES)
    lines = [json.dumps(row) + "\n" for row in rows(10)]
    (tmp_path / "train.jsonl").write_text("".join(lines[:8]))
    return tmp_path, ["--model", base, "--adapter", adapter, "--path", "1.0"]


def test_rows_may_be_appended_to_the_very_file(folder, command):
    place, options = folder
    fit = ["fit", *options, "--train", place / "train.jsonl"]
    assert command(*fit, "--run", place / "old").status == 0
    lines = [json.dumps(row) + "\n" for row in rows(10)]
    (place / "train.jsonl").write_text("".join(lines))
    result = command(*fit, "--run", place / "new", "--from", place / "old", "--json")
    assert result.status == 0, result.err
    assert "8 rows of" in result.err
    assert "stay and are not run, 2 come" in result.err
    grown = json.loads(result.out)["manifest"]["grown"]
    assert (grown["kept"], grown["added"], grown["removed"]) == (8, 2, 0)
    assert "manifest.json" in contents(place / "new")


@pytest.mark.slow
def test_a_file_that_lost_rows_is_asked_for_again(folder, command):
    place, options = folder
    fit = ["fit", *options, "--train", place / "train.jsonl"]
    command(*fit, "--run", place / "old")
    shutil.copy(place / "train.jsonl", place / "kept.jsonl")
    lines = [json.dumps(row) + "\n" for row in rows(10)]
    (place / "train.jsonl").write_text("".join(lines[1:8]))
    grown = [*fit, "--run", place / "new", "--from", place / "old"]
    result = command(*grown)
    assert result.status == 2
    assert "has other rows than" in result.err
    assert "put the file back as it was" in result.err
    (place / "train.jsonl").unlink()
    shutil.copy(place / "kept.jsonl", place / "fewer.jsonl")
    (place / "fewer.jsonl").write_text("".join(lines[1:8]))
    grown[grown.index(place / "train.jsonl")] = place / "fewer.jsonl"
    result = command(*grown)
    assert result.status == 2
    assert "any more, by which it is known" in result.err
    shutil.copy(place / "kept.jsonl", place / "train.jsonl")
    assert command(*grown).status == 0


def test_a_run_from_no_file_says_how_to_grow_it(model, tmp_path):
    """Where its rows cannot be kept as JSON lines either."""
    run = influence.fit(model, Examples(ALL[:8]), directory=tmp_path / "old", **OPTIONS)
    change_manifest(run.directory, data=replace(run.manifest.data, path=None))
    with pytest.raises(InputError, match="give the run itself as grown_from="):
        grow(model, tmp_path / "old", ALL[1:], tmp_path / "run")
    assert grow(model, run, ALL[1:], tmp_path / "run").manifest.grown.removed == 1
