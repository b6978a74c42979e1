"""The directory of a run: taken up again, refused, replaced or left alone."""

from __future__ import annotations

import numpy as np
import pytest

import influence.fitted_point as fitting
from influence import KFAC, Run
from influence.errors import InputError, MismatchError
from tests.conftest import examples
from tests.helpers import contents, untouched
from tests.influence.toy_runs import N_ROWS, fit, same_files, small_model, times


def test_a_finished_identical_fit_returns_at_once_and_touches_nothing(tmp_path, monkeypatch):
    expected = fit(tmp_path).score(examples(2, seed=9), out=tmp_path / "scores.h5").values
    before = contents(tmp_path), times(tmp_path)
    monkeypatch.setattr(fitting, "collate", None)  # any pass over rows would fail
    run = fit(tmp_path)
    assert run.gradients_stored
    scores = run.score(
        examples(2, seed=9), out=tmp_path / "scores.h5"
    )  # the very same scores are returned, too
    assert np.array_equal(scores.values, expected)
    assert (contents(tmp_path), times(tmp_path)) == before


def test_a_finished_fit_does_not_depend_on_batch_size_or_damping(tmp_path):
    fit(tmp_path)
    with untouched(tmp_path):
        fit(tmp_path, token_budget=7)
    factors = (tmp_path / "factors.h5").stat()
    assert fit(tmp_path, damping="abs:1").operator().lam.tolist() == [1.0] * 4
    assert (tmp_path / "factors.h5").stat() == factors  # no work was done again
    again = Run.open(tmp_path, model=small_model(), train=examples(N_ROWS))
    assert again.operator().lam.tolist() == [1.0] * 4  # and later scores use it


@pytest.mark.parametrize(
    ("named", "options"),
    [
        ("seed is 0 there and 1 here", {"seed": 1}),
        ("reduction is token there and example here", {"reduction": "example"}),
        ("max_length is null there and 50 here", {"max_length": 50}),
        ("curvature is .*ekfac.* there and .*kfac.* here", {"curvature": KFAC()}),
        ("store is full there and none here", {"store": "none"}),
        ("supervise is last there and all here", {"supervise": "all"}),
        ("data is [0-9a-f]{12} there and [0-9a-f]{12} here", {"train": examples(N_ROWS, seed=1)}),
        ("data is", {"train": examples(N_ROWS + 1)}),
    ],
)
def test_a_fit_into_another_run_names_the_difference_and_overwrites_nothing(
    tmp_path, named, options
):
    fit(tmp_path).score(examples(2, seed=9), out=tmp_path / "scores.h5")
    message = (
        f"holds a run made from something else: {named}.*Give another --run directory, or "
        "--overwrite"
    )
    with untouched(tmp_path), pytest.raises(MismatchError, match=message):
        fit(tmp_path, **options)


def test_overwrite_replaces_the_run_and_its_scores(tmp_path):
    fit(tmp_path).score(examples(2, seed=9), out=tmp_path / "scores.h5")
    run = fit(tmp_path, "fisher", seed=1, overwrite=True)
    fit(tmp_path / "new", "fisher", seed=1)
    same_files(tmp_path, tmp_path / "new", "factors.h5", "gradients.h5", "rows.h5")
    assert run.fitted_name == "fisher"
    assert not (tmp_path / "scores.h5").exists()


def test_a_directory_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with (
        untouched(tmp_path),
        pytest.raises(InputError, match=r"is not empty and holds no run .*give a new directory"),
    ):
        fit(tmp_path)
    with (
        untouched(tmp_path),
        pytest.raises(InputError, match="is a file; give a directory for the run"),
    ):
        fit(tmp_path / "thesis.txt")
    fit(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "scores.h5").write_text("of somebody else")
    with untouched(tmp_path), pytest.raises(InputError, match=r"but scores\.h5"):
        fit(tmp_path / "other", overwrite=True)
