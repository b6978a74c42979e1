"""Similarities of the training rows: whole, and by landmarks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import influence
from influence import kernel as kernel_module
from influence.curvature.base import Damped, dense
from influence.errors import NumericalError
from influence.kernel import LandmarkKernel, WholeKernel, row_kernel
from influence.matrix_file import MatrixFile
from influence.store import write_file
from tests.conftest import build_model, examples, fit_end
from tests.influence.kernels import FORMS, N, kernel_of, like, whole_of
from tests.oracles import close, plain_gradients


@pytest.fixture(scope="module")
def model():
    return build_model(layers=1, target_modules=["q_proj", "v_proj"])


@pytest.fixture
def run(model, tmp_path):
    return fit_end(model, examples(N), directory=tmp_path / "run")


def by_hand(run, operator):
    """`F M F^T` from a dense inverse and plain gradients."""
    point = run.points[0]
    matrix = dense(operator.curvature) + torch.diag(operator.diagonal(torch.empty(0).double()))
    rows = plain_gradients(run.model, run.train) * torch.from_numpy(run.weights).sqrt()[:, None]
    features = point.geometry.features(rows)
    return (features @ torch.linalg.solve(matrix, features.T)).numpy()


@pytest.mark.parametrize("curvature", [influence.EKFAC(), influence.Fisher()])
@pytest.mark.parametrize("parts", [1, 5])
def test_the_whole_kernel_is_the_dense_one(model, tmp_path, curvature, parts, monkeypatch):
    monkeypatch.setattr("influence.kernel.queries_at_once", lambda *_: -(-N // parts))
    run = fit_end(model, examples(N), directory=tmp_path / "run", curvature=curvature)
    point = run.points[0]
    point.file("kernel").unlink(missing_ok=True)
    close(row_kernel(point, point.operator()).values, by_hand(run, point.operator()), 1e-8)


def test_the_fits_own_is_kept_and_another_damping_is_not_taken_for_it(run):
    point, other = run.points[0], run.points[0].operator(damping="mean:3")
    own = row_kernel(point, point.operator()).values
    assert point.file("kernel").exists()
    close(row_kernel(point, other).values, by_hand(run, other), 1e-8)
    again = influence.Run.open(run.directory, model=run.model, train=run.train).points[0]
    again.gradients_of = None
    np.testing.assert_array_equal(row_kernel(again, again.operator()).values, own)


def test_the_inverse_is_the_dense_one_and_takes_the_kernels_place():
    rng = np.random.default_rng(0)
    for n in (1, 7, 1_500):  # the last is mirrored in two parts
        root = rng.normal(size=(n, 5))
        values = root @ root.T
        expected = np.linalg.inv(np.eye(n) + 0.3 * values)
        found = WholeKernel(values).inverse(0.3)
        assert found.values is values
        close(found.values, expected)
        rows = np.array([0, n - 1])
        close(found.block(rows), expected[np.ix_(rows, rows)])
        close(found.apply(root.T), root.T @ expected)
        close(found.diagonal, np.diagonal(expected))


def test_a_kernel_that_is_not_positive_is_refused():
    with pytest.raises(NumericalError, match="not positive"):
        WholeKernel(np.array([[1.0, 5.0], [5.0, 1.0]])).inverse(1.0)
    with pytest.raises(NumericalError, match="not finite"):
        WholeKernel(np.full((2, 2), np.nan)).inverse(1.0)


def in_file(path, **arrays):
    """Matrices in a file, by name."""
    write_file(path, arrays)
    return [MatrixFile(path, name) for name in arrays]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("store", ["full", "features", "none"])
def test_a_kernel_in_files_is_the_one_in_memory_and_so_is_its_inverse(
    model, tmp_path, monkeypatch, form, store
):
    """All rows' similarities, or those of landmarks with every row's own, against their formulas."""
    monkeypatch.setattr("influence.matrix_file.TILE", 5)
    monkeypatch.setattr("influence.matrix_file.BAND", 3)
    monkeypatch.setattr("influence.matrix_file.PANEL_BYTES", 200)
    monkeypatch.setattr(kernel_module, "ROWS_AT_ONCE", 4)
    point = fit_end(model, examples(N), directory=tmp_path / "run", store=store).points[0]
    operator = point.operator()
    K = row_kernel(point, operator).values.copy()
    expected = K
    if form == "landmarks":
        some = np.unique(np.linspace(0, N - 1, 5).round().astype(int))
        projected = K[:, some] @ np.linalg.pinv(K[np.ix_(some, some)]) @ K[some]
        own = np.diagonal(K) if store != "features" else point.features(operator).squares
        own = own if store != "features" else own * point.run.weights
        expected = projected + np.diag(np.maximum(own - np.diagonal(projected), 0))
    found = kernel_of(monkeypatch, form, point, operator)
    close(whole_of(found), expected, 1e-6)
    weights = np.random.default_rng(2).random(N)
    roots = np.sqrt(weights)
    assert found.slope(weights) == pytest.approx(roots @ expected @ roots, rel=1e-6)
    for strength in (0.7, 20.0):
        inverse = np.linalg.inv(np.eye(N) + strength * whole_of(found))
        like(found.inverse(strength), inverse)


def test_rows_are_all_told_where_that_costs_less_than_a_pass(run, monkeypatch):
    """Beyond the rows that always are, and up to the most that ever are."""
    monkeypatch.setattr(kernel_module, "WHOLE_ROWS", 10)
    monkeypatch.setattr(kernel_module, "EXACT_ROWS", 100)
    monkeypatch.setattr(kernel_module, "MOST_ROWS", 300)
    weights = sum(parameter.numel() for parameter in run.model.model.parameters())
    enough = -(-(200**3) // (4 * weights))  # tokens of which a pass costs as much as the inverse
    size = run.model.dtype.itemsize
    files = 2 * (2 * size * 200 * 200 + 8 * 200)  # at two points

    def landmarks(rows=200, tokens=enough, disk_budget=files):
        return kernel_module.landmarks_for(
            run.model, rows=rows, tokens=tokens, points=2, disk_budget=disk_budget
        )

    assert landmarks() == 0
    assert landmarks(tokens=enough - 1) == kernel_module.LANDMARKS
    assert landmarks(disk_budget=files - 1) == kernel_module.LANDMARKS
    assert landmarks(rows=100, tokens=1, disk_budget=0) == 0
    assert landmarks(rows=300, tokens=10**9, disk_budget=10**9) == 0
    assert landmarks(rows=301, tokens=10**9, disk_budget=10**9) == kernel_module.LANDMARKS


def test_landmarks_are_exact_where_the_rows_span_no_more_directions(run, tmp_path):
    """Twenty rows of rank 4 plus a part that is each row's own."""
    rng = np.random.default_rng(1)
    root, own, weights = rng.normal(size=(20, 4)), rng.random(20), rng.random(20)
    whole = root @ root.T + np.diag(own)
    (file,) = in_file(tmp_path / "root.h5", root=root)
    point = run.points[0]
    files = kernel_module.Files(point, point.operator(damping="mean:3"))
    kernel = LandmarkKernel(file, own, files)
    assert kernel.slope(weights) == pytest.approx(np.sqrt(weights) @ whole @ np.sqrt(weights))
    like(kernel.inverse(0.7), np.linalg.inv(np.eye(20) + 0.7 * whole))


def test_copies_among_the_landmarks_are_no_failure(model, tmp_path, monkeypatch):
    """Rows that are copies of each other make the landmarks' own matrix singular."""
    data = influence.examples_from_rows(
        [{"prompt": "red fox", "completion": " runs over"}] * 6
        + [{"prompt": "old dog", "completion": " sleep"}] * 6
    )
    point = fit_end(model, data, directory=tmp_path / "run").points[0]
    operator = point.operator()
    whole = row_kernel(point, operator).values.copy()
    monkeypatch.setitem(FORMS["landmarks"], "LANDMARKS", 6)
    few = kernel_of(monkeypatch, "landmarks", point, operator)
    close(whole_of(few), whole, 1e-4)


def test_a_kernel_of_plain_products_has_no_operator_to_invert(run):
    """M = I: K is the matrix of products."""
    point = run.points[0]
    plain = point.operator("identity")
    assert isinstance(plain, Damped)
    rows = plain_gradients(run.model, run.train) * torch.from_numpy(run.weights).sqrt()[:, None]
    close(row_kernel(point, plain).values, (rows @ rows.T).numpy())
