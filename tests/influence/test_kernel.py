"""Similarities of the training rows: whole, and by landmarks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import influence
from influence.curvature.base import Damped, dense
from influence.errors import NumericalError
from influence.kernel import LandmarkKernel, WholeKernel, row_kernel
from tests.conftest import build_model, examples, fit_end
from tests.oracles import close, plain_gradients

N = 12


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


def test_landmarks_are_exact_where_the_rows_span_no_more_directions():
    """Twenty rows of rank 4 plus a part that is each row's own, by 6 landmarks."""
    rng = np.random.default_rng(1)
    root = rng.normal(size=(20, 4))
    own = rng.random(20)
    whole = root @ root.T + np.diag(own)
    kernel, weights = LandmarkKernel(root, np.diagonal(whole).copy()), rng.random(20)
    assert kernel.slope(weights) == pytest.approx(np.sqrt(weights) @ whole @ np.sqrt(weights))
    expected = np.linalg.inv(np.eye(20) + 0.7 * whole)
    found = kernel.inverse(0.7)
    close(found.diagonal, np.diagonal(expected))
    some = np.array([3, 11])
    close(found.block(some), expected[np.ix_(some, some)])
    close(found.apply(root.T), root.T @ expected)


def test_many_landmarks_are_the_whole_and_few_keep_every_rows_own_part(run):
    point = run.points[0]
    operator = point.operator()
    whole = row_kernel(point, operator).values.copy()
    close(
        row_kernel(point, operator, exact_rows=5, landmarks=N).root
        @ row_kernel(point, operator, exact_rows=5, landmarks=N).root.T,
        whole,
        1e-6,
    )
    few = row_kernel(point, operator, exact_rows=5, landmarks=4)
    close(few.diagonal, np.diagonal(whole), 1e-8)
    assert few.root.shape == (N, 4)
    assert (few.rest >= 0).all()


def test_copies_among_the_landmarks_are_no_failure(model, tmp_path):
    """Rows that are copies of each other make the landmarks' own matrix singular."""
    data = influence.examples_from_rows(
        [{"prompt": "red fox", "completion": " runs over"}] * 6
        + [{"prompt": "old dog", "completion": " sleep"}] * 6
    )
    point = fit_end(model, data, directory=tmp_path / "run").points[0]
    operator = point.operator()
    whole = row_kernel(point, operator).values.copy()
    few = row_kernel(point, operator, exact_rows=5, landmarks=6)
    close(few.root @ few.root.T, whole, 1e-4)


def test_a_kernel_of_plain_products_has_no_operator_to_invert(run):
    """M = I: K is the matrix of products."""
    point = run.points[0]
    plain = point.operator("identity")
    assert isinstance(plain, Damped)
    rows = plain_gradients(run.model, run.train) * torch.from_numpy(run.weights).sqrt()[:, None]
    close(row_kernel(point, plain).values, (rows @ rows.T).numpy())
