"""The sample-space Fisher: exact inverses for any number of parameters, at n x n cost.

With rows `f_ik = sqrt(w_i / k) g_ik` stacked as F [m, P] (k label draws per example, or the data's own labels),

    C = F^T F,       (C + lambda I)^-1 v = ( v - F^T (F F^T + lambda I)^-1 F v ) / lambda

exactly (Woodbury), over A, B and all layers jointly. One eigendecomposition `F F^T = U diag(s) U^T` serves every
lambda. With labels sampled from the model C is the GGN in expectation; with the data's labels (`samples=0`) it
is the empirical Fisher, which is not. What lies outside the span of the rows sees only the damping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from influence.errors import InputError

#: Streams F in order, as blocks `[b, P]` of unscaled gradients.
Rows = Callable[[], Iterator[Tensor]]


@dataclass(frozen=True)
class Fisher:
    """Sample-space Fisher; `samples` label draws per example (0: the data's labels)."""

    samples: int = 1
    name: str = field(default="fisher", init=False)

    def __post_init__(self) -> None:
        if self.samples < 0:
            raise InputError(f"{self} was given; samples must be at least 0 (0: the data's labels)")


@dataclass(frozen=True)
class SampleSpaceFisher:
    """A fitted sample-space Fisher: where its rows are, their scales `[m]`, and the Gram's eigendecomposition.

    Row products are summed in float64: the Woodbury difference cancels in every direction the rows span.
    """

    size: int
    rows: Rows
    scales: Tensor
    vectors: Tensor
    values: Tensor
    name: str = "fisher"

    @classmethod
    def fit(cls, size: int, rows: Rows, scales: Tensor) -> SampleSpaceFisher:
        """Form the Gram matrix F F^T [m, m] and eigendecompose it; `scales` are `sqrt(w_i / k)`."""
        values, vectors = torch.linalg.eigh(gram(rows, scales))
        return cls(size, rows, scales, vectors, values.clamp(min=0))

    @property
    def blocks(self) -> tuple[slice, ...]:
        """One block: A, B and all layers jointly."""
        return (slice(0, self.size),)

    def products(self, v: Tensor) -> Tensor:
        """`F v`, `[K, m]`, for every row of `v` [K, P]."""
        v = v.double()
        return torch.cat([v @ block.double().T for block in self.rows()], dim=1) * self.scales

    def combine(self, coefficients: Tensor) -> Tensor:
        """`F^T c`, `[K, P]`, for every row of `coefficients` [K, m]."""
        weighted = coefficients * self.scales
        out = torch.zeros(len(weighted), self.size, dtype=torch.float64, device=weighted.device)
        start = 0
        for block in self.rows():
            out += weighted[:, start : start + len(block)] @ block.double()
            start += len(block)
        return out

    def matvec(self, v: Tensor) -> Tensor:
        """`C v` for every row of `v` [K, P]."""
        return self.combine(self.products(v)).to(v)

    def solve(self, v: Tensor, lam: Tensor) -> Tensor:
        """`(C + lambda I)^-1 v` for every row of `v` [K, P]; `lam` [1]."""
        damping = float(lam)
        inner = (self.products(v) @ self.vectors) / (self.values + damping) @ self.vectors.T
        return ((v.double() - self.combine(inner)) / damping).to(v)

    def leverage(self, lam: float) -> Tensor:
        """`f^T (C + lambda I)^-1 f` of every row f of F, `[m]`: the h of the leave-one-out factor 1/(1 - h)."""
        return self.vectors.square() @ (self.values / (self.values + lam))

    def mean_eigenvalues(self) -> Tensor:
        """Trace over P, `[1]`."""
        return self.values.sum().reshape(1).cpu() / self.size

    def top_eigenvalues(self) -> Tensor:
        """The largest eigenvalue, `[1]`."""
        return self.values.max().reshape(1).cpu()


def gram(rows: Rows, scales: Tensor) -> Tensor:
    """`F F^T` [m, m] in float64, from blocks of rows: each pair of blocks once."""
    m = len(scales)
    out = torch.zeros(m, m, dtype=torch.float64, device=scales.device)
    i = 0
    for left in rows():
        left64, j = left.double(), 0
        for right in rows():
            if j > i:
                break
            product = left64 @ right.double().T
            out[i : i + len(left), j : j + len(right)] = product
            out[j : j + len(right), i : i + len(left)] = product.T
            j += len(right)
        i += len(left)
    return out * scales[:, None] * scales[None, :]
