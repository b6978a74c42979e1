"""The direct solver: its residual catches a wrong closed form, and its size is bounded."""

from __future__ import annotations

import pytest
import torch

from influence.curvature import Damped
from influence.errors import InputError
from influence.solvers import Direct, direct
from tests.cases import Matrix, spectrum

F64 = torch.float64


def test_a_wrong_closed_form_is_caught_by_its_residual():
    class Wrong(Matrix):
        def solve(self, v, lam):
            return v / lam.to(v)

    solution = Direct().solve(
        Damped(Wrong(spectrum([1.0, 2.0])), torch.tensor([0.1], dtype=F64)), torch.eye(2, dtype=F64)
    )
    assert not solution.converged.any()
    assert "relative residual above" in solution.message


def test_direct_refuses_a_dense_matrix_that_is_too_large(monkeypatch):
    monkeypatch.setattr(direct, "DENSE_LIMIT", 2)
    with pytest.raises(InputError, match="use the solver cg or pcg"):
        Direct().solve(
            Damped(Matrix(spectrum([1.0, 2.0, 3.0])), torch.tensor([0.1], dtype=F64)),
            torch.eye(3, dtype=F64),
        )
