"""SGD on the quadratic whose minimum is the solution, with heavy-ball momentum.

LLMEraser's form (arXiv 2412.00383).

    min_x  1/2 x^T (C + lambda I) x - v^T x,        u <- beta u + (C_B + lambda I) x - v,   x <- x -
    eta u

from x = 0. The gradient is written by hand. The released implementation differentiates a gradient
without `create_graph`, whose minimum is `2 C^-1 v`, and takes 20 Adam steps of 1e-5, which is no
solve.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from influence.curvature.base import Damped
from influence.errors import InputError
from influence.solvers.base import Solution
from influence.solvers.descent import Batches, descend, top_eigenvalue

#: With mini-batches momentum also multiplies the noise: it is at most this.
STOCHASTIC_MOMENTUM = 0.9


@dataclass(frozen=True)
class SGD:
    """SGD, each column stopped on its own residual.

    Every column ends at a relative residual of `tolerance`, or after `max_iterations` products.

    `learning_rate` is eta; None: 1/L, L the top eigenvalue of `C + lambda I` by power iteration
    (its products count); heavy ball is stable up to almost 4/L. `momentum` is beta; None: `(1 -
    sqrt(m / L))^2` with m the smallest lambda, a lower bound of the spectrum where C >= 0, which
    contracts every direction by at least `1 - sqrt(m / L)` a step. `batch_size` rows per product,
    drawn with `seed`; None: all. Mini-batches take `eta = (1 - beta) / L` and a beta of at most
    `STOCHASTIC_MOMENTUM`, and return the average of the iterates.
    """

    tolerance: float = 1e-5
    max_iterations: int = 2000
    learning_rate: float | None = None
    momentum: float | None = None
    batch_size: int | None = None
    seed: int = 0
    name: str = "sgd"
    approximate: ClassVar[bool] = False
    copies: ClassVar[int] = 12  # the iteration of `descend` and its products, as in LiSSA

    def __post_init__(self) -> None:
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise InputError(
                f"SGD was given learning_rate {self.learning_rate}; expected a positive number, "
                "or None to estimate it"
            )
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise InputError(
                f"SGD was given momentum {self.momentum}; expected 0 to 1 (exclusive), or None"
            )

    def solve(self, operator: Damped, rhs: Tensor) -> Solution:
        """Solve for every row of `rhs` [K, P].

        A column that diverges returns its best iterate, unconverged, and the message says so.
        """
        batches = Batches.of(operator, self.batch_size, self.seed, self.name)
        top, spent = (
            (1 / self.learning_rate, 0) if self.learning_rate else top_eigenvalue(batches, rhs[0])
        )
        momentum, rate = self.momentum, 1 / top
        if momentum is None:
            momentum = max(0.0, 1 - (float(operator.lam.min()) / top) ** 0.5) ** 2
            if batches.size is not None:
                momentum = min(momentum, STOCHASTIC_MOMENTUM)
        if self.learning_rate is None and batches.size is not None:
            rate *= 1 - momentum
        descent = descend(
            batches,
            rhs,
            rhs * rate,
            step=rate,
            adapt=self.learning_rate is None,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
            name=self.name,
            momentum=momentum,
            spent=spent,
        )
        message = descent.message(
            f"learning rate {float(descent.step.max()):.3g} is too large for the top eigenvalue of "
            "C + lambda I; give a smaller one, or none to have it estimated"
        )
        return Solution.checked(
            operator, rhs, descent.best, self.tolerance, descent.iterations.cpu(), message
        )
