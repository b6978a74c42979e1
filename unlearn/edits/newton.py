"""The edit carried to its end: the optimum of the edited objective, by Newton's method.

Read the adapter theta_0 as the optimum of the proximal objective `J(theta) - <grad J(theta_0), theta> + lambda/2 |theta - theta_0|^2`
(Bae et al. 2022, arXiv 2209.05364). Without S, with S' in its place, its optimum is where

    F(theta) = grad J'(theta) - grad J(theta_0) + lambda (theta - theta_0) = 0

and Newton's first step from theta_0 is the one-shot edit. Taken again with the curvature of each point it converges to
what refitting that objective gives: exactly, not as a forecast. A pass over all rows for every gradient, so for small runs,
convex heads and checks; an adapter that memorises hardly feels this optimum move (`unlearn.edits.steps` is for those).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from influence.errors import NumericalError


@dataclass(frozen=True, eq=False)
class Optimum:
    """Parameters `[P]`, the norm of F before every iteration and at the end, and whether the last is small enough."""

    theta: Tensor
    norms: list[float] = field(repr=False)
    converged: bool


def optimum(
    residual: Callable[[Tensor], Tensor],
    solve: Callable[[Tensor, Tensor], Tensor],
    theta: Tensor,
    *,
    tolerance: float = 1e-10,
    iterations: int = 50,
) -> Optimum:
    """Find `F(theta) = 0` from `theta` [P]: `residual(theta)` is F, `solve(theta, v)` is `(C' + lambda I)^-1 v` there.

    Steps that do not shorten F are halved. Converged: `|F|` at most `tolerance` times what it was. Raises `NumericalError`
    if F is NaN or infinite at the start.
    """
    value = residual(theta)
    norms = [float(value.double().norm())]
    if not torch.isfinite(torch.tensor(norms[0])):
        raise NumericalError(
            "the gradient of the edited objective is NaN or infinite: raise the damping"
        )
    for _ in range(iterations):
        if norms[-1] <= tolerance * max(norms[0], 1e-300):
            break
        step, length = solve(theta, value), 1.0
        while length > 1e-4:
            there = theta - length * step
            found = residual(there)
            if float(found.double().norm()) < norms[-1]:
                break
            length /= 2
        else:
            break
        theta, value = there, found
        norms.append(float(value.double().norm()))
    return Optimum(theta, norms, norms[-1] <= tolerance * max(norms[0], 1e-300))
