"""What every fitted curvature offers: a symmetric matrix `C` [P, P] that is never formed.

`C` approximates the second derivative of the training objective `J = sum_i w_i l_i`, with the same weights. A
curvature is described by a small frozen dataclass (`EKFAC(samples=1)`), and fitted by `influence.fit`, which
returns an object with the methods below. Stacks of vectors are rows: `[K, P]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import scipy.sparse.linalg as sla
import torch
from torch import Tensor


class Curvature(Protocol):
    """A fitted curvature C."""

    @property
    def name(self) -> str:
        """The curvature's name, for the record."""
        ...

    @property
    def size(self) -> int:
        """P."""
        ...

    @property
    def blocks(self) -> tuple[slice, ...]:
        """Slices of the flat vector that share one lambda."""
        ...

    def matvec(self, v: Tensor) -> Tensor:
        """`C v` for every row of `v` [K, P]."""
        ...

    def mean_eigenvalues(self) -> Tensor:
        """Trace over size of each block, `[blocks]`; the scale of the `mean` damping rule."""
        ...

    def top_eigenvalues(self) -> Tensor:
        """Largest eigenvalue of each block, `[blocks]`; the scale of the `top` damping rule."""
        ...


@runtime_checkable
class Invertible(Protocol):
    """A curvature that knows `(C + lambda I)^-1` in closed form."""

    def solve(self, v: Tensor, lam: Tensor) -> Tensor:
        """`(C + lambda I)^-1 v` for every row of `v` [K, P]; `lam` [blocks]."""
        ...


@runtime_checkable
class Subsampled(Protocol):
    """A curvature `C = sum_i w_i C_i` over training rows that can be multiplied on some of them alone."""

    @property
    def count(self) -> int:
        """The training rows, n."""
        ...

    def matvec_on(self, v: Tensor, rows: np.ndarray) -> Tensor:
        """`(n / b) sum_{i in rows} w_i C_i v` for every row of `v` [K, P] and b `rows`.

        Unbiased for `C v` where the rows are drawn uniformly.
        """
        ...


@dataclass(frozen=True)
class Damped:
    """The operator `C + lambda I` that solvers invert; `lam` [blocks] from a damping rule."""

    curvature: Curvature
    lam: Tensor

    def matvec(self, v: Tensor) -> Tensor:
        """`(C + lambda I) v` for every row of `v` [K, P]."""
        return self.curvature.matvec(v) + v * self.diagonal(v)

    def diagonal(self, like: Tensor) -> Tensor:
        """Lambda spread over the coordinates, `[P]`."""
        out = torch.empty(self.curvature.size, dtype=like.dtype, device=like.device)
        for block, value in zip(self.curvature.blocks, self.lam.tolist(), strict=True):
            out[block] = value
        return out


def dense(
    curvature: Curvature, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> Tensor:
    """The whole matrix C, `[P, P]`, column by column, made symmetric; for small P and for tests."""
    rows = torch.eye(curvature.size, dtype=dtype, device=device)
    matrix = torch.cat([curvature.matvec(part) for part in rows.split(64)])
    return (matrix + matrix.T) / 2


def as_linear_operator(
    operator: Curvature | Damped, device: torch.device | str = "cpu"
) -> sla.LinearOperator:
    """A SciPy `LinearOperator` [P, P] (float64 outside, the model's type inside) of C or of C + lambda I."""
    size = operator.curvature.size if isinstance(operator, Damped) else operator.size

    def matmat(columns: np.ndarray) -> np.ndarray:
        rows = torch.from_numpy(np.ascontiguousarray(columns.T)).to(device)
        return operator.matvec(rows).double().cpu().numpy().T

    one = lambda vector: matmat(vector.reshape(-1, 1)).ravel()  # noqa: E731
    functions: dict[str, Any] = {
        "matvec": one,
        "rmatvec": one,
        "matmat": matmat,
        "dtype": np.float64,
    }
    return sla.LinearOperator((size, size), **functions)
