"""What a solver takes and returns: `(C + lambda I) x = v` for many right-hand sides at once, as rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from influence.curvature.base import Damped
from influence.errors import NumericalError


@dataclass(frozen=True)
class Solution:
    """What a solver found, column by column (K right-hand sides).

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
        """Measure every column's residual; a column above `tolerance` is not converged."""
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
    """Inverts a damped curvature. A numerical failure is a value in the solution, not an exception.

    `approximate`: a formula with an error of its own, which no tolerance or number of iterations
    removes.
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
    """`|(C + lambda) x - v| / |v|` of each row, `[K]` float64; 0 where v = 0 and x = 0."""
    if not bool(torch.isfinite(rhs).all()):
        raise NumericalError(
            "a right-hand side holds NaN or infinity: the query's gradient is not finite"
        )
    difference = (operator.matvec(values) - rhs).double().norm(dim=1)
    scale = rhs.double().norm(dim=1)
    residuals = torch.where(scale > 0, difference / scale.clamp(min=1e-300), difference)
    return torch.nan_to_num(residuals, nan=torch.inf).cpu()
