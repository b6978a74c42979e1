"""The direct solver, which does not iterate.

It takes the closed form where the curvature has one, and a dense factorisation where P is small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from influence.curvature.base import Damped, Invertible, dense
from influence.errors import InputError
from influence.solvers.base import Solution

#: Above this many parameters a dense P x P matrix is refused (4096^2 float64 = 134 MB, minutes of
#: products).
DENSE_LIMIT = 4096


@dataclass(frozen=True)
class Direct:
    """`x = (C + lambda I)^-1 v` without iterating.

    K-FAC, EK-FAC, the sample-space Fisher and the identity have closed forms. The Hessian and the
    GGN are formed densely and LU-factorised, up to `DENSE_LIMIT` parameters.
    """

    tolerance: float = 1e-3
    name: str = "direct"
    approximate: ClassVar[bool] = False
    # beside the answers of all queries those that are being solved, a few at a time
    # (`influence.scores`), with two rotations and the product that measures the residual
    copies: ClassVar[int] = 1

    def solve(self, operator: Damped, rhs: Tensor) -> Solution:
        """Solve for every row of `rhs` [K, P].

        Errors: InputError where neither way is possible.
        """
        curvature = operator.curvature
        if isinstance(curvature, Invertible):
            values = curvature.solve(rhs, operator.lam)
        elif curvature.size <= DENSE_LIMIT:
            matrix = dense(curvature, dtype=torch.float64, device=rhs.device)
            matrix += torch.diag(operator.diagonal(matrix[0]))
            values = torch.linalg.solve(matrix, rhs.double().T).T.to(rhs)
        else:
            raise InputError(
                f"the direct solver was asked to invert a {curvature.name} of {curvature.size} "
                "parameters, which has no closed form and is formed densely only up to "
                f"{DENSE_LIMIT}: use the solver cg or pcg"
            )
        return Solution.checked(
            operator, rhs, values, self.tolerance, torch.zeros(len(rhs), dtype=torch.int64)
        )
