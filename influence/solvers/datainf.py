"""DataInf: the mean of the inverses in place of the inverse of the mean.

Kwon et al. 2024 (arXiv 2310.00902).

On each block (leaf), with g_i the gradient of l_i at the data's labels and weights w_i,

    x = 1 / (n lambda) sum_i [ v - n w_i <v, g_i> / (lambda + n w_i |g_i|^2) g_i ]

which is `1/n sum_i (n w_i g_i g_i^T + lambda I)^-1 v`, each term by Sherman-Morrison. The empirical
Fisher is `sum_i w_i g_i g_i^T`, so this is exact for n = 1 and an approximation else, whose error
the damping alone decides. The paper takes `w_i = 1/n` and lambda = 0.1 times the mean of g_i^2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from influence.curvature.base import Damped
from influence.curvature.fisher import Rows
from influence.errors import InputError
from influence.solvers.base import Solution, relative_residuals


@dataclass(frozen=True)
class DataInf:
    """DataInf from a stream of the training rows' gradients.

    `rows` gives the gradients of l_i as blocks [b, P], in the order of `weights` [n].

    `blocks` are the leaves, each with one lambda. One stream over the rows serves all columns; sums
    are float64.
    """

    rows: Rows
    weights: Tensor
    blocks: tuple[slice, ...]
    tolerance: float = 1e-3
    name: str = "datainf"
    approximate: ClassVar[bool] = True
    # v, the sums and a quotient, in float64 beside a float32 model; the answer and its residual
    copies: ClassVar[int] = 10

    def solve(self, operator: Damped, rhs: Tensor) -> Solution:
        """Approximate the solution for every row of `rhs` [K, P].

        The residual is against `operator` as it is.
        """
        n, v = len(self.weights), rhs.double()
        diagonal = operator.diagonal(v)
        lam = [float(diagonal[block][0]) for block in self.blocks]
        for block, value in zip(self.blocks, lam, strict=True):
            if bool((diagonal[block] != value).any()):
                raise InputError(
                    f"DataInf was given the block {block.start}:{block.stop}, on which lambda is "
                    "not constant; give blocks as fine as those of the damping (the leaves)"
                )
        nw, sums, start = n * self.weights.to(v), torch.zeros_like(v), 0
        for gradients in self.rows():
            g64, scale = gradients.to(v), nw[start : start + len(gradients)]
            for block, value in zip(self.blocks, lam, strict=True):
                g = g64[:, block]
                shrink = scale / (value + scale * g.square().sum(1))
                sums[:, block] += (v[:, block] @ g.T * shrink) @ g
            start += len(gradients)
        if start != n:
            raise InputError(
                f"DataInf was given {n} weights and a stream of {start} gradients; give one "
                "weight per row"
            )
        values = ((v - sums / n) / diagonal).to(rhs)
        residuals = relative_residuals(operator, rhs, values)
        message = (
            "DataInf is an approximation of the empirical Fisher's inverse: worst residual "
            f"{float(residuals.max()):.1e} against the {operator.curvature.name}"
        )
        iterations = torch.zeros(len(rhs), dtype=torch.int64)
        return Solution(values, residuals, residuals <= self.tolerance, iterations, message)
