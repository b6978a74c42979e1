"""The sample-space Fisher: exact inverses for any number of parameters, at n x n cost.

With rows `f_ik = sqrt(w_i / k) g_ik` stacked as F [m, P] (k label draws per example, or the data's
own labels),

    C = F^T F,       (C + lambda I)^-1 v = ( v - F^T (F F^T + lambda I)^-1 F v ) / lambda

exactly (Woodbury), over A, B and all layers jointly. One eigendecomposition `F F^T = U diag(s) U^T`
serves every lambda. With labels sampled from the model C is the GGN in expectation; with the data's
labels (`samples=0`) it is the empirical Fisher, which is not. What lies outside the span of the
rows sees only the damping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from influence import distributed
from influence.curvature.base import (
    ALWAYS,
    Accumulator,
    AfterPass,
    Arrays,
    ChangedRows,
    Curvature,
    SampledRows,
    Specification,
)
from influence.errors import InputError, NumericalError
from influence.memory import device_memory

if TYPE_CHECKING:
    from influence.at_point import AtPoint

#: Streams F in order, as blocks `[b, P]` of unscaled gradients.
Rows = Callable[[], Iterator[Tensor]]
#: Share of the machine's memory that the Gram matrix and its eigendecomposition may take.
MEMORY_SHARE = 0.7


@dataclass(frozen=True)
class Fisher(Specification):
    """Sample-space Fisher.

    `samples` label draws per example (0: the data's labels).
    """

    samples: int = 1
    name: str = field(default="fisher", init=False)
    reads_rows: ClassVar[str] = ALWAYS
    sums_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.samples < 0:
            raise InputError(f"{self} was given; samples must be at least 0 (0: the data's labels)")

    @property
    def draws(self) -> int:
        """Label draws per row."""
        return self.samples

    def refuse(self, rows: int) -> None:
        """The Gram matrix and its eigendecomposition take about 3 m^2 doubles: refused before
        the pass, not after.
        """
        m = rows * max(1, self.samples)
        needed, there = 24 * m * m, device_memory()
        if needed > MEMORY_SHARE * there:
            raise InputError(
                f"curvature fisher with {m} rows needs {needed / 1e9:.0f} GB of memory for its "
                f"{m} x {m} Gram matrix, and this machine has {there / 1e9:.0f} GB: use "
                "--curvature "
                "ekfac, or fewer --samples"
            )

    def begin(self, point: AtPoint) -> Accumulator:
        """The Gram matrix, formed of the rows that the pass keeps."""
        return Gram(point.model.space.size)

    def load(self, arrays: Arrays, point: AtPoint) -> Curvature:
        """From `scales` [m], `vectors` [m, m], `values` [m], and the rows that the run keeps."""
        return SampleSpaceFisher(
            point.model.space.size,
            point.kept_rows,
            arrays["scales"],
            arrays["vectors"],
            arrays["values"],
            self.samples,
        )


class Gram(Accumulator):
    """The Gram matrix F F^T of the kept rows."""

    def __init__(self, parameters: int) -> None:
        self.parameters = parameters

    def after_pass(self, rows: int) -> AfterPass:
        """The Gram matrix is decomposed; each row is multiplied with half of the others, and each
        vector that is solved for with all of them, twice.
        """
        products = self.parameters * rows
        return AfterPass(
            decomposed=(rows,),
            kept_bytes=8 * rows * (rows + 2),
            row_products=products // 2,
            solve_products=2 * (products + rows * rows),
            double=True,
        )

    def finish(self, rows: SampledRows) -> dict[str, Tensor]:
        """`vectors` and `values` of the Gram matrix, and the rows' `scales` [m], `sqrt(w_i /
        k)`.
        """
        fisher = SampleSpaceFisher.fit(self.parameters, lambda: iter(rows), rows.weights.sqrt())
        return {"vectors": fisher.vectors, "values": fisher.values, "scales": fisher.scales}


@dataclass(frozen=True)
class SampleSpaceFisher(Curvature):
    """A fitted sample-space Fisher: where its rows are, their scales `[m]`, and the Gram's
    eigendecomposition.

    Row products are summed in float64: the Woodbury difference cancels in every direction the rows
    span. `samples` as in `Fisher`.
    """

    parameters: int
    rows: Rows
    scales: Tensor
    vectors: Tensor
    values: Tensor
    samples: int = 1
    name: str = "fisher"

    @classmethod
    def fit(cls, parameters: int, rows: Rows, scales: Tensor) -> SampleSpaceFisher:
        """Form the Gram matrix F F^T [m, m] and eigendecompose it.

        `scales` are `sqrt(w_i / k)`.
        """
        values, vectors = torch.linalg.eigh(gram(rows, scales))
        return cls(parameters, rows, scales, vectors, values.clamp(min=0))

    @property
    def blocks(self) -> tuple[slice, ...]:
        """One block: A, B and all layers jointly."""
        return (slice(0, self.parameters),)

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
        """`(C + lambda I)^-1 v` for every row of `v` [K, P].

        `lam` [1].
        """
        damping = float(lam)
        inner = (self.products(v) @ self.vectors) / (self.values + damping) @ self.vectors.T
        return ((v.double() - self.combine(inner)) / damping).to(v)

    def leverage(self, lam: float) -> Tensor:
        """`f^T (C + lambda I)^-1 f` of every row f of F, `[m]`: the h of the leave-one-out
        factor 1/(1 - h).
        """
        return self.vectors.square() @ (self.values / (self.values + lam))

    def mean_eigenvalues(self) -> Tensor:
        """Trace over P, `[1]`."""
        return self.values.sum().reshape(1).cpu() / self.size

    def top_eigenvalues(self) -> Tensor:
        """The largest eigenvalue, `[1]`."""
        return self.values.max().reshape(1).cpu()

    def updated(self, gone: ChangedRows, come: ChangedRows) -> UpdatedFisher:
        """With the rows that go and come beside the fitted ones: exact, by Woodbury's identity."""
        stacks, signs = [], []
        for changed, sign in ((gone, -1.0), (come, 1.0)):
            for rows, features in changed.sampled(self.samples):
                weights = torch.from_numpy(changed.weights[rows]).to(features.device)
                stacks.append(features.double() * (weights / max(1, self.samples)).sqrt()[:, None])
                signs += [sign] * len(rows)
        empty = torch.zeros(0, self.size, dtype=torch.float64, device=self.scales.device)
        stack = torch.cat(stacks) if stacks else empty
        return UpdatedFisher(
            self, stack, torch.tensor(signs, dtype=torch.float64, device=stack.device)
        )


@dataclass(frozen=True, eq=False)
class UpdatedFisher(Curvature):
    """A fitted sample-space Fisher plus `rows^T diag(signs) rows`.

    With the rows that go and come as W [k, P], scaled by their weights' roots, and signs D =
    diag(+-1), Woodbury's identity around the fitted inverse `M = C + lambda I` needs a k x k
    matrix:

        (M + W^T D W)^-1 v = M^-1 v - M^-1 W^T (D + W M^-1 W^T)^-1 W M^-1 v          (D = D^-1)
    """

    fitted: SampleSpaceFisher
    rows: Tensor
    signs: Tensor
    solved_rows: dict[float, Tensor] = field(default_factory=dict, repr=False)
    name: str = "fisher"

    @property
    def blocks(self) -> tuple[slice, ...]:
        """One block."""
        return self.fitted.blocks

    def matvec(self, v: Tensor) -> Tensor:
        """`C' v` for every row of `v` [K, P]."""
        rows = self.rows.double()
        changed = ((v.double() @ rows.T) * self.signs.to(rows)) @ rows
        return self.fitted.matvec(v) + changed.to(v)

    def solve(self, v: Tensor, lam: Tensor) -> Tensor:
        """`(C' + lambda I)^-1 v` for every row of `v` [K, P].

        `lam` [1].

        Where a row that goes has a leverage within rounding of 1, the solver's residual tells.
        """
        rows = self.rows.double()
        solved = self._solved(float(lam), rows)
        inner = torch.diag(self.signs.to(rows)) + rows @ solved.T
        plain = self.fitted.solve(v.double(), lam)
        coefficients, info = torch.linalg.solve_ex(inner, rows @ plain.T)
        if bool(info):
            raise NumericalError(
                "the curvature without the changed rows cannot be solved: a row has leverage 1, it "
                "alone determines a direction. Raise the damping"
            )
        return (plain - coefficients.T @ solved).to(v)

    def _solved(self, lam: float, rows: Tensor) -> Tensor:
        """`M^-1 W^T`, `[k, P]` float64, kept for the next right-hand side: it passes over all
        stored rows.
        """
        if lam not in self.solved_rows:
            self.solved_rows.clear()
            self.solved_rows[lam] = self.fitted.solve(
                rows, torch.tensor([lam], dtype=torch.float64)
            )
        return self.solved_rows[lam]

    def mean_eigenvalues(self) -> Tensor:
        """Trace over P, `[1]`."""
        rows = self.rows.double()
        changed = (rows.square().sum(1) * self.signs.to(rows)).sum()
        return self.fitted.mean_eigenvalues() + changed.reshape(1).cpu() / self.size

    def top_eigenvalues(self) -> Tensor:
        """The fitted curvature's largest eigenvalue, `[1]`."""
        return self.fitted.top_eigenvalues()

    def updated(self, gone: ChangedRows, come: ChangedRows) -> UpdatedFisher:
        """Of the fitted curvature: the rows are all that have changed since the fit."""
        return self.fitted.updated(gone, come)


def gram(rows: Rows, scales: Tensor) -> Tensor:
    """`F F^T` [m, m] in float64, from blocks of rows: each pair of blocks once.

    Several processes each form a part of it.
    """
    m = len(scales)
    out = torch.zeros(m, m, dtype=torch.float64, device=scales.device)
    i = 0
    for number, left in enumerate(rows()):
        if number % distributed.world() != distributed.rank():
            i += len(left)
            continue
        left64, j = left.double(), 0
        for right in rows():
            if j > i:
                break
            product = left64 @ right.double().T
            out[i : i + len(left), j : j + len(right)] = product
            out[j : j + len(right), i : i + len(left)] = product.T
            j += len(right)
        i += len(left)
    return distributed.add_up(out) * scales[:, None] * scales[None, :]
