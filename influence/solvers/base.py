"""What a solver takes and returns.

It solves `(C + lambda I) x = v` for many right-hand sides at once, given as rows [K, P].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from influence.curvature.base import Damped
from influence.errors import NumericalError

#: What a solver that does not say its `copies` is taken to hold: as many as any solver here.
MOST_COPIES = 12


@dataclass(frozen=True)
class Solution:
    """The answer of a solver, column by column (K right-hand sides).

    `values` [K, P]; `residuals` [K], the true `|(C + lambda) x - v| / |v|`, computed after the fact
    by one more product; `converged` [K]; `iterations` [K]; `message`: why a column did not
    converge, or empty.
    """

    values: Tensor
    residuals: Tensor
    converged: Tensor
    iterations: Tensor
    message: str = ""

    @classmethod
    def checked(
        cls,
        operator: Damped,
        rhs: Tensor,
        values: Tensor,
        tolerance: float,
        iterations: Tensor,
        message: str = "",
    ) -> Solution:
        """Measure every column's residual.

        A column above `tolerance` is not converged.
        """
        residuals = relative_residuals(operator, rhs, values)
        converged = residuals <= tolerance
        if not message and not bool(converged.all()):
            message = (
                f"{int((~converged).sum())} of {len(rhs)} columns have a relative residual above "
                f"{tolerance:.0e} (worst {float(residuals.max()):.1e}): raise the damping or the "
                "number of iterations"
            )
        return cls(values, residuals, converged, iterations, message)


class Solver(Protocol):
    """A way to invert a damped curvature.

    A numerical failure is a value in the solution, not an exception. A solver is a frozen dataclass
    in a file of its own.

    `approximate`: a formula with an error of its own, which no tolerance or number of iterations
    removes. A solver may also have `copies`, an int: the vectors [K, P] that it holds beside the
    right-hand sides, counted in its code, by which queries are solved in chunks that fit the
    memory. One without it is taken to hold `MOST_COPIES`.
    """

    approximate: ClassVar[bool]

    @property
    def name(self) -> str:
        """The solver's name, for the record."""
        ...

    def solve(self, operator: Damped, rhs: Tensor) -> Solution:
        """Solve for every row of `rhs` [K, P]."""
        ...


def relative_residuals(operator: Damped, rhs: Tensor, values: Tensor) -> Tensor:
    """`|(C + lambda) x - v| / |v|` of each row, `[K]` float64.

    0 where v = 0 and x = 0. Errors: NumericalError for a right-hand side that is not finite.
    """
    if not bool(torch.isfinite(rhs).all()):
        raise NumericalError(
            "a right-hand side holds NaN or infinity: the query's gradient is not finite"
        )
    difference = (operator.matvec(values) - rhs).double().norm(dim=1)
    scale = rhs.double().norm(dim=1)
    residuals = torch.where(scale > 0, difference / scale.clamp(min=1e-300), difference)
    return torch.nan_to_num(residuals, nan=torch.inf).cpu()
