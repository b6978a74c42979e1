"""The edit carried to its end: the optimum of the edited objective, by Newton's method.

Read the adapter theta_0 as the optimum of the proximal objective
`J(theta) - <grad J(theta_0), theta> + lambda/2 |theta - theta_0|^2` (Bae et al. 2022, arXiv
2209.05364). Without S, with S' in its place, its optimum is where

    F(theta) = grad J'(theta) - grad J(theta_0) + lambda (theta - theta_0) = 0

and Newton's first step from theta_0 is the one-shot edit. Taken again with the curvature of each
point it converges to what refitting that objective gives: exactly, not as a forecast. Every
gradient is a pass over all rows, so this is for small runs, convex heads and checks. An adapter
that memorises hardly feels this optimum move (`unlearn.edits.steps` is for those).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from influence.errors import NumericalError

#: The shortest step that is tried before Newton gives up, as a share of the whole one. A choice.
SHORTEST = 1e-4


@dataclass(frozen=True, eq=False)
class Optimum:
    """Where Newton's method ended.

    Attributes
    ----------
    theta : Tensor [P]
        The parameters.
    norms : list of float
        |F| before every iteration and at the end.
    converged : bool
        Whether the last norm is small enough.
    """

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
    """Find `F(theta) = 0` from `theta` [P].

    Parameters
    ----------
    residual
        Gives F [P] at some parameters.
    solve
        Gives `(C' + lambda I)^-1 v` at some parameters, for v [P].
    theta
        Where to begin.
    tolerance
        Converged is `|F|` at most this times what it was.
    iterations
        The most Newton steps.

    Raises
    ------
    NumericalError
        If F is NaN or infinite at the start.
    """
    value = residual(theta)
    norms = [float(value.double().norm())]
    if not torch.isfinite(torch.tensor(norms[0])):
        raise NumericalError(
            "the gradient of the edited objective is NaN or infinite: raise the damping"
        )
    small = tolerance * max(norms[0], 1e-300)
    for _ in range(iterations):
        if norms[-1] <= small:
            break
        step, length = solve(theta, value), 1.0
        # Halved until F gets shorter: far from the optimum a whole Newton step may overshoot.
        while length > SHORTEST:
            next_theta = theta - length * step
            next_value = residual(next_theta)
            if float(next_value.double().norm()) < norms[-1]:
                break
            length /= 2
        else:
            break
        theta, value = next_theta, next_value
        norms.append(float(value.double().norm()))
    return Optimum(theta, norms, norms[-1] <= small)
