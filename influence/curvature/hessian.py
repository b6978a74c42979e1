"""The Hessian of the training objective: exact, matrix-free, possibly indefinite.

    H v = sum_i w_i (d^2 l_i / d theta^2) v            (backward over backward: Pearlmutter 1994)

Damping rules are relative to the GGN's spectrum, because a Hessian's trace may be negative.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from influence.curvature.base import Arrays, Curvature
from influence.curvature.ggn import GGN, GGNOperator
from influence.curvature.objective import MatrixFree, SecondDerivative, objective_at
from influence.loss import Supervised, token_losses

if TYPE_CHECKING:
    from influence.at_point import AtPoint


@dataclass(frozen=True)
class Hessian(MatrixFree):
    """The exact Hessian.

    Sampled labels estimate the GGN's trace, its damping scale.
    """

    name: str = field(default="hessian", init=False)

    def load(self, arrays: Arrays, point: AtPoint) -> Curvature:
        """The operator, from `trace` [leaves]."""
        return HessianOperator(objective_at(point, arrays["trace"]))

    def held(self, arrays: Arrays, point: AtPoint) -> dict[str, Callable[[], Curvature]]:
        """Itself and the GGN, whose trace was fitted."""
        return super().held(arrays, point) | {"ggn": lambda: GGN().load(arrays, point)}


def hessian_products(
    part: Supervised, weights: Tensor, parameters: list[Tensor], v: list[Tensor]
) -> list[Tensor]:
    """Hessian of `sum_i w_i l_i` of one batch times each row of `v` (leaves `[K, ...]`):
    backward over backward.
    """
    sums = part.per_example(token_losses(part.logits, part.targets))
    first = torch.autograd.grad(
        (weights.to(sums) * sums).sum(), parameters, create_graph=True, materialize_grads=True
    )
    out = [torch.zeros_like(column) for column in v]
    for k in range(len(v[0])):
        second = torch.autograd.grad(
            first,
            parameters,
            [column[k] for column in v],
            retain_graph=True,
            materialize_grads=True,
        )
        for total, term in zip(out, second, strict=True):
            total[k] = term
    return out


@dataclass(frozen=True)
class HessianOperator(SecondDerivative):
    """The Hessian of J as an operator (a fitted curvature).

    Damping is relative to the GGN's spectrum.
    """

    name: str = "hessian"

    def matvec(self, v: Tensor) -> Tensor:
        """`H v` for every row of `v` [K, P].

        One forward and backward per batch, one more per batch and column.
        """
        return self.objective.product(v, hessian_products)

    def matvec_on(self, v: Tensor, rows: np.ndarray) -> Tensor:
        """An unbiased estimate of `H v` from these training rows alone: their weights times n
        over their number.
        """
        return self.objective.product(v, hessian_products, rows)

    def top_eigenvalues(self) -> Tensor:
        """The GGN's, `[leaves]`."""
        return GGNOperator(self.objective).top_eigenvalues()
