"""ASTRA: a Neumann series preconditioned by EK-FAC (Wang et al. 2025, arXiv 2507.14740).

    x <- x - a P^-1 ( (C_B + lambda I) x - v ),        P = EK-FAC + lambda I

The first step from x = 0 is a full one, so the first iterate is the EK-FAC answer `P^-1 v`; the
rest correct it. A step a = 1 diverges where an eigenvalue of `P^-1 (C + lambda I)` exceeds 2, which
nothing rules out: a is at most one over the top one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from influence.curvature.base import Damped, Invertible
from influence.errors import InputError
from influence.solvers.base import Solution
from influence.solvers.descent import Batches, descend, top_eigenvalue


@dataclass(frozen=True)
class ASTRA:
    """ASTRA, each column stopped on its own residual.

    Every column ends at a relative residual of `tolerance`, or after `max_iterations` products.

    `preconditioner`: a damped curvature with a closed-form inverse (EK-FAC with the same damping,
    as a rule). `step` is a; None: `min(1, 1 / top eigenvalue of P^-1 (C + lambda I))`, by power
    iteration (its products count). With all rows the best iterate is returned, whose residual is at
    most that of `P^-1 v`. `batch_size` rows per product, drawn with `seed`, return the average of
    the iterates.
    """

    preconditioner: Damped
    tolerance: float = 1e-5
    max_iterations: int = 1000
    step: float | None = None
    batch_size: int | None = None
    seed: int = 0
    name: str = "astra"
    approximate: ClassVar[bool] = False
    copies: ClassVar[int] = 12  # the iteration of `descend` and its products, as in LiSSA

    def __post_init__(self) -> None:
        if self.step is not None and not self.step > 0:
            raise InputError(
                f"ASTRA was given step {self.step}; expected a positive number, or None to "
                "estimate it"
            )
        if not isinstance(self.preconditioner.curvature, Invertible):
            raise InputError(
                f"ASTRA was given the preconditioner {self.preconditioner.curvature.name!r}, "
                "which has no closed-form inverse; give a damped EK-FAC or K-FAC"
            )

    def solve(self, operator: Damped, rhs: Tensor) -> Solution:
        """Solve for every row of `rhs` [K, P].

        A column that diverges returns its best iterate, unconverged, and the message says so.
        """
        batches = Batches.of(operator, self.batch_size, self.seed, self.name)
        step, spent = self.step, 0
        if step is None:
            top, spent = top_eigenvalue(batches, rhs[0], self._precondition)
            step = min(1.0, 1 / top)
        descent = descend(
            batches,
            rhs,
            self._precondition(rhs),
            step=step,
            adapt=self.step is None,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
            name=self.name,
            precondition=self._precondition,
            spent=spent,
        )
        message = descent.message(
            f"step a = {float(descent.step.max()):.3g} is above twice the inverse of the top "
            "eigenvalue of P^-1 (C + lambda I); give a smaller step, or none to have it estimated"
        )
        # a best iterate of zero tells nothing; the EK-FAC answer does, whatever its residual
        untouched = ~descent.best.any(dim=1) & rhs.any(dim=1)
        descent.best[untouched] = self._precondition(rhs[untouched])
        return Solution.checked(
            operator, rhs, descent.best, self.tolerance, descent.iterations.cpu(), message
        )

    def _precondition(self, r: Tensor) -> Tensor:
        assert isinstance(self.preconditioner.curvature, Invertible)
        return self.preconditioner.curvature.solve(r, self.preconditioner.lam)
