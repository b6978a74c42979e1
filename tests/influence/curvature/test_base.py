"""The damped operator and the whole matrix of a curvature that is never formed."""

from __future__ import annotations

import numpy as np
import torch

from influence.curvature import Damped, as_linear_operator, dense
from influence.curvature.base import Diagonal, Invertible, Subsampled, inverse_products
from influence.curvature.identity import IdentityCurvature
from tests.cases import Matrix, Rows, Scaled, spectrum

F64 = torch.float64


def test_the_damped_operator_adds_lambda_block_by_block():
    matrix = Matrix(spectrum([1.0, 2.0, 3.0, 4.0, 5.0]))
    matrix.blocks = (slice(0, 2), slice(2, 5))
    operator = Damped(matrix, torch.tensor([0.1, 10.0], dtype=F64))
    lam = torch.tensor([0.1, 0.1, 10.0, 10.0, 10.0], dtype=F64)
    assert torch.equal(operator.diagonal(torch.empty(0, dtype=F64)), lam)
    v = torch.randn(3, 5, dtype=F64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(operator.matvec(v), v @ (matrix.C + torch.diag(lam)))


def test_the_whole_matrix_comes_column_by_column():
    """More columns than one product takes (64)."""
    C = spectrum(torch.linspace(0.1, 2, 70).tolist())
    torch.testing.assert_close(dense(Matrix(C)), C, rtol=0, atol=1e-12)


def test_scipy_takes_a_curvature_and_a_damped_one():
    C = spectrum([1.0, 2.0, 3.0])
    vector = np.array([1.0, -1.0, 2.0])
    operator = Damped(Matrix(C), torch.tensor([0.5], dtype=F64))
    assert as_linear_operator(Matrix(C)).shape == (3, 3)
    np.testing.assert_allclose(as_linear_operator(Matrix(C)) @ vector, C.numpy() @ vector)
    expected = C.numpy() @ vector + 0.5 * vector
    np.testing.assert_allclose(as_linear_operator(operator) @ vector, expected)


def test_what_a_curvature_can_do_is_seen_by_its_methods():
    assert isinstance(IdentityCurvature((3,)), Invertible)
    assert isinstance(Scaled(spectrum([1.0, 2.0])), Invertible)
    assert not isinstance(Matrix(spectrum([1.0, 2.0])), Invertible)
    assert isinstance(Rows(), Subsampled)
    assert not isinstance(Matrix(spectrum([1.0, 2.0])), Subsampled)


def test_inverse_products_of_a_curvature_that_is_not_diagonal():
    C = spectrum([1.0, 2.0, 3.0])
    operator = Damped(Scaled(C), torch.tensor([0.5], dtype=F64))
    v = torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert not isinstance(operator.curvature, Diagonal)
    expected = (v * operator.curvature.solve(v, operator.lam)).sum(1)
    torch.testing.assert_close(inverse_products(operator, v), expected)
