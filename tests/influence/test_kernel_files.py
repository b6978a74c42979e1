"""Files of similarities and their inverses: kept of the fit's own setting, and deleted of others."""

from __future__ import annotations

import numpy as np
import pytest

from influence import kernel as kernel_module
from influence.errors import NumericalError
from influence.kernel import row_kernel
from influence.store import open_file
from tests.conftest import build_model, examples, fit_end
from tests.influence.kernels import FORMS, N, kernel_of, like, whole_of
from tests.oracles import close


@pytest.fixture(scope="module")
def model():
    return build_model(layers=1, target_modules=["q_proj", "v_proj"])


@pytest.fixture
def run(model, tmp_path):
    return fit_end(model, examples(N), directory=tmp_path / "run")


@pytest.mark.parametrize("form", FORMS)
def test_a_second_look_finds_the_fits_own_in_the_run(run, monkeypatch, form):
    """And of another damping, or another strength, nothing is left or mistaken."""
    point = run.points[0]
    operator, other = point.operator(), point.operator(damping="mean:3")
    first = kernel_of(monkeypatch, form, point, operator)
    diagonal = first.inverse(0.5).diagonal
    names = {"kernel.h5", "inverse.h5"}
    assert names <= {path.name for path in run.directory.iterdir()}
    before = sorted(path.name for path in run.directory.iterdir())
    another = kernel_of(monkeypatch, form, point, other)
    assert len(list(run.directory.glob("kernel-making-*"))) == 1
    assert not np.allclose(whole_of(another), whole_of(first))
    another.inverse(0.5)
    del another
    assert sorted(path.name for path in run.directory.iterdir()) == before
    monkeypatch.setattr(kernel_module, "_fill", None)
    again = kernel_of(monkeypatch, form, point, operator)
    np.testing.assert_array_equal(whole_of(again), whole_of(first))
    assert not np.allclose(again.inverse(2.0).diagonal, diagonal)
    assert sorted(path.name for path in run.directory.iterdir()) == before
    monkeypatch.setattr(kernel_module, "invert_in_tiles", None)
    np.testing.assert_array_equal(again.inverse(0.5).diagonal, diagonal)


def test_a_matrix_that_a_run_before_kept_whole_is_made_again(run, monkeypatch):
    """Both triangles were in the file."""
    point = run.points[0]
    K = row_kernel(point, point.operator()).values.copy()
    found = kernel_of(monkeypatch, "tiles", point, point.operator())
    close(whole_of(found), K, 1e-8)
    with open_file(point.file("kernel")) as file:
        assert "kernel" not in file
    like(found.inverse(0.4), np.linalg.inv(np.eye(N) + 0.4 * K))


@pytest.mark.parametrize("form", FORMS)
def test_a_failure_on_the_way_leaves_no_file(run, monkeypatch, form):
    point = run.points[0]
    before = sorted(path.name for path in run.directory.iterdir())

    def fail(*_, **__):
        raise NumericalError("on the way")

    monkeypatch.setattr(kernel_module, "inverse_products", fail)
    monkeypatch.setattr(point, "gradient_blocks", fail)
    with pytest.raises(NumericalError, match="on the way"):
        kernel_of(monkeypatch, form, point, point.operator(damping="mean:3"))
    assert sorted(path.name for path in run.directory.iterdir()) == before


def test_a_run_that_is_only_read_has_its_files_elsewhere(run, monkeypatch, tmp_path):
    point, elsewhere = run.points[0], tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    monkeypatch.setattr("influence.matrix_file.os.access", lambda place, _: place != run.directory)
    point.file("kernel").unlink()
    found = kernel_of(monkeypatch, "tiles", point, point.operator())
    assert not point.file("kernel").exists()
    assert len(list(elsewhere.iterdir())) == 1
    del found
    assert list(elsewhere.iterdir()) == []
