"""LiSSA: the Neumann series of the inverse, one product per term.

Agarwal, Bullins & Hazan 2017; Koh & Liang 2017.

    x <- x + ( v - (C_B + lambda I) x ) / c

from x = 0. It converges to the solution of `(C + lambda I) x = v` where c is above half the top
eigenvalue of `C + lambda I`, in a number of products that grows with c over the smallest one: the
slowest of the solvers here. Two released implementations subtract `lambda x` with the wrong sign,
and so solve `(C - lambda I) x = v`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from influence.curvature.base import Damped
from influence.errors import InputError
from influence.solvers.base import Solution
from influence.solvers.descent import Batches, descend, top_eigenvalue


@dataclass(frozen=True)
class LiSSA:
    """LiSSA, each column stopped on its own residual.

    Every column ends at a relative residual of `tolerance`, or after `max_iterations` products.

    `scale` is c; None: a little above the top eigenvalue, by power iteration (its products count).
    `batch_size` rows per product, drawn with `seed`; None: all. With mini-batches the average of
    the iterates is returned.
    """

    tolerance: float = 1e-5
    max_iterations: int = 5000
    scale: float | None = None
    batch_size: int | None = None
    seed: int = 0
    name: str = "lissa"
    approximate: ClassVar[bool] = False
    # best, x, average, u and the gradient of `descend`, and what a product and masks copy of them
    copies: ClassVar[int] = 12

    def __post_init__(self) -> None:
        if self.scale is not None and not self.scale > 0:
            raise InputError(
                f"LiSSA was given scale {self.scale}; expected a positive number, or None to "
                "estimate it"
            )

    def solve(self, operator: Damped, rhs: Tensor) -> Solution:
        """Solve for every row of `rhs` [K, P].

        A column that diverges returns its best iterate, unconverged, and the message says so.
        """
        batches = Batches.of(operator, self.batch_size, self.seed, self.name)
        scale, spent = (
            (self.scale, 0) if self.scale is not None else top_eigenvalue(batches, rhs[0])
        )
        descent = descend(
            batches,
            rhs,
            rhs / scale,
            step=1 / scale,
            adapt=self.scale is None,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
            name=self.name,
            spent=spent,
        )
        message = descent.message(
            f"scale c = {1 / float(descent.step.min()):.3g} is below the top eigenvalue of C + "
            "lambda I (of a mini-batch, with batch_size); give a larger scale, or none to have it "
            "estimated"
        )
        return Solution.checked(
            operator, rhs, descent.best, self.tolerance, descent.iterations.cpu(), message
        )
